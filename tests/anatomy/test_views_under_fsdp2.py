"""Views under FSDP2: whichever comes first, sharding or installing, modules compute with the unsharded tensors.

One rank is enough to see it: FSDP2 swaps every parameter for a DTensor at rest and for a plain tensor inside forward.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fallow import anatomy
from tiny_models import tiny_batch, tiny_model

FAMILIES = ("llama", "phi3", "gpt2", "opt", "olmo2")


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model, layers):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def install(found):
    """Every FFN in plain torch from its live weights, every attention with its second KV group only."""
    for view in found.ffns:

        def forward(x, view=view):
            w = view.weights()
            assert not isinstance(w.w_down_DF, DTensor)
            up = F.linear(x, w.w_up_FD, w.b_up_F)
            act = (
                F.silu
                if view.act == "silu"
                else F.relu
                if view.act == "relu"
                else lambda z: F.gelu(z, approximate="tanh")
            )
            h = act(up) if w.w_gate_FD is None else act(F.linear(x, w.w_gate_FD, w.b_gate_F)) * up
            return F.linear(h, w.w_down_DF, w.b_down_D)

        view.install(forward)
    for view in found.attentions:
        ratio = view.n_heads // view.n_kv_heads
        gate = view.install()
        gate.configure(ratio, 1)
        gate.select(torch.arange(ratio, 2 * ratio), torch.tensor([1]))


def uninstall(found):
    for view in [*found.ffns, *found.attentions]:
        view.uninstall()


def gradients(model):
    model.zero_grad(set_to_none=True)
    loss = model(**tiny_batch()).loss
    loss.backward()
    grads = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
    return loss.detach(), {n: g.clone() for n, g in grads.items()}


@pytest.mark.parametrize("sharded_first", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_and_installed_in_either_order(family, sharded_first):
    reference = tiny_model(family)
    dense = gradients(reference)
    install(anatomy.inspect(reference))
    expected = gradients(reference)

    model = tiny_model(family)
    found = anatomy.inspect(model)
    if sharded_first:
        shard(model, found.layers)
        install(found)
    else:
        install(found)
        shard(model, found.layers)
    for (loss, grads), restore in ((expected, True), (dense, False)):
        got_loss, got = gradients(model)
        torch.testing.assert_close(got_loss, loss, rtol=1e-6, atol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        if restore:
            uninstall(found)
    for view in found.ffns:
        assert all(isinstance(p.parameter, DTensor) for p in view.parameters_along_channels())
