"""The page as a reader gets it: opened in a real headless browser, on a laptop and on a phone, in light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_folders import SAT, quickstart, write_compare, write_run

from fallow.cli.report import report_command
from fallow.report import build_report, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--virtual-time-budget=3000", "--enable-logging=stderr", "--v=0"]
# Run in the page after its own script: measures what is shown, and hovers over the first chart.
PROBE = """
<script>addEventListener("load", () => {
  const shown = [...document.querySelectorAll("svg.chart, svg.map")].map((s) => s.getBoundingClientRect())
    .filter((b) => b.width > 0);
  const chart = [...document.querySelectorAll("svg.chart")].find((s) => s.getBoundingClientRect().width > 0);
  const box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 80}));
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify({
    charts: shown.length, smallest: Math.min(...shown.map((b) => Math.min(b.width, b.height))),
    widest: Math.max(...shown.map((b) => b.right)), page: document.documentElement.scrollWidth, window: innerWidth,
    ready: document.documentElement.dataset.ready, tip: document.getElementById("tip").textContent,
    paper: getComputedStyle(document.body).backgroundColor,
    colliding: [...document.querySelectorAll("svg.chart")].flatMap((s) => {
      const all = [...s.querySelectorAll("text.label")].map((t) => t.getBoundingClientRect());
      const over = (p, q) => Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      return all.filter((p, i) => all.some((q, j) => j > i && over(p, q) > 4));
    }).length,
    resources: performance.getEntriesByType("resource").map((r) => r.name).filter((n) => !n.startsWith("data:")),
  });
  document.body.append(out);
});</script>
"""
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium found; install Debian's `chromium` to run this")


class Outside(HTMLParser):
    """Collects every address the page would load something from."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def open_page(html: str, folder: Path, *, width: int = 1280, flags: tuple[str, ...] = ()) -> tuple[str, dict, str]:
    """`(document after its scripts ran, the probe's findings, the browser's log)`."""
    assert BROWSER is not None
    page = folder / f"page-{width}{len(flags)}.html"
    page.write_text(html.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={folder / f'profile{width}{len(flags)}'}",
        f"--window-size={width},900",
    ]
    done = subprocess.run([*command, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page's scripts did not run: {done.stderr[-2000:]}"
    return (
        done.stdout,
        json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")),
        done.stderr,
    )


@needs_browser
def test_the_page_in_a_real_browser(tmp_path: Path) -> None:
    html = write_report([quickstart(tmp_path)], tmp_path / "report.html").read_text(encoding="utf-8")
    document, probe, log = open_page(html, tmp_path)
    assert "In the same time, SAT reached a lower loss than dense." in document
    assert "1.38× as many tokens per second as dense; at equal tokens its loss is 0.021 nats higher" in document
    assert probe["charts"] == 9 and probe["smallest"] > 150, probe
    assert probe["page"] <= 1280 and probe["widest"] <= 1280 and probe["colliding"] == 0, probe
    assert probe["ready"] == "yes" and "tokens" in probe["tip"] and "SAT" in probe["tip"] and "dense" in probe["tip"]
    assert probe["resources"] == []
    assert "Uncaught" not in log and "CONSOLE" not in log, log


@needs_browser
def test_the_page_on_a_phone_and_in_the_dark(tmp_path: Path) -> None:
    folder = quickstart(tmp_path)
    for seed in (1, 2):
        arm = f"sat-with-a-rather-long-name-s{seed}"
        write_run(folder / arm, arm=arm, seed=seed, method={**SAT, "omit_in": "backward"}, penalty=0.01 * seed)
    html = build_report([folder]).html
    light = open_page(html, tmp_path, width=500)[1]
    dark = open_page(html, tmp_path, width=500, flags=("--blink-settings=preferredColorScheme=0",))[1]
    for probe in (light, dark):
        assert probe["page"] <= probe["window"], f"the page scrolls sideways: {probe}"
        assert probe["charts"] == 11 and probe["smallest"] > 150 and "SAT" in probe["tip"], probe
    brightness = [sum(map(int, re.findall(r"\d+", probe["paper"])[:3])) / 3 for probe in (light, dark)]
    assert brightness[0] > 230 and brightness[1] < 40


def test_the_page_stands_alone(tmp_path: Path) -> None:
    """Nothing on it is loaded from elsewhere, and six arms of two seeds stay under 1.5 MB."""
    arms = [f"{name}-s{seed}" for seed in (0, 1) for name in ("dense", "a", "b", "c", "d", "e")]
    for arm in arms:
        write_run(tmp_path / arm, arm=arm, seed=int(arm[-1]), method=None if "dense" in arm else {**SAT, "k": arm[0]})
    html = build_report([write_compare(tmp_path, arms)]).html
    reader = Outside()
    reader.feed(html)
    assert [a for a in reader.addresses if not a.startswith(("data:", "#"))] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|https?://", html)
    assert len(html.encode()) < 1_500_000
    assert html.count('class="chart wide"') == html.count('class="chart narrow"') == 7


def test_names_from_files_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>&'\""
    folder = quickstart(tmp_path)
    info = json.loads((folder / "sat" / "run.json").read_text())
    info |= {"arm": evil, "command": evil, "run": evil}
    info["recipe"][evil], info["precision"]["reason"], info["time"][evil] = evil, evil, 3.0
    (folder / "sat" / "run.json").write_text(json.dumps(info))
    html = build_report([folder]).html
    assert "<img" not in html and html.count("</script>") == html.count("<script")


def test_settings_show_what_differs(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    write_run(folder / "dense", arm="dense")
    write_run(folder / "a", arm="a", method=SAT)
    write_run(folder / "b", arm="b", method={**SAT, "omit": 0.3})
    html = build_report([folder]).html
    differing = html[html.index("What differs") : html.index("All settings")]
    assert "method.omit" in differing and "method.importance" not in differing and "batch_size" not in differing
    assert "batch_size" in html and "AVX-512-bf16 found" in html and "AMD EPYC 9V74" in html


def test_the_command_writes_prints_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = quickstart(tmp_path)
    with (folder / "sat" / "metrics.jsonl").open("a") as file:
        file.write("{half a li")
    assert report_command([str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert Path(found["report"]) == folder / "report.html" and (folder / "report.html").stat().st_size > 20_000
    assert found["outcome"] == "won" and found["baseline"] == "dense"
    assert "1 line could not be read" in printed.err
    out = tmp_path / "sub" / "page.html"
    assert report_command([str(folder / "dense"), str(folder / "sat"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out and out.is_file()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
