"""The section on memory, and pages about sparse weights: bytes by kind, predictions, moves of the topology, doubts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_folders import DENSE_STATE, LAYERS, SAT, SPARSE_STATE, add_memory, pretraining, quickstart, write_run
from test_report_page import needs_browser, open_page

from fallow.report import build_report, figures
from fallow.report.analysis import compare
from fallow.report.loading import load
from fallow.report.memory import memory_figure, memory_table
from fallow.report.wording import size


def rows_of(folder: Path) -> dict[str, list[tuple[str, str]]]:
    table = memory_table(compare(load([folder])))
    assert table is not None and table.columns == ["dense", "SMET"]
    return {row.name: [(cell.value, cell.note) for cell in row.cells] for row in table.rows}


def test_the_table_sets_counted_beside_predicted_and_dense_beside_sparse(tmp_path: Path) -> None:
    rows = rows_of(pretraining(tmp_path))
    assert rows["Model state"] == [("17.2 MB", ""), ("6.08 MB", "35% of dense")]
    assert rows["Linear layers"] == [("15.3 MB", ""), ("4.17 MB", "predicted 4.22 MB")]
    assert rows["clocks"] == [("–", ""), ("244 kB", "predicted 293 kB")]
    assert rows["topology"] == [("–", ""), ("122 kB", "as predicted")]
    assert rows["share of dense AdamW’s bytes"] == [("–", ""), ("27.3%", "")]
    assert rows["Shared dense buffers beside it"] == [("–", ""), ("64 kB", "")]
    assert rows["Peak memory of the process, measured"] == [("2.05 GB", ""), ("1.66 GB", "")]
    assert rows["Newest checkpoint on disk"] == [("–", ""), ("5 MB", "")]
    assert rows["Trained model on disk, in dense form"] == [("3.91 MB", ""), ("–", "")]
    assert "fp32 masters" not in rows, "no arm has any"


def test_bars_are_on_one_scale(tmp_path: Path) -> None:
    figure = memory_figure(compare(load([pretraining(tmp_path)])))
    assert figure is not None
    widths = {
        arm: {m[0]: float(m[1]) for m in re.findall(r'<i class="m-(\w+)" style="width:([\d.]+)%', text)}
        for arm, text in zip(("dense", "smet"), figure.body.split("bar-name")[1:], strict=True)
    }
    assert list(widths["dense"]) == ["weights", "gradients", "moments", "rest"]
    assert list(widths["smet"]) == ["weights", "gradients", "moments", "clocks", "topology", "rest"]
    assert sum(widths["dense"].values()) == pytest.approx(100, abs=0.01)
    for kind, value in SPARSE_STATE.items():
        if value:
            assert widths["smet"][kind] == pytest.approx(100 * value / 18_000_000, abs=0.001)
    assert widths["smet"]["rest"] == widths["dense"]["rest"]
    assert "<b>6.08 MB · 35%</b>" in figure.body


def test_runs_without_bytes_have_no_section(tmp_path: Path) -> None:
    """Old runs, and runs whose block is damaged."""
    folder = quickstart(tmp_path)
    html = build_report([folder]).html
    assert "hold in memory" not in html and "model-state" not in html and "bytes of model state" not in html
    source = folder / "sat" / "run.json"
    info = json.loads(source.read_text())
    for damage in (3, [], {"layers": 3}, {"layers": {"weights": "x"}}, {"layers": [1], "total": -1, "files": 7}):
        source.write_text(json.dumps(info | {"memory": damage}))
        assert "hold in memory" not in build_report([folder]).html
    source.write_text(json.dumps(info | {"memory": {"layers": {"weights": 10, "<img>": 5}, "predicted": 3}}))
    html = build_report([folder]).html
    assert "hold in memory" in html and "<img>" not in html and "m-other" in html


def test_the_page_says_what_the_state_weighs(tmp_path: Path) -> None:
    report = build_report([pretraining(tmp_path)])
    assert "Its model state takes 6.08 MB, 35% of dense’s." in report.summary["detail"]
    assert [arm["model_state_bytes"]["mean"] for arm in report.summary["arms"]] == [18_000_000, 6_375_000]
    assert "<b>\N{MINUS SIGN}65%</b><span>bytes of model state against dense</span>" in report.html
    assert "keeps 25% of the weights" in report.html


def test_words_follow_what_the_arms_do(tmp_path: Path) -> None:
    """A page about omission explains omission, a page about sparse weights those, a page about both has both."""
    omits, keeps = "leaves out part of the feed-forward channels", "holds only that share of the weights"
    sat, smet = quickstart(tmp_path), pretraining(tmp_path)
    pages = [build_report(folders).html for folders in ([sat], [smet], [sat / "dense", sat / "sat", smet / "smet"])]
    assert [omits in page for page in pages] == [True, False, True]
    assert [keeps in page for page in pages] == [False, True, True]
    assert ["What was left out?" in page for page in pages] == [True, False, True]
    assert ["of the part computed" in page for page in pages] == [True, False, True]
    assert "omitted" not in pages[1]


def test_density_per_layer_is_shown_and_a_flat_map_is_a_sentence(tmp_path: Path) -> None:
    folder = pretraining(tmp_path)
    (flat,) = figures.layer_figures(compare(load([folder])))
    assert flat.title == "SMET: density" and "<b>25%</b> in each of 30 layers, from step 10 to 120" in flat.body
    source = folder / "smet" / "metrics.jsonl"
    uneven = [0.1 + 0.01 * layer for layer in range(LAYERS)]
    source.write_text(source.read_text().replace(json.dumps([0.25] * LAYERS), json.dumps(uneven)))
    (drawn,) = figures.layer_figures(compare(load([folder])))
    assert '<svg class="map"' in drawn.body and "density 39%" in drawn.body and "omitted" not in drawn.body
    assert drawn.caption == "First layer on top; full colour is 39%."


def test_the_loss_chart_marks_where_the_topology_moved(tmp_path: Path) -> None:
    drawn = figures.loss_figures(compare(load([pretraining(tmp_path)])))
    for figure in drawn[:2]:
        paths = re.findall(r'<path class="event c1" d="([^"]+)"', figure.body)
        assert len(paths) == 2 and all(path.count("M") == 4 for path in paths), "120 steps, moved every 30"
        assert "topology moved" in figure.caption
    assert "Ticks above the axis: the topology moved." in build_report([tmp_path / "pretraining"]).html
    quick = figures.loss_figures(compare(load([quickstart(tmp_path)])))
    assert "event" not in quick[0].body and not quick[0].caption


def test_arms_of_other_sizes_are_held_against_it(tmp_path: Path) -> None:
    folder = pretraining(tmp_path)
    assert "architecture" not in " ".join(build_report([folder]).summary["doubts"])
    small = write_run(folder / "small", arm="small")
    info = json.loads((small / "run.json").read_text())
    info["model"] |= {"parameters": 40_000_000, "layers": 8}
    (small / "run.json").write_text(json.dumps(info))
    doubts = " ".join(build_report([folder]).summary["doubts"])
    assert "differ in their architecture (dense, SMET: 134.52 M parameters; small: 40.00 M parameters;" in doubts
    assert "differ in their model:" not in doubts, "their name is the same"


@needs_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_the_section_in_a_real_browser(tmp_path: Path, width: int) -> None:
    folder = pretraining(tmp_path)
    write_run(folder / "sat", arm="sat", method=SAT)
    add_memory(folder / "sat", DENSE_STATE)
    document, probe, log = open_page(build_report([folder]).html, tmp_path, width=width)
    assert "What does it hold in memory?" in document
    assert probe["page"] <= probe["window"] and probe["colliding"] == 0, probe
    assert "Uncaught" not in log and "CONSOLE" not in log, log


def test_sizes_in_words() -> None:
    values = (0, 999, 1000, 1023 * 1024, 2**20, 1.5 * 2**30, 2.5e15)
    assert [size(v) for v in values] == ["0 B", "999 B", "0.977 kB", "0.999 MB", "1 MB", "1.5 GB", "2,328,306 GB"]
