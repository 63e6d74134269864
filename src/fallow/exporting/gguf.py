"""`--to gguf`: one file for llama.cpp, weights in f16, tokenizer inside. With experts where SSD holds the model.

Architecture "llama", whose MoE form renormalises and computes SiLU, so the folding is Mixtral's; a dense ReGLU model
needs the same scale of its gate. llama.cpp rotates neighbouring pairs where transformers rotates halves, so the rows of
q and k are reordered; rope frequencies beyond `rope_theta` are written as they are in the model (`rope_freqs`).
Calling llama.cpp's converter on a Mixtral folder would do the same, but it is a script of their repository and not in
any package. Cost: the weights once in f16 while they are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from fallow import anatomy
from fallow.anatomy import FFNView
from fallow.errors import ConfigError, UnsupportedModelError
from fallow.exporting import Written
from fallow.exporting.gguf_check import verify
from fallow.exporting.gguf_vocab import add_vocab
from fallow.exporting.moe import Experts, check, check_activation, experts_of, fold, fold_dense
from fallow.exporting.stock import StockTensors
from fallow.exporting.traits import head_dim

_EXPRESSES = frozenset({"attention_bias", "head_dim"})
_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype = torch.float16) -> Written:
    """Fill `folder`, whose tokenizer, if there is one, goes into the file, and verify it.

    Raises:
        ConfigError: the package gguf is missing; see also `StockTensors`, `experts_of`.
        UnsupportedModelError: llama.cpp's "llama" cannot express the model.
        CheckpointError: what was written does not answer as the model does.
    """
    try:
        from gguf import GGUFWriter, LlamaFileType
    except ImportError:
        raise ConfigError("export: gguf needs the package gguf; run: pip install 'fallow[gguf]'") from None
    tensors = StockTensors(model)
    handle: Any = getattr(model, "_fallow", None)
    grouped = hasattr(handle, "experts")
    experts = experts_of(model, "gguf") if grouped and handle.mode == "sparse" else None
    held = grouped or getattr(handle, "name", "") == "upcycle"  # then views exist, and no others can be made
    views = [x.view for x in handle.layers] if held else anatomy.inspect(model).ffns
    check(model, views, "gguf", _EXPRESSES)
    for view in views:
        check_activation(view, "gguf")
    path = folder / f"model-{'f16' if dtype == torch.float16 else 'f32'}.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name(folder.name.removeprefix(".partial-"))
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if dtype == torch.float16 else LlamaFileType.ALL_F32)
    _add_settings(writer, model, experts, views[0])
    tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None
    said = add_vocab(writer, folder, tokenizer, _vocab(model))
    written = _tensors(model, tensors, experts, views, dtype)
    for name, array in written.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    verified = verify(model, path, written, "sparse" if experts else "dense", tokenizer)
    return Written(dense_bytes=tensors.nbytes(), packed_layers=0, verified=[*verified, said])


def _vocab(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, return-value]


def _add_settings(writer: Any, model: PreTrainedModel, experts: Experts | None, view: FFNView) -> None:
    config: Any = model.config
    width = head_dim(config)
    writer.add_vocab_size(_vocab(model))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(experts.channels if experts else view.n_channels)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if experts:
        writer.add_expert_count(experts.n_experts)
        writer.add_expert_used_count(experts.active)


def _tensors(
    model: PreTrainedModel, tensors: StockTensors, experts: Experts | None, views: list[FFNView], dtype: torch.dtype
) -> dict[str, np.ndarray]:
    config: Any = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    ffns = tuple(f"{view.name}." for view in views)
    named: dict[str, np.ndarray] = {}
    if (factors := rope_factors(model)) is not None:
        named["rope_freqs.weight"] = _array(factors, dtype)
    for name in tensors.names:
        if name.startswith(ffns) or (name in tensors.tied and config.tie_word_embeddings):
            continue
        place, tensor = _gguf_name(name), tensors[name]
        part = place.rsplit(".", 2)[-2]
        named[place] = _array(pairs_from_halves(tensor, heads[part]) if part in heads else tensor, dtype)
    for n, view in enumerate(views):
        block = f"blk.{n}"
        if experts is None:
            gate, up, down = fold_dense(view, dtype=dtype)
            named |= {
                f"{block}.ffn_gate.weight": _array(gate, dtype),
                f"{block}.ffn_up.weight": _array(up, dtype),
                f"{block}.ffn_down.weight": _array(down, dtype),
            }
            continue
        folded = fold(experts.layers[n], "renormalised", dtype=dtype, router_dtype=torch.float32)
        named |= {
            f"{block}.ffn_gate_inp.weight": _array(folded.router_ED, torch.float32),
            f"{block}.ffn_gate_exps.weight": _array(folded.gate_ECD, dtype),
            f"{block}.ffn_up_exps.weight": _array(folded.up_ECD, dtype),
            f"{block}.ffn_down_exps.weight": _array(folded.down_EDC, dtype),
        }
    return named


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    for stock, ours in _NAMES.items():
        if rest == stock or rest in (f"{stock}.weight", f"{stock}.bias"):
            return f"blk.{layer}.{ours}{rest.removeprefix(stock)}"
    raise UnsupportedModelError(f"export: llama.cpp's llama has no place for {name}; choose another target")


def pairs_from_halves(x: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection (or its bias) in the order in which neighbours are a rotated pair."""
    return x.view(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """[head_dim / 2] by which llama.cpp divides its frequencies, or None where they are all 1.

    They are taken from the model's own frequencies, which `model.to(bfloat16)` rounds: that alone moves logits by
    percents, and the rounded ones are those it was trained with.
    """
    config: Any = model.config
    kind = config.rope_parameters["rope_type"]
    rotary: Any = model.base_model.rotary_emb
    if kind not in ("default", "linear", "llama3") or rotary.attention_scaling != 1.0:
        raise UnsupportedModelError(
            f"export: gguf writes rope of type default, linear or llama3; this model's is {kind}; choose another target"
        )
    inv_freq = rotary.inv_freq.detach().double().cpu()
    width = head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    factors = (plain / inv_freq).float()
    return None if torch.allclose(factors, torch.ones(()), rtol=1e-5, atol=0) else factors


def _array(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Matrices in the file's dtype, vectors in f32, as llama.cpp wants them."""
    return x.detach().to("cpu", torch.float32 if x.dim() < 2 else dtype).contiguous().numpy()
