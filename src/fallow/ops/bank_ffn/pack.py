"""Low-bit copies that predictors are made of, and int8 weights.

Codes of `bits` bits in groups of `group` along D, one bf16 scale each, symmetric without a zero: value =
(code - (2^bits - 1)/2) · scale, so that all 2^bits levels count (with a zero, 2 bits have three). The layout serves a
dot product by bytes (x86 VNNI): 16 channels side by side, four inputs of each, so a register's 16 sums are 16 channels
and need no sum across lanes. A row-major copy needs one for every group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.errors import ConfigError
from fallow.ops.bank_ffn.select import Int8Rows, Predictor

LANES = 16
"""Channels side by side."""


def pack_quantized(w_gate_FD: Tensor, w_up_FD: Tensor, *, bits: int = 4, group: int = 64) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a "quantized" predictor.

    Args:
        w_gate_FD, w_up_FD: [F, D], floating.
        bits: 2 or 4.
        group: inputs that share a scale; a multiple of 16.

    Returns:
        codes: uint8 [ceil(F/16), ceil(D/group), 2 (gate, up), bits, 2·group]. The last two are one run of bytes, seen
            as [j, lane, b]: 16 lanes (channel 16·block + lane) of 4 bytes; the codes of inputs
            group·g + j·(32/bits) + 4·s + b, for s < 8/bits, lie in bits [s·bits, (s+1)·bits) of byte (j, lane, b).
        scales: bf16 [ceil(F/16), ceil(D/group), 2, 16].
    """
    packed = [_packed(*_codes(w, bits, group), bits) for w in (w_gate_FD, w_up_FD)]
    codes, scales = (torch.stack(parts, 2).contiguous() for parts in zip(*packed, strict=True))
    return codes, scales


def rounded(w_FD: Tensor, *, bits: int = 4, group: int = 64) -> Tensor:
    """[F, D], dtype of w: what a quantized copy holds."""
    code_FGg, scale_FG = _codes(w_FD, bits, group)
    return _values(code_FGg, scale_FG, bits)[: w_FD.shape[0], : w_FD.shape[1]].to(w_FD.dtype)


def unpack_quantized(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (gate, up), each [F, D] with F and D rounded up to whole blocks and groups."""
    blocks, groups, _, bits, twice = codes.shape
    group, per = twice // 2, 8 // bits
    bytes_ = codes.view(blocks, groups, 2, -1, LANES, 4)
    shift = torch.arange(per, device=codes.device, dtype=torch.uint8) * bits
    one = (bytes_[..., None, :] >> shift[:, None]) & (2**bits - 1)  # [block, group, 2, j, lane, s, b]
    code = one.permute(2, 0, 4, 1, 3, 5, 6).reshape(2, blocks * LANES, groups, group)
    scale = scales.permute(2, 0, 3, 1).reshape(2, blocks * LANES, groups)
    return _values(code[0], scale[0], bits), _values(code[1], scale[1], bits)


def round_x(x_TD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(fp32 whole numbers [T, G, group] from -127 to 127, fp32 scale [T, G]): x as a quantized predictor sees it."""
    x_TGg = _grouped(x_TD.float(), group)
    scale_TG = x_TGg.abs().amax(2) / 127
    inverse_TG = torch.where(scale_TG > 0, 1 / scale_TG, 0)
    return (x_TGg * inverse_TG[..., None]).round().clamp(-127, 127), scale_TG


def pack_factors(p: Predictor) -> Predictor:
    """A linear or bilinear predictor with its factors as int8 rows and fp32 scales: half the bytes of bf16."""
    if p.kind not in ("linear", "bilinear"):
        raise ConfigError(f"bank_ffn: a {p.kind} predictor has no factors to pack")
    if p.tensors[0].dtype == torch.int8:
        return p
    return p._replace(tensors=tuple(t for factor in p.tensors for t in int8_rows(factor)))


def int8_rows(w_FD: Tensor) -> Int8Rows:
    """Each row rounded to 8 bits, symmetric, by its largest entry."""
    scale_F = w_FD.float().abs().amax(1).clamp_min(1e-30) / 127
    return Int8Rows((w_FD.float() / scale_F[:, None]).round().to(torch.int8).contiguous(), scale_F)


def _grouped(w_FD: Tensor, group: int) -> Tensor:
    """[F, G, group], zeros past D."""
    short = -w_FD.shape[1] % group
    return torch.nn.functional.pad(w_FD, (0, short)).unflatten(1, (-1, group))


def _codes(w_FD: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(uint8 codes [F, G, group], bf16 scales [F, G])."""
    if bits not in (2, 4):
        raise ConfigError(f"bank_ffn: bits={bits}; quantized copies have 2 or 4 bits")
    if group < 16 or group % 16:
        raise ConfigError(f"bank_ffn: group={group} must be a multiple of 16, such as 64")
    w_FGg = _grouped(w_FD.float(), group)
    half = (2**bits - 1) / 2
    scale_FG = (w_FGg.abs().amax(2) / half).to(torch.bfloat16)
    inverse_FG = torch.where(scale_FG > 0, 1 / scale_FG.float(), 0)
    return (w_FGg * inverse_FG[..., None] + half).round().clamp(0, 2 * half).to(torch.uint8), scale_FG


def _values(code_FGg: Tensor, scale_FG: Tensor, bits: int) -> Tensor:
    return ((code_FGg.float() - (2**bits - 1) / 2) * scale_FG.float()[..., None]).flatten(1)


def _packed(code_FGg: Tensor, scale_FG: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Bytes [blocks, G, bits, 2·group] and scales [blocks, G, 16]; channels past F have scale 0."""
    short = -code_FGg.shape[0] % LANES
    code_FGg = torch.nn.functional.pad(code_FGg, (0, 0, 0, 0, 0, short))
    scale_FG = torch.nn.functional.pad(scale_FG, (0, 0, 0, short))
    groups, group, per = code_FGg.shape[1], code_FGg.shape[2], 8 // bits
    parts = code_FGg.view(-1, LANES, groups, group // (4 * per), per, 4)
    merged = torch.zeros_like(parts[:, :, :, :, 0])  # [block, lane, G, j, b]
    for s in range(per):
        merged |= parts[:, :, :, :, s] << (s * bits)
    codes = merged.permute(0, 2, 3, 1, 4).reshape(-1, groups, bits, 2 * group)
    return codes, scale_FG.view(-1, LANES, groups).transpose(1, 2)
