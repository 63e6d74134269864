"""A fault planted in one layer's predictor: both sweeps name the layer, the cause is found, nothing is changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fallow.errors import ConfigError
from fallow.evaluation import causes, diagnosis, sweeps
from tests.evaluation.planted import answers_of, plant, sound
from tests.evaluation.subjects import subject

LAYERS = 4


@pytest.fixture(scope="module", params=[("linear", 1), ("bilinear", 2), ("quantized", 1)], ids=lambda p: p[0])
def sick(request):
    """A model with a fault in one layer, documents, and the layer, of which only the tests know."""
    kind, place = request.param
    made = sound(kind)
    answers = answers_of(made, count=16, lengths=(24,))
    plant(made.sparsity.layers[place], seed=place)
    return made, answers, place


def test_both_sweeps_name_the_layer(sick) -> None:
    made, answers, place = sick
    before = {n: p.clone() for n, p in made.sparsity.state_dict().items() if isinstance(p, torch.Tensor)}
    found = diagnosis.diagnose_answers(made, answers, most=16)
    held = found["sweep"]
    assert held["restore"]["order"][0] == held["mirror"]["order"][0] == held["layer"] == place
    assert held["local"] and held["share"] > 0.4
    assert f"Layer {place} fails" in found["verdict"]
    assert found["causes"]["cause"] == "predictor" and found["causes"]["changes"]["oracle"]["share"] > 0.5
    after = made.sparsity.state_dict()
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_a_pass_that_begins_at_a_layer_is_the_whole_pass(sick) -> None:
    made, answers, _ = sick
    layers = made.sparsity.layers
    swept = sweeps.sweep(made, answers[:2])
    with made.evaluated("sparse") as model:
        for place in range(LAYERS):
            switched = ["dense" if n == place else "sparse" for n in range(LAYERS)]
            with sweeps.modes(layers, switched):
                assert sweeps.mean_nats(model, answers[0]) == swept.restored_NL[0, place]
            mirrored = ["sparse" if n == place else "dense" for n in range(LAYERS)]
            with sweeps.modes(layers, mirrored):
                assert sweeps.mean_nats(model, answers[1]) == swept.alone_NL[1, place]
    assert all(layer.mode == "sparse" for layer in layers)
    assert "forward" not in layers[0].view.decoder_layer.__dict__


def test_a_sound_model_has_no_layer_to_blame() -> None:
    made = subject(keep=16)
    found = diagnosis.diagnose_answers(made, answers_of(made, count=6, lengths=(24,)), most=6)
    assert found["significant"] == [] and found["sweep"] is None and "nothing to repair" in found["verdict"]


def test_local_means_that_one_layer_leads_both_sweeps_by_far() -> None:
    rng = np.random.default_rng(0)
    answers = answers_of(subject(), count=12, lengths=(8,))

    def swept(recovery: list[float], damage: list[float]) -> dict:
        dense, noise = np.full(12, 3.0), rng.normal(0, 0.01, (2, 12, 3))
        return diagnosis._sweep_as_dict(
            answers,
            sweeps.Swept(
                dense_N=dense,
                sparse_N=dense + 1,
                restored_NL=dense[:, None] + 1 - np.array(recovery) + noise[0],
                alone_NL=dense[:, None] + np.array(damage) + noise[1],
            ),
        )

    assert swept([0.1, 0.6, 0.1], [0.1, 0.6, 0.1])["local"]
    assert not swept([0.1, 0.6, 0.1], [0.6, 0.1, 0.1])["local"], "the mirror names another layer"
    assert not swept([0.3, 0.4, 0.3], [0.3, 0.4, 0.3])["local"], "first, but hardly"
    assert not swept([0.1, 0.6, 0.6], [0.1, 0.6, 0.6])["local"], "two layers"


def test_too_few_channels_is_told_from_a_bad_predictor() -> None:
    made = sound("quantized")
    layer = made.sparsity.layers[1]
    layer.keep = 1
    layer.stale()
    found = diagnosis.diagnose_answers(made, answers_of(made, count=16, lengths=(24,)), most=16)
    assert found["sweep"]["layer"] == 1 and found["causes"]["changes"]["oracle"]["share"] < 0.5
    assert found["causes"]["cause"] != "predictor" and layer.keep == 1
    layer.keep = 8
    assert causes.larger_keeps(layer) == [12]


def test_rankings_say_how_sure_they_are() -> None:
    rng = np.random.default_rng(0)
    clear = sweeps.ranking(rng.normal([0.1, 1.0, 0.1], 0.1, (12, 3)))
    level = sweeps.ranking(rng.normal([0.5, 0.5, 0.5], 0.3, (12, 3)))
    assert clear.order[0] == 1 and clear.certainty == 1.0 and clear.leader.above_zero
    assert level.certainty < 0.95


def test_bad_input_is_refused() -> None:
    made = subject()
    with pytest.raises(ConfigError, match="needs at least 4"):
        diagnosis.Asked(documents=2)
    made.sparsity.remove()
    made.sparsity = None
    with pytest.raises(ConfigError, match=r"tiny is dense; this needs a model with predictors.*--method upcycle"):
        diagnosis.diagnose(made, diagnosis.Asked(lengths=(128,)))
