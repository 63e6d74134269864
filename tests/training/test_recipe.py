"""Recipes: precedence, coercion, and errors that name the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fallow.errors import ConfigError
from fallow.training.compare import interpolate, resolve_arms, table
from fallow.training.recipe import Recipe, documented_fields
from fallow.training.settings import load_file, parse_flags, resolve

RECIPES = Path(__file__).parents[2] / "recipes"


def test_flags_beat_file_beat_defaults() -> None:
    recipe = resolve({"lr": "3e-4", "steps": 7}, parse_flags(["--steps", "9", "--compile", "--betas", "0.8", "0.9"]))
    assert (recipe.lr, recipe.steps, recipe.compile, recipe.betas) == (3e-4, 9, True, (0.8, 0.9))
    assert recipe.seq_len == 512
    assert resolve({"compile": True}, parse_flags(["--no-compile", "--seed=3"])).compile is False


def test_method_settings_stand_at_the_same_level() -> None:
    recipe = resolve({"method": "sat", "omit": 0.3, "seed": 5, "dense_tokens": "loss"}, {"ladder": 0})
    assert recipe.method_settings == {"omit": 0.3, "seed": 5, "dense_tokens": "loss", "ladder": 0}
    summary = recipe.method_summary()
    assert summary is not None and summary["name"] == "sat" and summary["omit"] == 0.3 and summary["heads"] == 0.0
    assert resolve({}, {}).method_summary() is None


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        ({"batchsize": 4}, {}, "unknown setting 'batchsize'; did you mean 'batch_size'?"),
        ({"method": "sta"}, {}, "unknown method 'sta'; did you mean 'sat'?"),
        ({"omit": 0.5}, {}, r"unknown setting 'omit' \(method: none\)"),
        ({"method": "sat", "omit": 1.0}, {}, "omit=1.0 must be a rate with 0 <= omit < 1"),
        ({"method": "sat", "omit": "half"}, {}, "omit: 'half' must be of type float"),
        ({"steps": 2.5}, {}, "steps: 2.5 must be of type int"),
        ({"steps": 0}, {}, "steps=0 must be at least 1"),
        ({"task": "rl"}, {}, "task: 'rl' is not one of clm, sft"),
        ({"name": "a/b"}, {}, "name 'a/b' must be usable as a folder name"),
        ({"eval_fraction": 1.0}, {}, "eval_fraction=1.0 must lie between 0 and 1"),
        ({}, {"setps": 3}, "did you mean 'steps'"),
    ],
)
def test_bad_settings_name_the_mend(file: dict[str, Any], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(file, flags)


def test_arms_share_what_fits_them() -> None:
    file = {"steps": 10, "omit": 0.3, "arms": {"dense": None, "sat": {"method": "sat", "steps": 5}}}
    arms = resolve_arms(file, {"lr": 1e-3})
    assert arms["dense"].method_settings == {} and arms["dense"].steps == 10
    assert arms["sat"].method_settings == {"omit": 0.3} and arms["sat"].steps == 5
    assert arms["dense"].lr == arms["sat"].lr == 1e-3
    with pytest.raises(ConfigError, match=r"arm dense: unknown setting 'omit' \(method: none\)"):
        resolve_arms({"arms": {"dense": {"omit": 0.3}, "sat": {"method": "sat"}}}, {})
    with pytest.raises(ConfigError, match="unknown setting 'omitt'; did you mean 'omit'"):
        resolve_arms({"omitt": 0.3, "arms": {"dense": None, "sat": {"method": "sat"}}}, {})


def test_equal_seconds_needs_an_arm_to_time_and_one_to_match() -> None:
    good = {"arms": {"short": {"equal_seconds_to": "sat"}, "dense": None, "sat": {"method": "sat"}}}
    assert list(resolve_arms(good, {})) == ["short", "dense", "sat"]
    with pytest.raises(ConfigError, match="no other arm 'sta'; did you mean 'sat'"):
        resolve_arms({"arms": {"dense": None, "sat": {"method": "sat"}, "x": {"equal_seconds_to": "sta"}}}, {})
    with pytest.raises(ConfigError, match="needs another arm with the same settings"):
        resolve_arms({"arms": {"sat": {"method": "sat"}, "x": {"equal_seconds_to": "sat"}}}, {})


def test_missing_or_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_file(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_file(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_file(tmp_path / "list.yaml")


def test_every_field_is_documented() -> None:
    documented = {name: doc for name, _, doc in documented_fields()}
    assert {"model", "seq_len", "arms", "equal_seconds_to"} <= documented.keys()
    assert all(len(doc) > 15 for doc in documented.values())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_resolve(path: Path) -> None:
    file = yaml.safe_load(path.read_text())
    recipes = resolve_arms(file, {}).values() if file.get("arms") else [resolve(file, {})]
    assert all(r.name == path.stem for r in recipes)


def test_loss_between_measured_points() -> None:
    curve = [(0.0, 4.0), (10.0, 3.0), (20.0, 2.0)]
    assert interpolate(curve, 5.0) == 3.5
    assert interpolate(curve, 10.0) == 3.0
    assert interpolate(curve, 20.0) == 2.0
    assert interpolate(curve, 20.1) is None


def test_table_of_gaps() -> None:
    def record(tokens: int, seconds: float, rate: float, loss: float) -> dict[str, Any]:
        totals = {"tokens": tokens, "train_seconds": seconds, "tokens_per_second": rate}
        return {"totals": totals, "eval": {"after": {"loss": loss}}}

    records = {
        "dense": record(100, 20.0, 5.0, 2.0),
        "sat": record(100, 15.0, 7.5, 2.3),
        "few": record(50, 25.0, 5.0, 2.9),
    }
    curves = {"dense": [(0.0, 4.0), (10.0, 3.0), (20.0, 2.0)], "sat": [], "few": []}
    result = table("r", records, curves, "dense")
    dense, sat, few = result["rows"]
    assert dense["loss_gap_equal_tokens"] == dense["loss_gap_equal_seconds"] == 0.0
    assert sat["speedup_tokens_per_second"] == 1.5
    assert sat["loss_gap_equal_tokens"] == pytest.approx(0.3)
    assert sat["loss_gap_equal_seconds"] == pytest.approx(2.3 - 2.5)
    assert few["loss_gap_equal_tokens"] is None and few["loss_gap_equal_seconds"] is None


def test_a_name_that_run_and_method_share_goes_by_its_value():
    file = {"train_data": ["x"], "arms": {"dense": {"method": "none"}, "ssd": {"method": "ssd", "schedule": "fixed"}}}
    found = {arm: resolve(file | {"schedule": "linear"}, {}, arm=arm) for arm in file["arms"]}
    assert [r.schedule for r in found.values()] == ["linear", "linear"]
    assert found["ssd"].method_settings == {"schedule": "fixed"}
    shared = resolve(file | {"schedule": "always_sparse"}, {}, arm="dense")
    assert (shared.schedule, shared.method_settings) == (Recipe().schedule, {})
    with pytest.raises(ConfigError, match=r"'cosin' is neither the run's \(constant, .* nor ssd's \(adaptive, "):
        resolve({"train_data": ["x"], "method": "ssd", "schedule": "cosin"}, {})
    with pytest.raises(ConfigError, match="'fixed' is not one of constant, linear, cosine"):
        resolve({"train_data": ["x"], "schedule": "fixed"}, {})


def test_a_tuple_of_any_length_is_read_from_a_list():
    assert resolve({"train_data": ["x"], "method": "ssd", "active": [4, 2, 1]}, {}).method_settings["active"] == (
        4,
        2,
        1,
    )
