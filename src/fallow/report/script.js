// Hover on line charts: a vertical cursor and each series' value nearest to it. The page is complete without it.
(() => {
  const tip = document.getElementById("tip");
  const hide = (svg) => {
    tip.hidden = true;
    svg.classList.remove("hover");
  };

  const nearest = (points, x) => {
    let low = 0;
    let high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle;
      else high = middle;
    }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
  };

  const format = (value, scale, unit, decimals) => {
    const shown = (value / scale).toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
    return shown.replace("-", "\u2212") + (unit ? (unit === "%" ? "\u2009%" : " " + unit) : "");
  };

  for (const svg of document.querySelectorAll("svg.chart")) {
    const source = document.getElementById("data-" + svg.dataset.chart);
    if (!source) continue;
    const series = JSON.parse(source.textContent);
    const [low, high, left, right] = svg.dataset.x.split(" ").map(Number);
    const [xScale, xUnit, xDecimals, yScale, yUnit, yDecimals] = JSON.parse(svg.dataset.units);
    const line = svg.querySelector(".cursor line");

    const show = (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      if (at < left - 4 || at > right + 4) return hide(svg);
      const wanted = low + ((at - left) / (right - left)) * (high - low);
      const found = series.filter((s) => s.p.length).map((s) => ({ s, p: nearest(s.p, wanted) }));
      if (!found.length) return hide(svg);
      const x = found.reduce((best, f) => (Math.abs(f.p[0] - wanted) < Math.abs(best - wanted) ? f.p[0] : best), found[0].p[0]);
      const place = left + ((x - low) / (high - low || 1)) * (right - left);
      line.setAttribute("x1", place);
      line.setAttribute("x2", place);
      svg.classList.add("hover");

      tip.replaceChildren();
      const head = tip.appendChild(document.createElement("b"));
      head.textContent = format(x, xScale, xUnit, xDecimals);
      const reach = (high - low) * 0.06;
      for (const { s, p } of found.sort((a, b) => b.p[1] - a.p[1])) {
        if (Math.abs(p[0] - x) > reach) continue;
        const row = tip.appendChild(document.createElement("div"));
        const key = row.appendChild(document.createElement("i"));
        key.className = "key c" + s.c;
        row.appendChild(document.createElement("span")).textContent = s.name;
        row.appendChild(document.createElement("em")).textContent = format(p[1], yScale, yUnit, yDecimals);
      }
      tip.hidden = false;
      const wide = tip.offsetWidth;
      const x0 = event.clientX + 16 + wide > window.innerWidth ? event.clientX - wide - 16 : event.clientX + 16;
      tip.style.left = Math.max(6, x0) + window.scrollX + "px";
      tip.style.top = event.clientY + window.scrollY - 12 + "px";
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => hide(svg));
  }
  document.documentElement.dataset.ready = "yes";
})();
