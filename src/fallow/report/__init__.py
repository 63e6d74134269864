"""Run folders -> one self-contained HTML page (design: "Results are data; tables and figures are views of it").

    write_report([Path("runs/quickstart")], Path("runs/quickstart/report.html"))

`loading` reads the folders, `analysis` compares the arms, `doubts` says what to hold against that, `wording` what was
found, `figures` decides what is drawn, `charts`, `bars` and `svg` draw it, `view` fills the tables, `memory` has bars
and table of what the model's state weighs, `insight` what a switching run saw of itself, `upcycle` what a model served
sparse reads less and loses, `diagnosis` which layer breaks long context, `page.html` lays all of it out. Everything is
inline: the page opens without a network, from a mail attachment, years later.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fallow.report.analysis import compare
from fallow.report.doubts import doubts
from fallow.report.loading import load as _load
from fallow.report.loading import lookup

if TYPE_CHECKING:
    from jinja2 import Template

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Report:
    """A report before it is written."""

    html: str
    """The whole page."""
    summary: dict[str, Any]
    """Its figures: headline, outcome, baseline, arms, doubts, notes."""
    notes: list[str]
    """What could not be read, one line each; also on the page."""

    def write(self, out: Path) -> Path:
        """Write the page to `out`, through a temporary name so that a reader never sees half of it. Raises OSError."""
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            draft.write_text(self.html, encoding="utf-8")
            draft.replace(out)
        finally:
            draft.unlink(missing_ok=True)
        return out


def build_report(run_dirs: Iterable[Path]) -> Report:
    """Read run folders and comparison folders and lay out their page.

    Raises:
        DataError: a folder is missing or holds no run; the message names what was looked for.
    """
    from markupsafe import Markup

    from fallow.report import diagnosis, figures, insight, memory, summary, upcycle, view, wording

    loaded = _load(run_dirs)
    comparison = compare(loaded)
    first = wording.headline(comparison)
    drawn = [*figures.loss_figures(comparison), *figures.run_figures(comparison)]
    drawn += [figures.time_figure(comparison)]
    drawn += filter(None, [figures.schedule_figure(comparison), memory.memory_figure(comparison)])
    insights = insight.blocks(comparison)
    diagnoses = diagnosis.blocks(comparison)
    upcycled = upcycle.section(comparison, first=first.arm)
    told = [*insights, *(upcycled.blocks if upcycled else [])]
    layers = figures.layer_figures(comparison, besides={block.arm for block in told})
    maps = [figure for found in diagnoses for figure in found.maps]
    for figure in (*drawn, *layers, *maps, *(figure for block in told for figure in block.figures)):
        # Our own drawing: what texts it holds were escaped where they entered it.
        figure.body = Markup(figure.body)
    differing, every = view.settings(comparison)
    here = Path(__file__).parent
    html = _template().render(
        title=_title(loaded.runs),
        headline=first,
        verdicts=wording.verdicts(comparison),
        key_figures=upcycle.key_figures(comparison, first.arm) or view.key_figures(comparison, first.arm),
        columns=view.ARM_COLUMNS,
        arms=view.arm_rows(comparison),
        baseline=comparison.baseline,
        controlled=any(arm.control for arm in comparison.arms),
        repeated=max(len(arm.runs) for arm in comparison.arms) > 1,
        figures={figure.key: figure for figure in drawn},
        layers=layers,
        kinds=view.kinds_of_sparsity(comparison),
        memory=memory.memory_table(comparison),
        insights=insights,
        upcycled=upcycled,
        diagnoses=diagnoses,
        differing=differing,
        every=every,
        facts=view.facts(loaded.runs),
        run=loaded.runs[0].info,
        doubts=doubts(comparison),
        notes=loaded.notes,
        colours=figures.charts.COLOURS,
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        script=Markup((here / "script.js").read_text(encoding="utf-8")),
    )
    return Report(html=html, summary=summary.summary(comparison, loaded.notes), notes=loaded.notes)


def write_report(run_dirs: list[Path], out: Path) -> Path:
    """Write one HTML page about `run_dirs` (runs, or folders of arms) to `out`; log what could not be read.

    Raises:
        DataError: a folder is missing or holds no run.
        OSError: `out` cannot be written.
    """
    report = build_report(run_dirs)
    for note in report.notes:
        _log.warning("report: %s", note)
    return report.write(out)


def _title(runs: list[Any]) -> str:
    names = dict.fromkeys(str(lookup(run.info, "run") or run.path.resolve().parent.name) for run in runs)
    return ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=here, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html")
