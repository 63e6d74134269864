"""The section on upcycled runs: losses as served, looks and fits as the run wrote them, whatever of them is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_folders import STEPS, dense_loss, quickstart, write_run
from switching_runs import edit_run, switching
from test_report_page import needs_browser, open_page
from upcycled_runs import BEFORE, LEFT_OUT, UPCYCLE_STEPS, upcycled, upcycled_insight, upcycled_run

from fallow.report import build_report
from fallow.report.analysis import compare
from fallow.report.loading import load
from fallow.report.upcycle import Block, Section, section
from fallow.report.upcycle_data import read

TOKENS = 2048
END = dense_loss(UPCYCLE_STEPS * TOKENS)
ALL = {"losses", "gaps", "recall", "keep", "entropy", "dead", "fit", "fit-layers"}


def section_of(folder: Path) -> Section:
    found = section(compare(load([folder])), first="upcycle")
    assert found is not None
    return found


def block_of(folder: Path) -> Block:
    return next(block for block in section_of(folder).blocks if block.arm == "upcycle")


def shown(block: Block) -> set[str]:
    return {figure.key.split("-", 1)[1] for figure in block.figures}


def hovered(block: Block, name: str) -> dict[str, list[list[float]]]:
    """Points of each line of a chart, from the values that it shows on hover."""
    (figure,) = (figure for figure in block.figures if figure.key.split("-", 1)[1] == name)
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', figure.body)
    assert found
    return {line["name"]: line["p"] for line in json.loads(found[1])}


def layers(values: list[float]) -> list[list[Any]]:
    return [[n, pytest.approx(value, abs=1e-5)] for n, value in enumerate(values, start=1)]


def test_pictures_say_what_the_run_saw(tmp_path: Path) -> None:
    insight = json.loads(upcycled_insight())
    looks, fits = insight["looks"], insight["fits"]
    assert [look["step"] for look in looks] == [0, 8, 16, 24, 32, 40] and len(fits) == 10
    block = block_of(upcycled(tmp_path))
    assert shown(block) == ALL
    recall = hovered(block, "recall")
    assert recall["first, step 0"] == layers(looks[0]["recall"])
    assert recall["last look, step 40"] == layers(looks[-1]["recall"]) and recall["chance"] == layers(
        looks[-1]["random"]
    )
    for name in ("entropy", "dead"):
        if name in {key for key in shown(block)} and "<svg" in next(
            f.body for f in block.figures if f.key.endswith(name)
        ):
            assert hovered(block, name)["last look, step 40"] == layers(looks[-1][name])
    fitted = [[f["tokens"], pytest.approx(sum(f["recall"]) / 3, abs=1e-5)] for f in fits]
    assert hovered(block, "fit")["recall"] == fitted
    keep = next(f for f in block.figures if f.key.endswith("keep"))
    assert [f"layer {n}: {k} channels" in keep.body for n, k in ((1, 4), (2, 4), (3, 8))] == [True] * 3
    assert block.layers is not None and [row.name for row in block.layers.rows] == ["layer 1", "layer 2", "layer 3"]
    assert [row.cells[0].value for row in block.layers.rows] == ["4", "4", "8"]


def test_losses_stand_beside_the_companions(tmp_path: Path) -> None:
    block = block_of(upcycled(tmp_path))
    losses, gaps = hovered(block, "losses"), hovered(block, "gaps")
    near = lambda step, value: [step, pytest.approx(value, abs=2e-5)]  # noqa: E731
    companion = [dense_loss(step * TOKENS) for step in (0, 20, 40)]
    whole = [loss + 0.02 * share for loss, share in zip(companion, (0, 0.5, 1), strict=True)]
    left_out = [BEFORE, (BEFORE + LEFT_OUT) / 2, LEFT_OUT]
    steps = (0, 20, 40)
    assert losses["dense"] == [near(*pair) for pair in zip(steps, companion, strict=True)]
    assert losses["all channels"] == [near(*pair) for pair in zip(steps, whole, strict=True)]
    assert losses["sparse"] == [near(s, a + b) for s, a, b in zip(steps, whole, left_out, strict=True)]
    assert gaps["to all channels"] == [near(*pair) for pair in zip(steps, left_out, strict=True)]
    assert gaps["to dense"] == [near(0, 0.3), near(20, 0.2), near(40, 0.1)]


def test_it_is_judged_as_it_is_served(tmp_path: Path) -> None:
    report = build_report([upcycled(tmp_path)])
    dense, arm, _ = report.summary["arms"]
    assert arm["judged"] == "sparse" and dense["judged"] == "dense" and dense["eval_loss_dense"] is None
    assert arm["eval_loss"]["mean"] == pytest.approx(END + 0.1) == arm["eval_loss_sparse"]["mean"]
    assert arm["eval_loss_dense"]["mean"] == pytest.approx(END + 0.02)
    assert arm["loss_gap_equal_tokens"]["mean"] == pytest.approx(0.1)
    assert report.summary["outcome"] == "open"
    # a third of the channels; 2·8·(32 + 64) bytes of factors, and of four bytes 2·(8 + 64) scales and 64 tilts
    share = 1 / 3 + (2 * (8 * 96 + 72 * 4) + 64 * 4) / (3 * 32 * 64 * 2)
    assert report.summary["headline"] == (
        f"Upcycle reads {share:.0%} of its feed-forward bytes per token; at equal tokens its loss is 0.100 nats"
        " higher than dense’s."
    )
    assert f"{END + 0.1:.3f}, with all channels {END + 0.02:.3f}; dense ended at {END:.3f}." in report.summary["detail"]
    assert "0.71× as many tokens per second as dense. In training upcycling saves nothing" in report.summary["detail"]
    assert report.html.count("which “fallow bench upcycle” measures") == 1
    assert f"{END + 0.1:.3f}<small>sparse; {END + 0.02:.3f} all channels</small>" in report.html
    for wrong in ("Sparsity lost", "learned less", "never reached", "so it decides the headline", "sparsity paid"):
        assert wrong not in report.html, wrong


def test_the_table_says_what_was_bought(tmp_path: Path) -> None:
    found = section_of(upcycled(tmp_path))
    dense, arm, control = found.bought.rows
    assert [cell.value for cell in dense.cells] == ["all", "100%", "–", f"{END:.3f}", "–", "–"]
    recall = json.loads(upcycled_insight())["looks"][-1]["recall"]
    assert [cell.value for cell in arm.cells] == [
        "4 to 8 of 16", "53%", f"{END + 0.1:.3f}", f"{END + 0.02:.3f}", "+0.100", f"{sum(recall) / 3:.0%}",
    ]  # fmt: skip
    assert arm.cells[1].note == "33% + 19.3% predictor"
    assert control.cells[1].value == "–" and control.cells[4].value == "+0.480" and control.cells[4].css == ""
    assert found.opened == 0 and [block.aside for block in found.blocks] == [False, True]


def test_a_control_never_leads(tmp_path: Path) -> None:
    """Chosen by the answer itself, an arm loses least; what can be served comes first all the same."""
    folder = upcycled(tmp_path)
    upcycled_run(folder / "oracle", penalty=0.0, selection="oracle")
    upcycled_run(folder / "wide", penalty=0.01, keep=(8, 8, 8))
    report = build_report([folder])
    assert (
        report.summary["headline"].startswith("wide reads 69% of its")
        and "Of 2 upcycled arms it lost least" in (report.summary["detail"])
    )
    html = report.html
    assert "oracle is a control: 4 to 8 of 16 channels, chosen by what each turns out to be worth" in html
    assert html.index("random is a control") > html.index("oracle is a control") > html.index("Upcycle reads 53%")
    assert html.count('<details class="block" open><summary>wide') == 1 and html.count('<details class="block"') == 4


def test_equal_keep_has_no_picture(tmp_path: Path) -> None:
    folder = upcycled(tmp_path)
    edit_run(folder / "upcycle", insight=json.loads(upcycled_insight()) | {"keep": [4, 4, 4]})
    block = block_of(folder)
    assert shown(block) == ALL - {"keep"} and "computes 4 of 16 channels" in block.sentence


def test_doubts_of_an_upcycled_arm(tmp_path: Path) -> None:
    folder = upcycled(tmp_path)
    doubts = "\n".join(build_report([folder]).summary["doubts"])
    assert "Upcycle, random also learned from the model as it was before training" in doubts
    assert "Equal tokens does not count what predictors were fitted on before training: Upcycle (600)" in doubts
    assert "at equal seconds is not given" not in doubts and "flatters a faster arm" not in doubts
    html = build_report([folder]).html
    assert "Upcycle, random: no thin line" in html
    figure = html[html.index('<figure id="loss-tokens">') :].split("</figure>")[0]
    assert figure.count('<path class="thin') == 2, "the dense arm's alone, on both drawings"


def test_doubts_name_the_teacher_there_was(tmp_path: Path) -> None:
    folder = upcycled(tmp_path)
    told = {"self": "in both modes, the sparse one learning from the dense one", "runs/big": "another model (runs/big)"}
    for teacher, says in told.items():
        method = json.loads((folder / "upcycle" / "run.json").read_text())["method"]
        edit_run(folder / "upcycle", method=method | {"teacher": teacher})
        doubts = "\n".join(build_report([folder]).summary["doubts"])
        assert says in doubts and "random also learned from the model as it was before training" in doubts
        assert "Upcycle, random" not in doubts


def test_lines_of_the_first_stage_are_read(tmp_path: Path) -> None:
    """Killed in it, a run has these lines and settings alone."""
    folder = upcycled(tmp_path)
    assert build_report([folder]).notes == []
    source = folder / "upcycle" / "metrics.jsonl"
    lines = [line for line in source.read_text().splitlines() if '"prepare"' in line]
    source.write_text("\n".join(lines[:6]) + "\n")
    edit_run(folder / "upcycle", insight={}, eval={}, totals={}, status="running")
    block = block_of(folder)
    assert shown(block) == {"fit", "fit-layers", "keep"} and block.sentence.endswith(
        "No held-out loss was measured yet."
    )
    assert len(hovered(block, "fit")["recall"]) == 6
    html = build_report([folder]).html
    assert "what that costs in loss was not measured yet" in html


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (None, ALL),
        (3, ALL),
        ({}, ALL),
        ({"looks": 7, "fits": [5, {"tokens": "x"}]}, ALL),
        ({"looks": [{"step": 1}], "fits": []}, ALL),
        ({"keep": "x", "bank": None, "looks": [{"step": 1, "recall": [0.5, None, "x"]}]}, ALL),
        ({"looks": [{"step": 0, "recall": [0.5, 0.6, 0.7], "random": None}]}, ALL | {"recall"}),
    ],
)
def test_damaged_insights_show_what_is_there(tmp_path: Path, damage: object, expected: set[str]) -> None:
    """Losses come from evaluations, the first stage from its lines, keep from the settings."""
    folder = upcycled(tmp_path)
    edit_run(folder / "upcycle", insight=damage)
    looked = {"recall", "entropy", "dead"}
    kept = {"recall"} if isinstance(damage, dict) and "random" in str(damage) else set()
    assert shown(block_of(folder)) == (expected - looked) | kept
    assert "What does reading less of the model cost?" in build_report([folder]).html


def test_layers_without_a_number_keep_their_place(tmp_path: Path) -> None:
    folder = upcycled(tmp_path)
    insight = json.loads(upcycled_insight())
    insight["looks"][-1]["recall"][1] = None
    edit_run(folder / "upcycle", insight=insight)
    values = insight["looks"][-1]["recall"]
    found = hovered(block_of(folder), "recall")["last look, step 40"]
    assert found == [[1, pytest.approx(values[0], abs=1e-5)], [3, pytest.approx(values[2], abs=1e-5)]]


def test_a_run_that_never_measured_it_sparse(tmp_path: Path) -> None:
    folder = upcycled(tmp_path)
    source = folder / "upcycle" / "metrics.jsonl"
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    source.write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k != "sparse_loss"}) + "\n" for line in lines)
    )
    edit_run(folder / "upcycle", eval={"before": {"loss": 2.0}, "after": {"loss": None}})
    report = build_report([folder])
    assert "sparse it was not measured" in report.html and "was not measured of Upcycle" in report.html
    assert report.summary["arms"][1]["judged"] == "dense"
    row = section_of(folder).bought.rows[1]
    assert [row.cells[i].value for i in (2, 3, 4)] == ["–", f"{END + 0.02:.3f}", "–"]


def test_without_a_companion_and_beside_other_methods(tmp_path: Path) -> None:
    folder = upcycled(tmp_path)
    alone = build_report([folder / "upcycle"])
    assert "Upcycle brought the evaluation loss, computed sparse, from" in alone.summary["headline"]
    block = block_of(folder / "upcycle")
    assert set(hovered(block, "gaps")) == {"to all channels"} and "companion" not in block.sentence
    shutil.copytree(switching(tmp_path) / "ssd", folder / "ssd")
    both = build_report([folder])
    assert 'id="insight-section"' in both.html and 'id="upcycle-section"' in both.html
    assert "all of the model computed; of upcycled arms computed sparse" in both.html
    ssd = next(arm for arm in both.summary["arms"] if arm["arm"] == "ssd")
    assert ssd["judged"] == "dense" and ssd["eval_loss_sparse"]["mean"] == pytest.approx(
        ssd["eval_loss"]["mean"] + 0.0123
    )


def test_seeds_are_one_arm(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"dense-s{seed}", arm=f"dense-s{seed}", seed=seed, steps=UPCYCLE_STEPS)
        upcycled_run(tmp_path / f"upcycle-s{seed}", seed=seed, penalty=0.02 + 0.02 * seed)
    block = block_of(tmp_path)
    assert "a gap of +0.110 nats at equal tokens" in block.sentence and "means over 2 seeds" in block.sentence


def test_other_runs_have_no_section(tmp_path: Path) -> None:
    html = build_report([quickstart(tmp_path)]).html.split("</style>")[1]
    for words in ("upcycle", "Upcycl", "all channels", "served"):
        assert words not in html, words
    run = load([tmp_path / "quickstart" / "sat"]).runs[0]
    assert read(run) is None and not run.served_sparse and len(run.evals) == 1 + STEPS // 20


def test_layers_are_not_drawn_twice_and_texts_are_escaped(tmp_path: Path) -> None:
    folder = upcycled(tmp_path)
    assert "Upcycle: recall" not in build_report([folder]).html
    evil = "</script><img src=x>"
    method = json.loads((folder / "upcycle" / "run.json").read_text())["method"]
    edit_run(folder / "upcycle", method=method | {"predictor": evil, "selection": evil})
    html = build_report([folder]).html
    assert "<img" not in html and html.count("</script>") == html.count("<script")


@needs_browser
@pytest.mark.parametrize(("width", "flags"), [(1280, ()), (500, ("--blink-settings=preferredColorScheme=0",))])
def test_the_section_in_a_real_browser(tmp_path: Path, width: int, flags: tuple[str, ...]) -> None:
    html = build_report([upcycled(tmp_path)]).html
    document, probe, log = open_page(html, tmp_path, width=width, flags=flags)
    assert "What does reading less of the model cost?" in document
    assert probe["page"] <= probe["window"] and probe["colliding"] == 0 and probe["smallest"] > 100, probe
    assert probe["charts"] >= 6 + len(ALL), probe
    assert probe["resources"] == [] and "Uncaught" not in log and "CONSOLE" not in log, log
