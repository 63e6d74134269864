"""The arithmetic of the collated experiments, by numbers worked out by hand, and that figures come from JSON alone."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from fallow.errors import ConfigError, DataError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import sat_charts as charts  # noqa: E402
import sat_collate as collated  # noqa: E402
import sat_experiments as experiments  # noqa: E402
import sat_figures as figures  # noqa: E402

SAT = {"name": "sat", "omit": 0.5, "heads": 0.5}


def write_run(
    folder: Path,
    arm: str,
    seed: int,
    losses: list[float],
    *,
    seconds: float,
    steps: int = 100,
    method: dict[str, Any] | None = None,
    status: str = "finished",
) -> None:
    """A run with evaluations at equal distances; 2,048 tokens a step."""
    run = folder / f"{arm}-s{seed}"
    run.mkdir(parents=True)
    parts = len(losses) - 1
    lines: list[dict[str, Any]] = [
        {"kind": "eval", "step": steps * i // parts, "tokens": 2048 * steps * i // parts,
         "seconds": seconds * i / parts, "loss": loss}
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    lines += [
        {"kind": "train", "step": i, "tokens": 2048 * i, "seconds": seconds * i / steps, "loss": 3.0}
        for i in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {"seed": seed, "steps": steps, "batch_size": 4, "seq_len": 512, "accumulate": 1, "lr": 1e-4}
    recipe |= {"schedule": "cosine", "train_data": ["somewhere.txt"]}
    info = {
        "arm": run.name,
        "status": status,
        "recipe": recipe,
        "method": method,
        "data": {"train_tokens": 5000, "files": ["somewhere.txt"]},
        "machine": {"cpu": "Some CPU", "threads": 2, "memory_gb": 8.0},
        "versions": {"torch": "2.13.0"},
        "precision": {"dtype": "bfloat16"},
        "totals": {"steps": steps, "tokens": 2048 * steps, "train_seconds": seconds, "peak_memory_mb": 2048.0},
        "eval": {"before": {"loss": losses[0]}, "after": {"loss": losses[-1]}},
        "time": {"forward": seconds / 3},
    }
    (run / "run.json").write_text(json.dumps(info))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Dense at 1 s a step; sat-50 at 0.6 and 0.65 s; a dense run of sat-50's length; an arm of 0.8 s a step."""
    folder = tmp_path / "sat-cpt"
    for seed, off in ((0, 0.0), (1, 0.02)):
        write_run(folder, "dense", seed, [3.0, 2.8 + off, 2.6 + off, 2.4 + off, 2.3 + off, 2.2 + off], seconds=100.0)
        sat = 60.0 if seed == 0 else 65.0
        ends = 2.25 if seed == 0 else 2.30
        write_run(folder, "sat-50", seed, [3.0, 2.5, ends], seconds=sat, method=SAT)
        write_run(folder, "dense-short", seed, [3.0, 2.6, 2.28], seconds=sat - 1, steps=60)
    write_run(folder, "backward-75", 0, [3.0, 2.5, 2.27], seconds=80.0, method=SAT | {"omit_in": "backward"})
    write_run(folder, "uniform-50", 0, [3.0, 2.9], seconds=30.0, method=SAT, status="running")
    return folder


def rows(runs: Path) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in collated.collate("sat-cpt", runs)["summary"]}


def test_ratio_and_time_are_paired_by_seed(runs: Path) -> None:
    sat = rows(runs)["sat-50"]
    assert sat["seeds"] == [0, 1]
    assert sat["ratio"]["values"] == pytest.approx([100 / 60, 100 / 65])
    assert sat["ratio"]["mean"] == pytest.approx(1.602564, abs=1e-5)
    assert sat["less_time_percent"]["values"] == pytest.approx([40.0, 35.0])
    assert (sat["less_time_percent"]["low"], sat["less_time_percent"]["high"]) == pytest.approx((35.0, 40.0))
    assert sat["tokens_per_second"]["values"] == pytest.approx([204800 / 60, 204800 / 65])
    assert sat["peak_memory_mb"]["mean"] == 2048.0


