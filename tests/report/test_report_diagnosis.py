"""The section on a diagnosis: what it draws comes from the JSON, on a page of its own and inside a run's report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_folders import quickstart
from test_report_page import needs_browser, open_page
from tests.evaluation.planted import answers_of, plant, sound
from tests.evaluation.subjects import subject

from fallow.evaluation.diagnosis import diagnose_answers
from fallow.report import build_report
from fallow.report.diagnosis import block, write_page

PLACE = 2


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    made = sound("bilinear")
    answers = answers_of(made, count=8, lengths=(24, 32), task="drawn <b>")
    plant(made.sparsity.layers[PLACE], seed=1)
    return json.loads(json.dumps(diagnose_answers(made, answers, most=16)))


def test_the_maps_show_every_layer_at_every_length(found) -> None:
    made = block(found, {}, label="tiny")
    assert [figure.key for figure in made.maps] == ["diagnosis-restore", "diagnosis-mirror"]
    for name, figure in zip(("restore", "mirror"), made.maps, strict=True):
        told = re.findall(r"<title>layer (\d+), (\d+) tokens: ([+-][\d.]+) nats</title>", figure.body)
        assert len(told) == 8
        for layer, length, value in told:
            assert float(value) == pytest.approx(found["sweep"]["by_length"][length][name][int(layer)], abs=1e-4)
        shades = [float(v) for v in re.findall(r'fill-opacity="([\d.]+)"', figure.body)]
        assert max(shades) <= 1 and shades.index(max(shades)) % 4 == PLACE
        assert f"Layer {PLACE} leads" in figure.caption
    assert made.causes and made.gaps and len(made.gaps.rows) == 2 and made.layers and len(made.layers.rows) == 4


def test_a_page_of_its_own_is_whole_and_escapes_what_it_was_given(found, tmp_path) -> None:
    html = write_page(found, tmp_path / "d" / "diagnosis.html").read_text()
    assert found["verdict"] in html.replace("&#39;", "'") and html.count('<svg class="map"') == 2
    assert "drawn &lt;b&gt;" in html and "drawn <b>" not in html
    assert not re.search(r'(?:src|href)="https?:', html)


def test_a_sound_models_page_says_so(tmp_path) -> None:
    made = subject(keep=16)
    result = diagnose_answers(made, answers_of(made, count=6, lengths=(24,)), most=6)
    html = write_page(result, tmp_path / "diagnosis.html").read_text()
    assert "nothing to repair" in html and '<svg class="map"' not in html


def test_a_run_with_a_diagnosis_shows_it_in_its_report(found, tmp_path: Path) -> None:
    folder = quickstart(tmp_path)
    arm = folder / "sat"
    assert "diagnosis-section" not in build_report([folder]).html
    (arm / "diagnosis.json").write_text(json.dumps(found))
    (arm / "repair.json").write_text(
        json.dumps(
            {
                "summary": "Layer 2 was mended.",
                "tries": [{"what": "keep 6", "recovered": 0.4, "outcome": "no", "reason": "below 80%"}],
            }
        )
    )
    html = build_report([folder]).html
    assert html.count('id="diagnosis-section"') == 1 and "Layer 2 was mended." in html and "below 80%" in html
    (arm / "diagnosis.json").write_text("{ broken")
    assert "Layer 2 was mended." in build_report([folder]).html


@needs_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_it_fits_a_screen_and_a_phone(found, tmp_path, width) -> None:
    folder = quickstart(tmp_path)
    (folder / "sat" / "diagnosis.json").write_text(json.dumps(found))
    document, probe, log = open_page(build_report([folder]).html, tmp_path, width=width)
    assert "What does a dense layer bring back?" in document and "Uncaught" not in log
    assert probe["page"] <= probe["window"] and probe["widest"] <= probe["window"] and probe["smallest"] > 80, probe
