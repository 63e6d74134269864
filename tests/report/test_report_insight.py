"""The section on switching runs: phases, switches and measures as the run wrote them, whatever of them is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_folders import quickstart, write_run
from switching_runs import SWITCHING_STEPS, edit_run, switching, switching_insight
from test_report_page import needs_browser, open_page

from fallow.report import build_report
from fallow.report.analysis import compare
from fallow.report.insight import Block, blocks
from fallow.report.insight_data import read
from fallow.report.loading import load

ALL = {
    "timeline", "similarity", "similarity-layers", "zeros", "zeros-layers", "recall", "router-layers", "gap", "overlap",
    "dead", "dead-layers",
}  # fmt: skip


def block_of(folder: Path) -> Block:
    (block,) = blocks(compare(load([folder])))
    return block


def shown(block: Block) -> set[str]:
    return {figure.key.removeprefix("insight1-") for figure in block.figures}


def hovered(block: Block, key: str) -> dict[str, list[list[float]]]:
    """Points of each line of a chart, from the values that it shows on hover."""
    (figure,) = (figure for figure in block.figures if figure.key == f"insight1-{key}")
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', figure.body)
    assert found
    return {line["name"]: line["p"] for line in json.loads(found[1])}


def means(items: list[dict[str, Any]], name: str) -> list[list[Any]]:
    """`[step, mean over layers]` of what is there."""
    held = [(i["step"], i[name]) for i in items if i.get(name) and None not in i[name]]
    return [[step, pytest.approx(sum(values) / len(values), abs=1e-5)] for step, values in held]


def test_a_real_run_has_all_pictures_and_they_say_what_it_saw(tmp_path: Path) -> None:
    insight = json.loads(switching_insight())
    block = block_of(switching(tmp_path))
    assert shown(block) == ALL
    seen = [(line["step"], line["seen"]) for line in insight["log"]]
    timeline = hovered(block, "timeline")
    assert timeline["all neurons"] == [[step, pytest.approx(s["dense_loss"], abs=1e-5)] for step, s in seen]
    both = [(step, s) for step, s in seen if s["sparse_loss"] is not None]
    assert timeline["only experts"] == [[step, pytest.approx(s["sparse_loss"], abs=1e-5)] for step, s in both]
    gaps = [[step, pytest.approx(s["sparse_loss"] - s["dense_loss"], abs=2e-5)] for step, s in both]
    assert hovered(block, "gap")["gap"] == gaps
    observed, made = insight["observations"], insight["partitions"]
    assert hovered(block, "similarity")["look before"] == means(observed, "similarity")
    assert hovered(block, "similarity")["last look"] == means(observed[:-1], "similarity_end")
    assert hovered(block, "zeros")["zeros"] == means(observed, "zeros")
    assert hovered(block, "dead")["dead"] == means(observed, "dead")
    recall = hovered(block, "recall")
    for name, field in (("router", "recall"), ("best choice", "oracle")):
        expected = sorted(means(observed, field) + means(made, field), key=lambda point: point[0])
        assert recall[name] == expected, "after a sorting what was, then what is"
    assert recall["random groups"] == means(made, "random_recall")
    overlap = hovered(block, "overlap")
    assert len(made) == 3 and len(overlap["same group"]) == 2, "nothing to compare the first partition with"
    assert overlap["same group"] == means(made, "overlap") and overlap["noise floor"] == means(made, "noise_floor")


def test_phases_lie_where_the_log_has_them(tmp_path: Path) -> None:
    block = block_of(switching(tmp_path))
    assert block.timeline is not None
    drawing = block.timeline.body.split('class="chart wide"')[1].split("</svg>")[0]
    low, high, left, right = map(float, re.findall(r'data-x="([^"]+)"', drawing)[0].split())
    assert (low, high) == (0, SWITCHING_STEPS)
    strips = re.findall(r'class="strip phase-(\w+) c1" x="([\d.]+)" width="([\d.]+)"', drawing)
    unit = (right - left) / SWITCHING_STEPS
    found = [(name, round((float(x) - left) / unit, 1), round(float(w) / unit, 1)) for name, x, w in strips]
    expected = [("dense", 0, 12), ("sparse", 12, 12), ("dense", 24, 6), ("sparse", 30, 12), ("dense", 42, 6)]
    assert found == [*expected, ("sparse", 48, 6), ("mixed", 54, 6)]
    ticks = re.findall(r'<path class="event c1" d="([^"]+)"', drawing)
    assert len(ticks) == 1 and ticks[0].count("M") == 3, "three sortings"
    assert "computed only experts in 30 of its 60 steps, in 3 stretches, the first from step 12" in block.sentence
    assert "and alternated in 6 more. There each token computed 2 of 8 experts" in block.sentence
    assert [card.value for card in block.cards[:2]] == ["55%", "25%"], "every other of the last six steps was sparse"


def test_the_table_has_what_changed_and_the_last_line(tmp_path: Path) -> None:
    log = json.loads(switching_insight())["log"]
    block = block_of(switching(tmp_path))
    rows = {int(row.name): row.cells for row in block.switches.rows}
    assert list(rows) == [12, 24, 30, 42, 48, 54, 57]
    assert len(block.log.rows) == len(log) == 20
    then = [cells[0].value for cells in rows.values()]
    assert then == ["dense → sparse", "sparse → dense"] * 2 + ["dense → sparse", "sparse → mixed", "stays mixed"]
    assert [step for step, cells in rows.items() if cells[-1].note == "neurons sorted into experts"] == [12, 30, 48]
    by_step = {line["step"]: line for line in log}
    for step, cells in rows.items():
        seen = by_step[step]["seen"]
        assert cells[1].value == f"{seen['similarity']:.3f}" and cells[2].value == f"{seen['zeros']:.1%}"
        assert cells[5].value == by_step[step]["reason"]
        if seen["sparse_loss"] is not None:
            gap = f"{seen['sparse_loss'] - seen['dense_loss']:+.3f}".replace("-", "\N{MINUS SIGN}")
            assert (cells[4].value, cells[4].note) == (f"{seen['sparse_loss']:.3f}", gap)
    assert rows[12][4].value == "–", "there were no experts to compute the loss with"


def test_a_long_log_is_thinned_but_loses_no_switch(tmp_path: Path) -> None:
    folder = switching(tmp_path)
    insight = json.loads(switching_insight())
    start = insight["log"][0]
    insight["log"] = [start | {"step": -n} for n in range(1000, 0, -1)] + insight["log"]
    edit_run(folder / "ssd", insight=insight)
    block = block_of(folder)
    assert len(block.log.rows) < 350 and block.log.title.endswith("of 1,020 decisions; run.json has all of them")
    assert {row.name for row in block.switches.rows} <= {row.name for row in block.log.rows}


def test_thresholds_are_drawn_only_where_they_decide(tmp_path: Path) -> None:
    adaptive = {f.key: f for f in block_of(switching(tmp_path / "a")).figures}
    body = adaptive["insight1-similarity"].body
    assert "needed to go sparse, 0.2" in body and "needed to go sparse, 30%" in adaptive["insight1-zeros"].body
    height = float(re.findall(r'class="level" x1="[^"]+" x2="[^"]+" y1="([\d.]+)"', body)[0])
    low, high, bottom, top = map(float, re.findall(r'data-y="([^"]+)"', body)[0].split())
    assert low + (bottom - height) / (bottom - top) * (high - low) == pytest.approx(0.2, abs=0.005)
    assert "gone back to dense at 3 nats; it never came near" in adaptive["insight1-gap"].caption
    fixed = block_of(switching(tmp_path / "f", "fixed"))
    assert all("needed to go sparse" not in figure.body for figure in fixed.figures) and shown(fixed) == ALL


def test_runs_that_never_switch(tmp_path: Path) -> None:
    dense = block_of(switching(tmp_path / "d", "always_dense"))
    assert dense.sentence == "SSD stayed dense in all of its 60 steps; its last look says why: always dense."
    assert shown(dense) == ALL - {"gap", "recall", "router-layers", "overlap"}, "it looks, and never computes experts"
    assert dense.sorted is None and dense.cards[0].value == "0%"
    sparse = block_of(switching(tmp_path / "s", "always_sparse"))
    assert "in 60 of its 60 steps, from step 0. There each token" in sparse.sentence and sparse.cards[0].value == "100%"
    assert shown(sparse) == ALL - {"overlap"}, "one partition: nothing to overlap with"
    for which in ("d", "s"):
        html = build_report([tmp_path / which / "switching"]).html
        assert "When did it compute only experts" in html


def test_both_losses_stand_in_the_table_of_arms(tmp_path: Path) -> None:
    report = build_report([switching(tmp_path)])
    loss, sparse = (report.summary["arms"][1][key]["mean"] for key in ("eval_loss", "eval_loss_sparse"))
    assert sparse == pytest.approx(loss + 0.0123)
    assert f"{loss:.3f}<small>{sparse:.3f} sparse</small>" in report.html
    assert report.summary["arms"][0]["eval_loss_sparse"] is None
    assert "<b>+0.012</b><span>nats of loss if served sparse" in report.html
    assert "2 of 8 experts, 123 k tokens" in report.html
    assert "sorts them into <b>experts</b>" in report.html and "leaves out part of" not in report.html


def test_other_runs_have_no_section(tmp_path: Path) -> None:
    html = build_report([quickstart(tmp_path)]).html
    for words in ("insight", "compute only experts", "into <b>experts</b>", 'class="decisions'):
        assert words not in html.split("</style>")[1], words


@pytest.mark.parametrize(
    "damage", [None, 3, [], {}, {"log": 7}, {"log": [{"step": "x"}, 5, {"step": 1, "phase": "?"}]}]
)
def test_a_damaged_insight_is_left_out(tmp_path: Path, damage: object) -> None:
    folder = switching(tmp_path)
    edit_run(folder / "ssd", insight=damage)
    assert blocks(compare(load([folder]))) == []
    assert "When did it compute only experts" not in build_report([folder]).html


def test_partial_insights_show_what_is_there(tmp_path: Path) -> None:
    folder = switching(tmp_path)
    whole = json.loads(switching_insight())
    no_nones = [{k: v for k, v in item.items() if k in ("step", "zeros")} for item in whole["observations"]]
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"observations": [], "partitions": []}, {"timeline", "gap"}),
        ({"partitions": []}, ALL - {"overlap"}),
        ({"observations": whole["observations"][:1]}, {"timeline", "gap", "recall", "overlap"}),
        ({"observations": None, "partitions": whole["partitions"][:1]}, {"timeline", "gap"}),
        ({"observations": no_nones, "partitions": "x"}, {"timeline", "gap", "zeros", "zeros-layers"}),
        ({"active": None, "experts": "<b>"}, ALL),
        ({"log": whole["log"][:1]}, ALL - {"timeline", "gap"}),
        ({"log": [{"step": 3, "phase": "dense"}]}, ALL - {"timeline", "gap"}),
    ]
    for change, expected in cases:
        edit_run(folder / "ssd", insight=whole | change)
        assert shown(block_of(folder)) == expected, change
        html = build_report([folder]).html
        assert "When did it compute only experts" in html and "<b> experts" not in html


def test_layers_without_a_number_and_one_layer(tmp_path: Path) -> None:
    folder = switching(tmp_path)
    whole = json.loads(switching_insight())
    whole["observations"][5]["zeros"][1] = None
    edit_run(folder / "ssd", insight=whole)
    step, values = whole["observations"][5]["step"], whole["observations"][5]["zeros"]
    assert [step, pytest.approx((values[0] + values[2]) / 2, abs=1e-5)] in hovered(block_of(folder), "zeros")["zeros"]
    for items in (whole["observations"], whole["partitions"]):
        for item in items:
            item |= {key: value[:1] for key, value in item.items() if isinstance(value, list)}
    edit_run(folder / "ssd", insight=whole)
    assert shown(block_of(folder)) == {key for key in ALL if "layers" not in key}


def test_an_interrupted_run_ends_where_it_came_to(tmp_path: Path) -> None:
    folder = tmp_path / "ssd"
    write_run(folder, arm="ssd", method={"name": "ssd", "experts": 8}, steps=60, stop_at=20, status="interrupted")
    whole = json.loads(switching_insight())
    edit_run(folder, insight=whole | {"log": [line for line in whole["log"] if line["step"] <= 20]})
    (run,) = load([folder]).runs
    insight = read(run)
    assert insight is not None and insight.steps == 20
    assert [(p.name, p.start, p.end) for p in insight.phases] == [("dense", 0, 12), ("sparse", 12, 20)]


def test_reasons_from_files_cannot_become_markup(tmp_path: Path) -> None:
    folder = switching(tmp_path)
    insight = json.loads(switching_insight())
    for line in insight["log"]:
        line["reason"] = "</script><img src=x>"
    edit_run(folder / "ssd", insight=insight)
    html = build_report([folder]).html
    assert "<img" not in html and html.count("&lt;img src=x&gt;") == 7 + 20


def test_layers_are_not_drawn_twice(tmp_path: Path) -> None:
    """What the run logs per layer is in the section; without an insight it is shown as for any other method."""
    folder = switching(tmp_path)
    assert "SSD: zeros" not in build_report([folder]).html
    edit_run(folder / "ssd", insight=None)
    html = build_report([folder]).html
    assert "SSD: zeros" in html and "Layer by layer" in html


@needs_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_the_section_in_a_real_browser(tmp_path: Path, width: int) -> None:
    folder = switching(tmp_path)
    for seed in (1, 2):
        again = write_run(folder / f"fixed-s{seed}", arm=f"fixed-s{seed}", seed=seed, method={"name": "ssd"}, steps=60)
        edit_run(again, insight=json.loads(switching_insight("fixed")))
    html = build_report([folder]).html
    assert html.count('<details class="block"') == 2 and html.count('<details class="block" open') == 1
    assert "Drawn is the first of 2 seeds; the others computed sparse in 55% of their steps." in html
    document, probe, log = open_page(html, tmp_path, width=width)
    assert "When did it compute only experts, and why?" in document
    assert probe["page"] <= probe["window"] and probe["colliding"] == 0 and probe["smallest"] > 100, probe
    assert probe["charts"] >= 7 + len(ALL), probe
    assert probe["resources"] == [] and "Uncaught" not in log and "CONSOLE" not in log, log