def test_gaps_at_equal_tokens_and_seconds(runs: Path) -> None:
    found = rows(runs)
    sat, short, back = found["sat-50"], found["dense-short"], found["backward-75"]
    assert sat["eval_loss"].pop("values") == [2.25, 2.30]
    assert sat["eval_loss"] == pytest.approx({"mean": 2.275, "low": 2.25, "high": 2.30})
    assert sat["gap_equal_tokens"]["values"] == pytest.approx([0.05, 0.08]), "2.30 against seed 1's 2.22"
    # Seed 0: dense-short ends at 59 s, 2.28; at 60 s the line to (100 s, 2.2) stands at 2.28 - 0.08 * 1 / 41.
    assert sat["gap_equal_seconds"]["values"][0] == pytest.approx(2.25 - (2.28 - 0.08 / 41))
    assert sat["gap_equal_seconds_against"] == ["complete dense runs"]
    assert short["gap_equal_tokens"] is None, "it has read fewer tokens"
    assert short["ratio"]["values"][0] == pytest.approx((60 / 59) / (100 / 100))
    # At 80 s dense's own curve stands at 2.3; the line between the complete dense runs (59 s, 2.28) and (100 s, 2.2)
    # at 2.28 - 0.08 * 21 / 41 = 2.23902, which is lower and so the honest rival.
    assert back["gap_equal_seconds"]["mean"] == pytest.approx(2.27 - 2.23902, abs=1e-5)
    assert back["gap_equal_seconds_against"] == ["complete dense runs"]
    assert found["dense"]["ratio"] is None and found["dense"]["gap_equal_tokens"] is None


def test_without_a_short_dense_run_the_dense_curve_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "sat-cpt"
    write_run(folder, "dense", 0, [3.0, 2.8, 2.6, 2.4, 2.3, 2.2], seconds=100.0)
    write_run(folder, "sat-50", 0, [3.0, 2.25], seconds=70.0, method=SAT)
    write_run(folder, "sat-70", 0, [3.0, 2.25], seconds=120.0, method=SAT)
    found = rows(folder)
    assert found["sat-50"]["gap_equal_seconds"]["mean"] == pytest.approx(2.25 - 2.35)
    assert found["sat-50"]["gap_equal_seconds_against"] == ["dense curve"]
    assert found["sat-70"]["gap_equal_seconds"] is None, "dense was not run for that long"


def test_seconds_are_those_of_the_interleaved_pace_where_it_was_timed(runs: Path) -> None:
    """0.9 s dense and 0.5 s at the full rate: sat-50 has 80 full steps, then 5 each at 3/4, 1/2, 1/4 and none of it."""
    ladder = SAT | {"ladder": 4, "dense_share": 0.05}
    write_run(runs, "late-25", 0, [3.0, 2.4, 2.24], seconds=90.0, method=ladder)
    forms = {"dense": 900, "sat-50": 500, "backward-75": 700, "late-25": 500}
    pace = {"forms": {name: {"ms_per_step": ms, "ratio": 900 / ms} for name, ms in forms.items()}}
    (runs / "pace.json").write_text(json.dumps(pace))
    result = collated.collate("sat-cpt", runs)
    found = {(r["arm"], r["seed"]): r["totals"] for r in result["runs"]}
    assert result["clock"] == "interleaved"
    assert found["dense", 0]["train_seconds"] == pytest.approx(90.0)
    assert found["dense", 0]["wall_seconds"] == 100.0
    assert found["dense-short", 1]["train_seconds"] == pytest.approx(54.0)
    assert found["sat-50", 1]["train_seconds"] == pytest.approx(50.0), "no ladder in its method"
    assert found["late-25", 0]["train_seconds"] == pytest.approx(80 * 0.5 + 5 * (0.6 + 0.7 + 0.8 + 0.9))
    halfway = next(r for r in result["runs"] if r["arm"] == "late-25")["curve"][1]
    assert (halfway["step"], halfway["seconds"]) == (50, 25.0)
    row = next(row for row in result["summary"] if row["arm"] == "late-25")
    assert row["ratio"]["mean"] == pytest.approx(90 / 55) and row["wall_ratio"]["mean"] == pytest.approx(100 / 90)
    del forms["late-25"]
    pace = {"forms": {name: {"ms_per_step": ms, "ratio": 900 / ms} for name, ms in forms.items()}}
    (runs / "pace.json").write_text(json.dumps(pace))
    assert collated.collate("sat-cpt", runs)["clock"] == "wall", "one clock for all"


def test_collated_runs_hold_curves_and_no_unfinished_one(runs: Path) -> None:
    result = collated.collate("sat-cpt", runs)
    assert [(r["arm"], r["seed"]) for r in result["runs"]] == [
        ("dense", 0), ("dense", 1), ("sat-50", 0), ("sat-50", 1), ("backward-75", 0), ("dense-short", 0),
        ("dense-short", 1),
    ]  # fmt: skip
    first = result["runs"][0]
    assert first["curve"][2] == {"step": 40, "tokens": 81920, "seconds": 40.0, "loss": 2.6}
    assert len(first["train_curve"]) == collated.CURVE_POINTS
    assert "somewhere" not in json.dumps(result), "paths of one machine stay there"
    with pytest.raises(DataError, match="no run is finished"):
        unfinished = runs.parent / "other"
        write_run(unfinished, "dense", 0, [3.0, 2.9], seconds=30.0, status="running")
        collated.collate("sat-cpt", unfinished)


