"""A GGUF file read again: every tensor, the logits by llama.cpp where it is installed, and the tokens of some text."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fallow.errors import CheckpointError
from fallow.exporting.agreement import GGUF_BOUNDS, agreement, bounds_of, reference, require
from fallow.exporting.stock import as_evaluated

_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.\n\n\tIt's 2024, isn't it?  I'LL see...",
    "def f(x):\n    return {'a': x**2}  # œuvre, naïve, 东京, 🙂\r\n",
)


def verify(
    model: PreTrainedModel,
    path: Path,
    written: dict[str, np.ndarray],
    mode: Literal["dense", "sparse"],
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[str]:
    """What was compared, one sentence each.

    Raises:
        CheckpointError: a tensor, the logits or the tokens differ.
    """
    said = [_same_tensors(path, written)]
    if find_spec("llama_cpp") is None:
        return [
            *said,
            "llama.cpp was not there to run it (pip install 'fallow[llamacpp]'), so its logits are unchecked",
        ]
    engine = load(path)
    try:
        with as_evaluated(model, mode):
            ids_BT, wanted_BTV = reference(model)
            bounds, floor = bounds_of(model, ids_BT, wanted_BTV, GGUF_BOUNDS)
        reached = agreement(wanted_BTV.cpu(), logits(engine, ids_BT.cpu()))
        said += [require(reached, "gguf by llama.cpp", bounds), *floor]
        if tokenizer is not None and engine.metadata.get("tokenizer.ggml.model") != "no_vocab":
            said.append(_same_tokens(engine, tokenizer))
    finally:
        engine.close()
    return said


def load(path: Path, *, context: int = 64, threads: int | None = None) -> Any:
    """The file in llama.cpp, giving the logits of every position."""
    import llama_cpp  # pyright: ignore[reportMissingImports]  an extra
    from llama_cpp import _logger  # pyright: ignore[reportMissingImports]

    threads = threads or torch.get_num_threads()
    # its binding takes warnings for errors and prints them, e.g. that a model was trained on less than 256 tokens
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    try:
        return llama_cpp.Llama(
            str(path), n_ctx=context, logits_all=True, n_threads=threads, n_threads_batch=threads, verbose=False
        )
    except ValueError as error:
        raise CheckpointError(
            f"export: llama.cpp does not load what was written ({error}); nothing was written"
        ) from None
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p())


def logits(engine: Any, ids_BT: Tensor) -> Tensor:
    """[B, T, V] of llama.cpp, one sequence after the other."""
    rows = []
    for ids_T in ids_BT.tolist():
        engine.reset()
        engine.eval(ids_T)
        rows.append(torch.from_numpy(engine.scores[: len(ids_T)].copy()))
    return torch.stack(rows)


def _same_tensors(path: Path, written: dict[str, np.ndarray]) -> str:
    from gguf import GGUFReader

    found = {str(t.name): t for t in GGUFReader(path).tensors}
    if odd := sorted(found.keys() ^ written.keys()):
        raise CheckpointError(f"export: {odd[0]} is written or read back, not both; nothing was written")
    for name, array in written.items():
        read = found[name].data.reshape(tuple(reversed(found[name].shape.tolist())))
        if read.dtype != array.dtype or not np.array_equal(read, array):
            raise CheckpointError(f"export: {name} reads back differently; nothing was written")
        if not np.isfinite(array).all():
            raise CheckpointError(f"export: {name} is beyond the range of {array.dtype}; choose gguf_f32")
    return f"read again: {len(written)} tensors equal what was written bit for bit"


def _same_tokens(engine: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    for text in _TEXTS:
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = engine.tokenize(text.encode(), add_bos=False, special=False)
        if found != wanted:
            raise CheckpointError(
                f"export: llama.cpp cuts {text[:20]!r}... into other tokens than the tokenizer; export"
                " without tokenizer"
            )
    return f"{len(_TEXTS)} texts become the same tokens in llama.cpp"
