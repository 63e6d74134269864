"""The report's figures against losses and rates known in closed form, and its verdicts on wins, losses and draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from report_folders import SAT, STEPS, TOKENS_PER_STEP, dense_loss, quickstart, write_compare, write_run

from fallow.errors import DataError
from fallow.report import build_report
from fallow.report.analysis import compare, interpolate
from fallow.report.figures import pooled
from fallow.report.loading import load
from fallow.report.svg import smooth, spread_labels, thin_out, tick_text, ticks

TOTAL = STEPS * TOKENS_PER_STEP


def arm_of(summary: dict, name: str) -> dict:
    return next(arm for arm in summary["arms"] if arm["arm"] == name)


def test_gaps_at_equal_tokens_and_at_equal_seconds(tmp_path: Path) -> None:
    """SAT ends 0.021 behind; dense had by then read 1/1.38 of its text, between its evaluations at steps 80 and 100."""
    sat = arm_of(build_report([quickstart(tmp_path)]).summary, "sat")
    assert sat["speedup_tokens_per_second"]["mean"] == pytest.approx(1.38, abs=1e-6)
    assert sat["loss_gap_equal_tokens"]["mean"] == pytest.approx(0.021, abs=1e-9)
    share = (STEPS / 1.38 - 80) / 20
    a, b = (dense_loss(step * TOKENS_PER_STEP) for step in (80, 100))
    dense_then = a + share * (b - a)
    assert sat["loss_gap_equal_seconds"]["mean"] == pytest.approx(dense_loss(TOTAL) + 0.021 - dense_then, abs=1e-6)
    assert sat["train_seconds"]["mean"] == pytest.approx(TOTAL / 579.6)


@pytest.mark.parametrize(
    ("penalty", "rate", "outcome", "words"),
    [
        (0.021, 579.6, "won", "reached a lower loss than dense"),
        (0.2, 579.6, "lost", "Sparsity lost: SAT ran 1.38× as fast, yet dense learned more"),
        (0.05, 400.0, "lost", "Sparsity lost: SAT was no faster"),
        (0.001, 420.0, "draw", "A draw"),
    ],
)
def test_the_headline_says_who_won(tmp_path: Path, penalty: float, rate: float, outcome: str, words: str) -> None:
    summary = build_report([quickstart(tmp_path, penalty=penalty, rate=rate)]).summary
    assert summary["outcome"] == outcome
    assert words in summary["headline"]
    assert f"{rate / 420:.2f}× as many tokens per second" in summary["detail"]


def test_seeds_are_one_arm_with_mean_and_range(tmp_path: Path) -> None:
    for seed, extra in ((0, 0.0), (1, 0.01), (2, 0.05)):
        write_run(tmp_path / f"dense-s{seed}", arm=f"dense-s{seed}", seed=seed, penalty=extra)
        write_run(tmp_path / f"sat-s{seed}", arm=f"sat-s{seed}", seed=seed, method=SAT, penalty=0.03 + 2 * extra)
    write_compare(tmp_path, [f"{m}-s{s}" for s in range(3) for m in ("dense", "sat")], baseline="dense-s0")
    summary = build_report([tmp_path]).summary
    assert [arm["arm"] for arm in summary["arms"]] == ["dense", "sat"]
    found = arm_of(summary, "sat")["loss_gap_equal_tokens"]
    assert found == pytest.approx({"mean": 0.05, "low": 0.03, "high": 0.08, "runs": 3}, abs=1e-9)
    assert summary["baseline"] == "dense"


def test_equal_settings_and_other_seeds_are_one_arm_without_a_suffix(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{seed}" / "dense", arm="dense", seed=seed) for seed in (3, 4)]
    runs.append(write_run(tmp_path / "short" / "dense", arm="dense", seed=5, steps=60))
    arms = compare(load(runs)).arms
    assert [len(arm.runs) for arm in arms] == [2, 1]
    assert len({arm.name for arm in arms}) == 2, "two arms of one name must be told apart on the page"


def test_repeats_of_other_lengths_keep_their_common_steps_and_their_ends(tmp_path: Path) -> None:
    runs = load([write_run(tmp_path / f"d-s{i}", arm=f"d-s{i}", seed=i, steps=87 + i) for i in (0, 1)]).runs
    points, low, high = pooled(runs, "evals", "tokens", lambda _, line: line["loss"])
    assert [x / TOKENS_PER_STEP for x, _ in points] == [0, 20, 40, 60, 80, 87.5]
    assert high[-1] - low[-1] == pytest.approx(dense_loss(87 * TOKENS_PER_STEP) - dense_loss(88 * TOKENS_PER_STEP))


def test_seeds_that_disagree_about_the_sign_are_a_draw(tmp_path: Path) -> None:
    for seed, penalty in ((0, 0.05), (1, -0.06)):
        write_run(tmp_path / f"dense-s{seed}", arm=f"dense-s{seed}", seed=seed)
        write_run(tmp_path / f"sat-s{seed}", arm=f"sat-s{seed}", seed=seed, method=SAT, rate=420.0, penalty=penalty)
    assert build_report([tmp_path]).summary["outcome"] == "draw"


def test_a_dense_run_planned_for_the_same_seconds_decides(tmp_path: Path) -> None:
    """It ends lower than the long dense run's curve at that second, so it turns this win into a loss."""
    folder = quickstart(tmp_path)
    control = write_run(folder / "dense-short", arm="dense-short", steps=87, penalty=-0.08)
    info = json.loads((control / "run.json").read_text())
    info["recipe"]["equal_seconds_to"] = "sat"
    (control / "run.json").write_text(json.dumps(info))
    summary = build_report([write_compare(folder, ["dense", "dense-short", "sat"])]).summary
    sat = arm_of(summary, "sat")
    assert sat["equal_seconds_control"] == "dense-short"
    last = [json.loads(line) for line in (control / "metrics.jsonl").read_text().splitlines() if '"eval"' in line][-1]
    after = info["eval"]["after"]["loss"]
    assert last["step"] < 87 and after == pytest.approx(dense_loss(87 * TOKENS_PER_STEP) - 0.08)
    assert sat["loss_gap_equal_seconds"]["mean"] == pytest.approx(dense_loss(TOTAL) + 0.021 - after, abs=1e-9)
    assert summary["outcome"] == "lost"
    assert not any("flatters" in doubt for doubt in summary["doubts"])


