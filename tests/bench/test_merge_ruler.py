"""Merging RULER's parts gives what one evaluation would have written, and refuses parts of different models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import merge_ruler

from fallow.evaluation.ruler import Scores, as_dict

CELLS = {("ruler_vt", 1024): [0.2, 0.6], ("niah_single_1", 1024): [1.0, 0.0]}


def _part(folder: Path, task: str, model: str = "a") -> str:
    scores = as_dict(Scores(mode="sparse", cells={c: v for c, v in CELLS.items() if c[0] == task}))
    written = {"model": model, "modes": ["sparse"], "seed": 0, "ruler": {"sparse": scores}, "seconds": 2, "machine": {}}
    path = folder / f"{task}-{model}.json"
    path.write_text(json.dumps(written))
    return str(path)


def test_parts_become_the_whole(tmp_path, capsys):
    whole = tmp_path / "whole.json"
    parts = [_part(tmp_path, task) for task in ("niah_single_1", "ruler_vt")]
    assert merge_ruler.main([str(whole), *parts]) == 0
    found = json.loads(whole.read_text())
    assert found["ruler"]["sparse"] == as_dict(Scores(mode="sparse", cells=CELLS)) and found["seconds"] == 4
    assert "'sparse': 45.0" in capsys.readouterr().out


def test_parts_that_do_not_belong_together(tmp_path, capsys):
    whole, one = tmp_path / "whole.json", _part(tmp_path, "ruler_vt")
    assert merge_ruler.main([str(whole), one, _part(tmp_path, "niah_single_1", "b")]) == 1
    assert merge_ruler.main([str(whole), one, one]) == 1
    said = capsys.readouterr().err
    assert "differ in 'model'" in said and "ruler_vt at 1024 tokens is there twice" in said and not whole.exists()