@pytest.mark.parametrize("name", ["sat-cpt", "sat-sft"])
def test_recipes_resolve_into_arms_per_seed(name: str) -> None:
    from fallow.training.compare import resolve_arms
    from fallow.training.settings import load_file

    recipe = load_file(BENCHMARKS / "recipes" / f"{name}.yaml")
    assert list(resolve_arms(recipe, {})) == list(recipe["arms"]), "fallow compare runs it too"
    files = experiments.one_at_a_time(recipe, 3, None, "data", backwards=False)
    resolved = [resolve_arms(file, {}) for file in files]
    assert [list(arms) for arms in resolved] == [[f"{arm}-s3"] for arm in recipe["arms"]]
    sat = resolved[list(recipe["arms"]).index("sat-50")]["sat-50-s3"]
    assert (sat.seed, sat.steps, sat.method_settings["seed"], sat.method_settings["lazy"]) == (
        3,
        recipe["steps"],
        3,
        False,
    )
    assert [Path(p).name for p in sat.train_data] == [Path(p).name for p in recipe["train_data"]]
    lengths = [next(iter(arms.values())).steps for arms in resolved if next(iter(arms)).startswith("dense")]
    assert lengths[0] == recipe["steps"] and len(lengths) >= 3, "a front of complete dense runs"
    backwards = experiments.one_at_a_time(recipe, 3, ["uniform-50"], None, backwards=True)
    assert [list(file["arms"])[-1] for file in backwards] == ["uniform-50-s3", "dense-s3"]
    with pytest.raises(ConfigError, match="no arm sat-99"):
        experiments.one_at_a_time(recipe, 3, ["sat-99"], None, backwards=False)


BENCH = {
    "bench": "sat",
    "machine": {"cpu": "Some CPU", "threads": 2, "memory_gb": 8.0},
    "gate": "passed",
    "rows": [
        {"case": "1b-layer", "omit_in": "forward+backward", "omit": 0.5, "heads": 0.5, "tokens": 2048,
         "dense_ms": 400.0, "sparse_ms": 250.0, "sparse_form": "sparse/compiled",
         "ratio": 1.6, "ideal": 1.9, "efficiency": 1.6 / 1.9, "selection_share": 0.011, "dense_form": "dense/sdpa"},
    ],
    "break_even": {"1b-layer": 0.06},
}  # fmt: skip
PAGE = "".join(f"prose of {n}\n<!-- table: {n} -->\nold\n<!-- end -->\n" for n in ("bench", "cpt", "sft"))


def test_page_and_figures_come_from_the_json(runs: Path, tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "docs" / "sat.md"
    results.mkdir()
    page.parent.mkdir()
    page.write_text(PAGE)
    (results / "sat-bench.json").write_text(json.dumps(BENCH))
    (results / "sat-cpt.json").write_text(json.dumps(collated.collate("sat-cpt", runs)))
    figures.make(results, page)
    text = page.read_text()
    assert "old" not in text and all(f"prose of {n}" in text for n in ("bench", "cpt", "sft"))
    assert "| 400 | 250 | **1.60×** | 1.90× | 84% | 1.1% | sdpa | compiled |" in text
    assert re.search(r"\| sat-50 \| 2 \| 2\.2750 \[2\.2500 … 2\.3000\] \| \+0\.0650 \[\+0\.0500 … \+0\.0800\]", text)
    assert "sat_experiments.py sft --seeds 0 1` makes `benchmarks/results/sat-sft.json`" in text
    drawn = {path.stem: path.read_text() for path in (page.parent / "figures").iterdir()}
    assert set(drawn) == {"sat-bench", "sat-cpt-seconds", "sat-cpt-tokens", "sat-cpt-front"}
    for source in drawn.values():
        ET.fromstring(source)
    labels = {e.text for e in ET.fromstring(drawn["sat-cpt-front"]).iter() if e.get("class", "").startswith("label")}
    assert labels == {"dense", "sat-50", "backward-75", "dense-short"}
    figures.make(results, page)
    assert page.read_text() == text, "a second time changes nothing"


def test_mean_curve_averages_seeds_at_equal_shares(runs: Path) -> None:
    sat = [r for r in collated.collate("sat-cpt", runs)["runs"] if r["arm"] == "sat-50"]
    line = charts.mean_curve(sat, "seconds", 1)
    assert line.points == [pytest.approx(p) for p in ((0.0, 3.0), (31.25, 2.5), (62.5, 2.275))]
    assert (line.low[-1], line.high[-1]) == (2.25, 2.30)


def test_a_page_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="table: cpt"):
        figures.fill("no markers here", "cpt", "block")
