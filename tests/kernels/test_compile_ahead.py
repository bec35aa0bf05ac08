"""Compile every Triton kernel for GPUs that are not at hand.

Every configuration that can be picked must hold its tiles in the registers and the shared memory of
compute capability 8.0, 9.0 and 10.0, and multiply 16-bit matrices on Hopper's tensor cores.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton")

from cmdlab_kernels import denoising_attention_triton as ends  # noqa: E402
from cmdlab_kernels import (  # noqa: E402
    info_nce_triton,
    ragged_attention_triton,
    retrieval_ranks_triton,
)
from cmdlab_kernels.denoising_attention import TRITON_WIDEST_HEAD  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CAPABILITIES = [80, 90, 100]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
ELEMENT = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
}
# An argument that is neither here nor a tile size points to elements of the embeddings' dtype.
ARGUMENTS = (
    dict.fromkeys(["N", "D", "P", "B", "K", "H", "S", "T", "R", "width", "first_column"], "i32")
    | dict.fromkeys(["item_ptr", "lengths_ptr", "order_ptr", "place_ptr"], "*i64")
    | dict.fromkeys(["source_index_ptr", "target_index_ptr"], "*i64")
    | dict.fromkeys(["group_ptr", "first_query_ptr", "first_ptr"], "*i32")
    | dict.fromkeys(["scale_ptr", "row_sum_ptr", "column_sum_ptr", "positive_ptr"], "*fp32")
    | dict.fromkeys(["sum_ptr", "lse_ptr", "row_lse_ptr", "column_lse_ptr"], "*fp32")
    | dict.fromkeys(["delta_ptr", "loss_ptr"], "*fp32")
    | {"scale": "fp32"}
)
# Every 16-bit configuration is that of bfloat16; float16 is compiled for one device to see that
# the types agree.
DTYPES = [(d, c) for d in (torch.bfloat16, torch.float32) for c in CAPABILITIES]
DTYPES.append((torch.float16, 90))


def check(kernel, dtype, capability, configuration, folder, *, odd=(), **own_types) -> str:
    """Compile `kernel`; fail if it spills or wants too much shared memory; return its PTX.

    Triton compiles again for a size or an address that is no multiple of 16, unless the kernel
    forbids it for that argument. odd: arguments that are none here. own_types: of arguments that
    other kernels have with another type.
    """
    names = kernel.arg_names
    launch = {k: v for k, v in configuration.items() if k.startswith("num_")}
    constants = {k: v for k, v in configuration.items() if k not in launch}
    known = ARGUMENTS | own_types
    types = {name: known.get(name, ELEMENT[dtype]) for name in names if name not in constants}
    unspecialised = {p.name for p in kernel.params if p.do_not_specialize}
    unspecialised |= {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith(("*", "i32")) and name not in unspecialised and name not in odd
    }
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(
        kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    dump = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    where = f"{kernel.__name__} {dtype} {capability} {configuration} {odd}"
    assert used["REG"] > 0, dump
    assert used["STACK"] == used["LOCAL"] == 0, f"spills: {where}: {used}"
    assert compiled.metadata.shared <= SHARED_MEMORY[capability], where
    return compiled.asm["ptx"]


@pytest.mark.parametrize(("dtype", "capability"), DTYPES)
@pytest.mark.parametrize("name", ["sums_fwd_kernel", "untrusted_fwd_kernel", "weights_bwd_kernel"])
def test_info_nce(name, dtype, capability, tmp_path):
    kernel = getattr(info_nce_triton, name)  # D is filled up to a multiple of 16
    configuration = info_nce_triton.configuration(kernel, dtype, capability)
    ptx = check(kernel, dtype, capability, configuration, tmp_path)
    assert ("wgmma" in ptx) == (capability == 90 and dtype != torch.float32)
    if name == "weights_bwd_kernel":  # N² elements are written: not one by one
        assert "st.global.v4" in ptx


@pytest.mark.parametrize(("dtype", "capability"), DTYPES)
@pytest.mark.parametrize(
    "name", ["attention_fwd_kernel", "query_bwd_kernel", "key_value_bwd_kernel"]
)
def test_attention(name, dtype, capability, tmp_path):
    kernel = getattr(ragged_attention_triton, name)
    # Heads are filled up to a multiple of 16, and a tile to a power of two.
    widths = [64] if dtype == torch.float16 else [16, 32, 64, 128]
    for width in [w for w in widths if w <= TRITON_WIDEST_HEAD[dtype]]:
        configuration = ragged_attention_triton.configuration(kernel, dtype, width)
        ptx = check(kernel, dtype, capability, configuration, tmp_path)
        assert ("wgmma" in ptx) == (capability == 90 and dtype != torch.float32)


@pytest.mark.parametrize("odd", [(), ("D",)], ids=["divisible", "odd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_queries_and_losses(capability, dtype, odd, tmp_path):
    where = (dtype, capability)
    check(ends.queries_fwd_kernel, *where, ends.ROW_TILE, tmp_path, odd=odd)
    check(ends.sum_by_index_kernel, *where, ends.SUM_TILE, tmp_path, odd=odd)
    for cosine in (False, True):
        options = ends.ROW_TILE | {"COSINE": cosine}
        check(ends.loss_fwd_kernel, *where, options, tmp_path, odd=odd)
        check(ends.loss_bwd_kernel, *where, options, tmp_path, odd=odd, grad_ptr="*fp32")


RANKS = dict.fromkeys(
    [
        "speech_id_ptr",
        "image_id_ptr",
        "speech_greater_ptr",
        "speech_equal_ptr",
        "image_greater_ptr",
    ],
    "*i32",
) | {"image_equal_ptr": "*i32", "found_ptr": "*i32", "doubtful_ptr": "*i64"}
RANKS |= {"capacity": "i32", "M": "i32"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", list(ELEMENT), ids=str)
def test_retrieval_ranks(dtype, capability, tmp_path):
    kernel = retrieval_ranks_triton.ranks_fwd_kernel
    configuration = retrieval_ranks_triton.configuration(dtype) | {"GROUP": 8, "UPCAST": False}
    compared = "*i32" if dtype == torch.int8 else "*fp32"
    ends_of = {"speech_ends_ptr": compared, "image_ends_ptr": compared}
    ptx = check(
        *(kernel, dtype, capability, configuration, tmp_path),
        odd=("N", "M", "capacity", "image_id_ptr", "image_greater_ptr", "found_ptr"),
        **RANKS,
        **ends_of,
    )
    assert ("wgmma" in ptx) == (capability == 90 and dtype != torch.float32)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_retrieval_ranks_recheck(dtype, capability, tmp_path):
    kernel = retrieval_ranks_triton.recheck_fwd_kernel
    thresholds = {"speech_threshold_ptr": "*fp64", "image_threshold_ptr": "*fp64"}
    check(
        *(kernel, dtype, capability, retrieval_ranks_triton.PAIRS, tmp_path),
        odd=("M", "D", "capacity"),
        **RANKS,
        **thresholds,
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_retrieval_pairs(dtype, capability, tmp_path):
    check(
        *(retrieval_ranks_triton.pairs_fwd_kernel, dtype, capability),
        *(retrieval_ranks_triton.PAIRS, tmp_path),
        odd=("P", "D"),
        row_ptr="*i64",
        column_ptr="*i64",
        score_ptr="*fp64",
    )