def test_no_loss_is_read_off_a_line_that_spans_the_run(tmp_path: Path) -> None:
    """With evaluations before and after only, the straight line lies far above the curve and would flatter SAT."""
    folder = quickstart(tmp_path)
    for arm in ("dense", "sat"):
        source = folder / arm / "metrics.jsonl"
        lines = source.read_text().splitlines()
        source.write_text("\n".join(line for line in lines if '"kind": "eval"' not in line or '"step": 0,' in line))
    summary = build_report([folder]).summary
    sat = arm_of(summary, "sat")
    assert sat["loss_gap_equal_tokens"]["mean"] == pytest.approx(0.021, abs=1e-9)
    assert sat["loss_gap_equal_seconds"] is None
    assert summary["outcome"] == "open"
    assert any("eval_every" in doubt for doubt in summary["doubts"])


def test_an_interrupted_run_is_compared_where_it_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    write_run(folder / "dense", arm="dense")
    write_run(folder / "sat", arm="sat", method=SAT, penalty=0.06, stop_at=65, status="interrupted")
    summary = build_report([folder]).summary
    sat = arm_of(summary, "sat")
    assert sat["status"] == "interrupted"
    assert sat["loss_gap_equal_tokens"]["mean"] == pytest.approx(0.06 * 60 / STEPS, abs=1e-9)
    assert sat["tokens"]["mean"] == 65 * TOKENS_PER_STEP
    assert any("interrupted" in doubt for doubt in summary["doubts"])
    assert "never reached" not in summary["detail"]


def test_other_machines_and_early_learning_rates_are_held_against_it(tmp_path: Path) -> None:
    folder = quickstart(tmp_path)
    source = folder / "sat" / "run.json"
    source.write_text(source.read_text().replace("AMD EPYC 9V74", "another"))
    doubts = " ".join(build_report([folder]).summary["doubts"])
    assert "differ in their machine" in doubts
    assert "still at learning rate" in doubts


