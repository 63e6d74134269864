"""Loss on text: equal to the stock model's own, window by window, in both modes; bad input is told before computing."""

from __future__ import annotations

import pytest
import torch

from fallow.errors import ConfigError, DataError
from fallow.evaluation import perplexity
from tests.evaluation.subjects import subject
from tests.training.tiny_runs import text


@pytest.fixture(scope="module")
def tiny():
    return subject()


@pytest.fixture
def source(tmp_path):
    (tmp_path / "text.txt").write_text(text(9, 1500))
    return perplexity.texts([str(tmp_path / "text.txt")])[0]


def test_it_is_the_models_own_loss(tiny, source) -> None:
    windows = perplexity.windows(tiny, source, length=100, limit=5)
    assert windows.shape == (5, 100)
    for mode in ("dense", "sparse"):
        found = perplexity.text_loss(tiny, windows, mode=mode, batch_size=2)
        with tiny.evaluated(mode) as model:
            wanted = [float(model(input_ids=row[None], labels=row[None]).loss) for row in windows]
        assert found.tokens == [99] * 5
        assert [n / 99 for n in found.nats] == pytest.approx(wanted, rel=1e-5)
        assert found.loss.mean == pytest.approx(sum(wanted) / 5, rel=1e-5)
        assert found.loss.low < found.loss.mean < found.loss.high


def test_dense_and_sparse_differ_and_their_gap_is_paired(tiny, source) -> None:
    windows = perplexity.windows(tiny, source, length=64, limit=None)
    dense, sparse = (perplexity.text_loss(tiny, windows, mode=mode) for mode in ("dense", "sparse"))
    gap = perplexity.gap(sparse, dense)
    assert gap.mean == pytest.approx(sparse.loss.mean - dense.loss.mean, abs=1e-6) and gap.mean != 0
    assert gap.high - gap.low < sparse.loss.high - sparse.loss.low


def test_modes_and_training_flags_come_back(tiny) -> None:
    tiny.model.train()
    tiny.sparsity.set_mode("dense")
    try:
        with tiny.evaluated("sparse") as model:
            assert not model.training and tiny.sparsity.mode == "sparse" and not torch.is_grad_enabled()
        assert tiny.model.training and tiny.sparsity.mode == "dense"
    finally:
        tiny.model.eval()


def test_a_length_beyond_the_context_and_a_text_too_short_are_refused(tiny, source) -> None:
    with pytest.raises(ConfigError, match=r"5000 tokens are beyond the context of tiny, 4096"):
        perplexity.windows(tiny, source, length=5000, limit=1)
    with pytest.raises(DataError, match="do not fill one window of 4000"):
        perplexity.windows(tiny, source, length=4000, limit=1)
