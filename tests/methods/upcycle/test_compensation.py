"""What stands in for dead channels: fitted it is nearer to the dense output, it serves, trains, resumes and exports."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.evaluation.subjects import subject
from tests.methods.upcycle.upcycled_models import upcycled
from tests.tiny_models import tiny_batch, tiny_model

import fallow
from fallow.errors import CheckpointError, ConfigError
from fallow.evaluation.repairs import Workshop, ways
from fallow.evaluation.snapshot import Snapshot
from fallow.methods.upcycle.compensation import Compensation, Moments
from fallow.serving import Decoder


def compensated(stand_in=8, **settings):
    return upcycled(compensation=stand_in, **settings)


def batches(count):
    return (tiny_batch(seed=50 + s, batch=16, tokens=64) for s in range(count))


def test_a_map_of_its_rank_is_found_again():
    """Inputs with a mean and unequal variances, an affine map of rank 3 of them: nothing is left over."""
    chance = torch.Generator().manual_seed(0)
    x_TD = torch.randn(4000, 12, generator=chance) * torch.logspace(0, -1, 12) + 0.5
    map_DD = torch.randn(12, 3, generator=chance) @ torch.randn(3, 12, generator=chance)
    y_TD = x_TD @ map_DD.t() - 2.0
    moments = Moments()
    for x, y in zip(x_TD.split(1000), y_TD.split(1000), strict=True):
        moments.add(x, y)
    found = Compensation(rank=3, width=12, device=torch.device("cpu"))
    assert float(found(x_TD).detach().abs().max()) == 0.0, "it adds nothing until it is fitted"
    found.take(moments)
    assert float((found(x_TD) - y_TD).detach().std()) < 0.1 * float(y_TD.std())
    less = Compensation(rank=1, width=12, device=torch.device("cpu"))
    less.take(moments)
    assert float((less(x_TD) - y_TD).detach().std()) > 2 * float((found(x_TD) - y_TD).detach().std())


@pytest.mark.parametrize("predictor", ["quantized", "bilinear", "linear"])
def test_sparse_outputs_come_nearer_to_the_dense_ones(predictor):
    distance = {}
    rank = None if predictor == "quantized" else 8
    for stand_in in (0, 8):
        model, handle = compensated(stand_in, predictor=predictor, rank=rank)
        handle.watch(tiny_batch(seed=3, batch=8, tokens=64))
        list(handle.prepare(batches(20)))
        model.eval()
        held = tiny_batch(seed=99)["input_ids"]
        with torch.no_grad(), handle.in_mode("dense"):
            dense = model(input_ids=held).logits
        with torch.no_grad(), handle.in_mode("sparse"):
            distance[stand_in] = float((model(input_ids=held).logits - dense).square().mean())
    assert distance[8] < 0.95 * distance[0]


def test_the_dense_mode_and_the_watched_batch_alone():
    model, handle = compensated()
    handle.watch(tiny_batch(seed=3))
    handle.set_mode("dense")
    assert torch.equal(model(**tiny_batch()).logits, tiny_model("llama")(**tiny_batch()).logits)
    handle.set_mode("sparse")  # starts from the watched batch
    assert all(bool(layer.predictor.compensation.u_DR.any()) for layer in handle.layers)


def test_one_token_at_a_time_equals_the_whole():
    model, handle = compensated(predictor="bilinear", rank=8)
    handle.watch(tiny_batch(seed=3))
    handle.set_mode("sparse")
    model.eval()
    ids = tiny_batch(tokens=8, batch=1)["input_ids"]
    with torch.no_grad():
        whole, past, steps = model(input_ids=ids).logits, None, []
        for t in range(8):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=past, use_cache=True)
            past, _ = out.past_key_values, steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-3 * float(whole.std()))


def test_the_decoding_loop_compiles_two_linears_in_a_row():
    model, handle = compensated(predictor="bilinear", rank=8)
    handle.watch(tiny_batch(seed=3))
    handle.set_mode("sparse")
    model.eval()
    ids, said = tiny_batch(tokens=8, batch=1)["input_ids"], []
    found = Decoder(model, max_tokens=24, say=said.append).generate(ids[0], max_new_tokens=8, stop_tokens=())
    eager = Decoder(model, max_tokens=24, compiled=False).generate(ids[0], max_new_tokens=8, stop_tokens=())
    assert not said and found.tokens == eager.tokens


def test_it_learns_at_the_rate_of_the_weights_even_where_predictors_do_not():
    model, handle = compensated(predictor="linear", rank=8, predictor_lr=0.0)
    handle.watch(tiny_batch(seed=3))
    handle.set_mode("sparse")
    before = copy.deepcopy(handle.layers[0].predictor.state_dict())
    optimizer = handle.optimizer(lr=1e-3)
    model.train()
    for step in range(2):
        handle.before_step(step, 2)
        model(**tiny_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.after_step(step, 2)
    after = handle.layers[0].predictor.state_dict()
    changed = {name for name, was in before.items() if not torch.equal(was, after[name])}
    assert changed == {"compensation.v_RD", "compensation.u_DR", "compensation.bias_D"}
    model.eval()
    with torch.no_grad():
        served = model(input_ids=tiny_batch()["input_ids"][:, :1]).logits
        handle.layers[0].predictor.compensation.bias_D.add_(1.0)
        handle.layers[0].stale()
        assert not torch.equal(model(input_ids=tiny_batch()["input_ids"][:, :1]).logits, served)


def test_while_more_channels_live_it_adds_less():
    _, handle = compensated(anneal=0.5)
    shares = []
    for step in range(8):
        handle.before_step(step, 8)
        shares.append((handle.layers[0].keep, handle.layers[0].annealed))
        handle.after_step(step, 8)
    assert shares[:5] == [(16, 0.0), (13, 0.0625), (10, 0.25), (7, 0.5625), (4, 1.0)] and set(shares[4:]) == {(4, 1.0)}


def test_state_and_export_carry_it(tmp_path):
    model, handle = compensated()
    handle.watch(tiny_batch(seed=3))
    handle.set_mode("sparse")
    model.eval()
    held = tiny_batch(seed=99)["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=held).logits
    again, twin = compensated()
    again.load_state_dict(model.state_dict())
    twin.load_state_dict(handle.state_dict())
    twin.set_mode("sparse")
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=held).logits, wanted)
    plain = compensated(0)[1]
    with pytest.raises(CheckpointError, match="does not fit the config"):
        plain.load_state_dict(handle.state_dict())
    fallow.export(model, tmp_path / "out", to="fallow")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=held).logits, wanted)


@pytest.mark.parametrize("name", ["keep", "tilt", "refit", "lm"])
def test_a_repair_fits_it_anew_and_a_refused_one_puts_it_back(name):
    made = subject(layers=2, compensation=4)
    layer = made.sparsity.layers[1]
    windows_NT = torch.randint(2, 2000, (8, 64), generator=torch.Generator().manual_seed(1))
    shop = Workshop(subject=made, place=1, windows_NT=windows_NT, steps=8, rows=64, lr=1e-3)
    before, snapshot = {n: v.clone() for n, v in layer.predictor.state_dict().items()}, Snapshot(layer)
    for repair in ways(layer, (name,), [8]):
        repair.run(shop)
    assert "predictor.compensation.u_DR" in snapshot.changes()
    if name != "lm":
        missing_TD = layer.missing(shop.x_TD)
        left = float((layer.predictor.compensation(shop.x_TD) - missing_TD).detach().square().mean())
        assert left < float(missing_TD.square().mean()), "it is a map for what is missing now"
    snapshot.restore()
    assert all(torch.equal(v, before[n]) for n, v in layer.predictor.state_dict().items())


def test_bad_settings_are_said():
    with pytest.raises(ConfigError, match="compensation=-1"):
        fallow.Upcycle(compensation=-1)
    with pytest.raises(ConfigError, match="compensation=True"):
        fallow.Upcycle(compensation=True)