def test_dense_arms_of_one_step_at_two_speeds_are_held_against_it(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    write_run(folder / "dense", arm="dense", rate=400.0)
    write_run(folder / "sat", arm="sat", method=SAT, rate=480.0)
    short = write_run(folder / "dense-short", arm="dense-short", steps=87, rate=410.0)
    assert "take the same step" not in " ".join(build_report([folder]).summary["doubts"])
    shutil.rmtree(short)
    write_run(short, arm="dense-short", steps=87, rate=500.0)
    doubts = " ".join(build_report([folder]).summary["doubts"])
    assert "dense and dense-short take the same step, yet ran at 400 and 500 tokens/s" in doubts
    assert "moved by 25%" in doubts


def test_no_verdict_falls_where_the_machine_was_busy(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    write_run(folder / "dense", arm="dense", rate=400.0)
    write_run(folder / "sat", arm="sat", method=SAT, rate=900.0, penalty=-0.05)
    short = write_run(folder / "dense-short", arm="dense-short", steps=87, rate=410.0)
    assert build_report([folder]).summary["outcome"] == "won"
    shutil.rmtree(short)
    write_run(short, arm="dense-short", steps=87, rate=700.0)
    report = build_report([folder])
    assert report.summary["outcome"] == "open"
    assert report.summary["headline"].startswith("No verdict: the machine’s pace moved by 75% between arms.")
    assert "reached a lower loss than" not in report.html and ">won<" not in report.html


def test_damaged_files_become_notes(tmp_path: Path) -> None:
    folder = quickstart(tmp_path)
    with (folder / "sat" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 7}\n[1]\n\xff\xfe\n{"kind": "train", "step": 500, "loss": NaN, "tok')
    (folder / "dense" / "run.json").write_text('{"arm": "dense", "status": "runn')
    write_compare(folder, ["dense", "sat", "gone"])
    report = build_report([folder])
    assert len(report.notes) == 3
    assert any("gone" in note for note in report.notes)
    assert any("4 lines could not be read" in note for note in report.notes)
    assert all(note.split(":")[0] in report.html for note in report.notes)
    assert arm_of(report.summary, "sat")["loss_gap_equal_tokens"]["mean"] == pytest.approx(0.021, abs=1e-9)


@pytest.mark.parametrize("damage", [b"", b"\x00\xff", b"[]", b'{"time": 3, "recipe": [], "machine": "x", "eval": 1}'])
def test_any_damage_still_gives_a_page(tmp_path: Path, damage: bytes) -> None:
    folder = quickstart(tmp_path)
    for path in sorted(folder.rglob("*.json*")):
        before = path.read_bytes()
        path.write_bytes(damage)
        assert "</html>" in build_report([folder]).html
        path.write_bytes(before)
        path.write_bytes(before[: len(before) // 2])
        assert "</html>" in build_report([folder]).html
        path.write_bytes(before)


def test_a_step_done_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "dense", arm="dense")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-20], *lines[-40:]]) + "\n")
    run = load([folder]).runs[0]
    assert [line["step"] for line in run.train] == list(range(1, STEPS + 1))


def test_nothing_to_report_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"looked for run\.json, metrics\.jsonl, compare\.json"):
        build_report([tmp_path])
    with pytest.raises(DataError, match="is no folder"):
        build_report([tmp_path / "absent"])
    with pytest.raises(DataError, match="no run given"):
        build_report([])


def test_interpolate_refuses_what_it_cannot_read() -> None:
    points = [(0.0, 4.0), (1.0, 3.0), (10.0, 1.0)]
    assert interpolate(points, 0.5) == pytest.approx(3.5)
    assert interpolate(points, 10.0, widest=0.1) == 1.0
    assert interpolate(points, 5.0, widest=0.5) is None
    assert interpolate(points, 11.0) is None


def test_drawing_primitives() -> None:
    assert ticks(0.03, 0.99, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [tick_text(v, 0.25) for v in (0.25, -0.5, 0.0)] == ["0.25", "\N{MINUS SIGN}0.50", "0.00"]
    places = spread_labels([100, 101, 20, 300], apart=15, low=10, high=250)
    assert sorted(places) == [places[2], places[0], places[1], places[3]]
    assert min(b - a for a, b in zip(sorted(places), sorted(places)[1:], strict=False)) >= 15 and max(places) <= 250
    line = [(float(x), float(x % 2)) for x in range(1000)]
    thin = thin_out(smooth(line, 50), 100)
    assert len(thin) == 100 and thin[0][0] == 0 and thin[-1][0] == 999
    assert all(abs(y - 0.5) < 0.05 for _, y in thin)
