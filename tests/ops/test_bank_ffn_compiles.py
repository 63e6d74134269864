"""The Triton kernels of `bank_ffn` compiled for a GPU, where there is none: what the interpreter cannot tell."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from tests.interpreter import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install 'fallow[gpu]')"),
]


def compile_for_hopper(kernel: Any, constants: dict[str, Any], weights: str, **options: int) -> Any:
    """The kernel compiled for sm_90: weights as said, x and y in bf16, sizes multiples of 16; needs no GPU."""
    import triton as language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = kernel if hasattr(kernel, "launch_metadata") else kernel.fn  # below the autotuner
    numbers = ("D", "F", "G", "Q", "R", "T", "banks", "keep", "slots", "total", "share", "parts", "stride")
    types = dict.fromkeys(numbers, "i32") | {"out": "*u8"}
    types |= dict.fromkeys((n for n in fn.arg_names if n[:2] in ("w_", "v_", "u_")), weights)
    floats = ("coef", "tilt", "z", "h", "part", "scale", "scores", "scale_gate", "scale_up", "scale_down")
    types |= dict.fromkeys(floats, "*fp32")
    types |= dict.fromkeys(("live", "count", "words", "zero", "codes"), "*i32")
    known = {n: v for n, v in constants.items() if n in fn.arg_names}
    signature = {n: "constexpr" if n in known else types.get(n, "*bf16") for n in fn.arg_names}
    round_ones = [n for n in fn.arg_names if n not in (*known, "T", "banks", "parts")]
    aligned = {(fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in round_ones}
    source = ASTSource(fn, signature, constexprs=known, attrs=aligned)
    return language.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles_for_hopper():
    """The compiler accepts less than the interpreter. Codes are to be multiplied by dp4a, several tokens by tensor
    cores, rows to be on their way (cp.async) before they are needed, and factors before the kernel ahead has ended."""
    import triton.language as tl

    from fallow.ops.bank_ffn import triton_kernels as rows
    from fallow.ops.bank_ffn import triton_select as select

    given = {"ACT": "silu", "SMOOTH": False, "BANK": 64, "BB": 64, "PLAIN": False, "STAGES": 3, "EARLY": True}
    given |= {"GROUP": 64, "BITS": 4, "J": 8, "BJ": 8, "TYPE": tl.bfloat16, "PRECISION": "ieee", "BT": 16}
    no_scales = dict.fromkeys(("scale_gate", "scale_up", "scale_down"))
    linear = {"v_up": None, "u_up": None, "SMOOTH": True}
    cases = [
        (select.mask_kernel, {}, []),
        (select.given_kernel, {"T": 2}, []),
        (select.thin_kernel, {"T": 1, "BR": 2, "BD": 512} | linear, []),
        (select.thin_kernel, {"T": 3, "BR": 2, "BD": 512}, []),  # bilinear
        (select.factors_kernel, {"T": 1, "BR": 16} | linear, []),
        (select.factors_kernel, {"T": 3, "BR": 16}, []),
        (select.round_kernel, {}, []),
        (select.codes_kernel, {"T": 1, "BQ": 16}, ["cp.async", "dp4a.u32.s32"]),
        (select.codes_kernel, {"T": 2, "BQ": 16, "BITS": 2, "J": 4}, ["cp.async", "dp4a.u32.s32"]),
        (rows.inner_one_kernel, {"BR": 4, "BD": 256}, ["cp.async"]),
        (rows.inner_many_kernel, {"BR": 16, "BD": 128}, ["cp.async", "mma.sync"]),
        (rows.down_one_kernel, {"BC": 16, "BD": 128}, ["cp.async"]),
        (rows.down_many_kernel, {"BC": 32, "BD": 128}, ["cp.async", "mma.sync"]),
        (rows.rows_one_kernel, {"BR": 2, "BD": 4096, "PROGRAMS": 264}, ["cp.async"]),
        (rows.sum_kernel, {"BP": 32, "BD": 128}, []),
    ]
    for kernel, constants, wanted in cases:
        compiled = compile_for_hopper(kernel, given | no_scales | constants, "*bf16", num_warps=4)
        assert all(w in compiled.asm["ptx"] for w in wanted), constants
        assert compiled.metadata.shared <= 227 * 1024
        assert (kernel is select.mask_kernel) == ("griddepcontrol.wait" not in compiled.asm["ptx"]), kernel
        if kernel in (select.thin_kernel, select.factors_kernel):
            assert compiled.asm["ptx"].index("ld.global") < compiled.asm["ptx"].index("griddepcontrol.wait"), kernel
    for kernel, constants, _ in (cases[3], cases[5], *cases[9:14]):
        compile_for_hopper(kernel, given | constants, "*i8", num_warps=4)
        if kernel in (rows.inner_many_kernel, rows.down_many_kernel):
            compile_for_hopper(kernel, given | no_scales | constants | {"TYPE": tl.float32}, "*fp32", num_warps=4)


def test_tiles_leave_registers():
    """More tokens, smaller tiles; and one is always left."""
    from fallow.ops.bank_ffn.triton_select import codes_kernel, factors_kernel, thin_kernel

    def left(kernel: Any, **given: int) -> int:
        kernel.nargs = {}
        return len(kernel.prune_configs({"grid": None, "warmup": False, **given}))

    assert [left(codes_kernel, T=T, BB=64) for T in (1, 4, 8)] == [4, 3, 1]
    assert [left(factors_kernel, T=T, BB=64) for T in (1, 4, 8)] == [3, 1, 1]
    assert left(codes_kernel, T=8, BB=256) == left(factors_kernel, T=8, BB=256) == 1
    assert [left(thin_kernel, T=T) for T in (1, 4, 8)] == [4, 3, 1]
