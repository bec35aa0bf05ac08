"""The Triton path of `retrieval_ranks`: on a GPU or interpreted, and compiled ahead of time."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from cmdlab_kernels import retrieval_ranks

triton = pytest.importorskip("triton")

FIELDS = ("speech_greater", "speech_equal", "image_greater", "image_equal")
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block
POINTER = {
    torch.int8: "*i8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


def trained(captions, images, width, dtype, noise=1.0):
    """Embeddings whose right answers mostly score high, as after training."""
    generator = torch.Generator().manual_seed(captions)
    image = torch.randn(images, width, generator=generator)
    owner = torch.arange(captions) % images
    speech = image[owner] + noise * torch.randn(captions, width, generator=generator)
    speech, image = (torch.nn.functional.normalize(x, dim=1).to(dtype) for x in (speech, image))
    return speech, image, owner + 5, torch.arange(images) + 5


def assert_equal_to_reference(inputs, device, path=None):
    expected = retrieval_ranks(*inputs, impl="reference")
    result = retrieval_ranks(*(x.to(device) for x in inputs), impl="triton")
    for field in FIELDS:
        assert torch.equal(getattr(result, field).cpu(), getattr(expected, field)), field
    if path:
        assert result.path == path


def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("shape", [(1, 1, 1), (130, 127, 33), (257, 129, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_equals_the_reference(triton_device, shape, dtype):
    assert_equal_to_reference(trained(*shape, dtype), triton_device)


@pytest.mark.parametrize("name", ["INT8", "FP16", "FP32"])
def test_triton_precisions(triton_device, monkeypatch, name):
    from cmdlab_kernels import retrieval_ranks_triton

    precision = getattr(retrieval_ranks_triton, name)
    monkeypatch.setattr(retrieval_ranks_triton, "precisions", lambda dtype: (precision,))
    inputs = trained(190, 70, 40, torch.float32)
    assert_equal_to_reference(inputs, triton_device, precision.name)


def test_triton_ties(triton_device):
    generator = torch.Generator().manual_seed(0)
    speech = torch.randint(-1, 2, (100, 5), generator=generator).float()
    image = torch.randint(-1, 2, (50, 5), generator=generator).float()
    assert_equal_to_reference(
        (speech, image, torch.arange(100) % 50, torch.arange(50)), triton_device
    )


def test_triton_falls_back_when_too_much_is_in_doubt(triton_device, monkeypatch):
    from cmdlab_kernels import retrieval_ranks_triton

    monkeypatch.setattr(retrieval_ranks_triton, "PILOT_ROWS", 8)
    speech, image = torch.full((40, 8), 0.3), torch.full((20, 8), 0.7)
    inputs = speech, image, torch.arange(40) % 20, torch.arange(20)
    assert_equal_to_reference(inputs, triton_device, "exact")


def test_triton_in_several_launches(triton_device, monkeypatch):
    from cmdlab_kernels import retrieval_ranks_triton

    monkeypatch.setattr(retrieval_ranks_triton, "PAIRS_AT_ONCE", 4000)
    monkeypatch.setattr(retrieval_ranks_triton, "PILOT_ROWS", 16)
    assert_equal_to_reference(trained(100, 90, 24, torch.float32), triton_device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_thousand_runs_are_equal():
    inputs = [x.cuda() for x in trained(1000, 300, 96, torch.float32)]
    first = retrieval_ranks(*inputs, impl="triton")
    for _ in range(1000):
        again = retrieval_ranks(*inputs, impl="triton")
        assert all(torch.equal(getattr(first, f), getattr(again, f)) for f in FIELDS)


def compile_ahead(kernel, types, options, capability):
    """Compile for a GPU that is not at hand: its resources by cuobjdump's names, and its PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [name for name in types if name.endswith("_ptr") or name == "D"]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in options.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = subprocess.check_output([tool, "--dump-resource-usage", cubin], text=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    return found | {"SHARED": compiled.metadata.shared}, compiled.asm["ptx"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", list(POINTER), ids=str)
def test_compiles_without_spilling(capability, dtype):
    from cmdlab_kernels import retrieval_ranks_triton as kernels

    ends = "*i32" if dtype == torch.int8 else "*fp32"
    types = dict.fromkeys(("speech_ptr", "image_ptr"), POINTER[dtype])
    types |= dict.fromkeys(("speech_ends_ptr", "image_ends_ptr"), ends)
    types |= dict.fromkeys(
        ("positive_ptr", "speech_greater_ptr", "image_greater_ptr", "found_ptr"), "*i32"
    )
    types |= {"doubtful_ptr": "*i64"} | dict.fromkeys(("capacity", "N", "M", "D"), "i32")
    options = kernels.configuration(dtype) | {"GROUP": 8, "UPCAST": False}
    resources, ptx = compile_ahead(kernels.ranks_fwd_kernel, types, options, capability)
    assert resources["STACK"] == 0
    assert resources["LOCAL"] == 0
    assert resources["SHARED"] <= SHARED_MEMORY_LIMIT[capability]
    if capability == 90 and dtype != torch.float32:
        assert "wgmma" in ptx


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_recheck_compiles_without_spilling(capability, dtype):
    from cmdlab_kernels import retrieval_ranks_triton as kernels

    kernel = kernels.recheck_fwd_kernel
    types = {name: "*i32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= dict.fromkeys(("speech_ptr", "image_ptr"), POINTER[dtype])
    types |= dict.fromkeys(("speech_threshold_ptr", "image_threshold_ptr"), "*fp64")
    types |= {"doubtful_ptr": "*i64"} | dict.fromkeys(("capacity", "M", "D"), "i32")
    resources, _ = compile_ahead(kernel, types, {"BLOCK_P": 64, "num_warps": 2}, capability)
    assert resources["STACK"] == 0
    assert resources["LOCAL"] == 0
