"""Default dtypes, default devices, autocast and oneDNN's cap change no operation's result."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from cmdlab_kernels import denoising_attention, info_nce, retrieval_ranks
from cmdlab_kernels.denoising_attention import Projections


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES = {
    "default dtype bfloat16": lambda device: default_dtype(torch.bfloat16),
    "default dtype float64": lambda device: default_dtype(torch.float64),
    "default device": lambda device: torch.device("meta"),
    "autocast": lambda device: torch.autocast(device.type, torch.bfloat16),
}


def unit_rows(*shape, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, generator=generator, dtype=torch.float32)
    return F.normalize(rows, dim=-1).to(device)


def contrastive(impl, device):
    speech, image = unit_rows(2, 200, 32, device=device)
    scale = torch.tensor(100.0, dtype=torch.float32, device=device)
    leaves = [x.clone().requires_grad_() for x in (speech, image, scale)]
    image_id = torch.arange(200, device=device) % 150
    return lambda: info_nce(leaves[0], leaves[1], image_id, leaves[2], impl=impl), leaves


def denoising(impl, loss, device):
    item = torch.tensor([0, 0, 0, 2, 2], device=device)
    index = torch.tensor([3, 1, 4, 1, 5], device=device)
    lengths = torch.tensor([33, 0, 7], device=device)
    shapes = (9, 24), (6, 24), (3, 33, 24), (32, 24), (64, 24), (24, 32)
    leaves = [unit_rows(*shape, device=device).requires_grad_() for shape in shapes]

    def run():
        source, position, tokens, *weights = leaves
        return denoising_attention(
            *(source, index, position, index, item, tokens, lengths, Projections(*weights), 4),
            *(source.detach(), index),
            loss=loss,
            impl=impl,
        )

    return run, leaves


def ranking(device):
    speech, image = unit_rows(600, 48, device=device), unit_rows(200, 48, device=device, seed=1)
    owner, image_id = (torch.arange(n, device=device) % 200 for n in (600, 200))
    speech[::2] = image[owner[::2]] + 0.2 * speech[::2]
    image[10:20] = image[10]  # ties
    return speech, image, owner, image_id


def check_gradients(task, state, device, *, backward_inside=True):
    run, leaves = task
    loss = run()
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    with STATES[state](device):
        loss = run()
        gradients = torch.autograd.grad(loss, leaves) if backward_inside else None
    found = [loss.detach(), *(gradients or torch.autograd.grad(loss, leaves))]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def check_ranks(impl, state, device):
    inputs = ranking(device)
    expected = retrieval_ranks(*inputs, impl=impl)
    with STATES[state](device):
        found = retrieval_ranks(*inputs, impl=impl)
    for field in ("speech_greater", "speech_equal", "image_greater", "image_equal", "arithmetic"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field))
    assert found.path == expected.path


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_info_nce(impl, state):
    """Torch makes the reference's backward pass, and advises against one inside of autocast."""
    inside = impl == "cpu" or state != "autocast"
    cpu = torch.device("cpu")
    check_gradients(contrastive(impl, cpu), state, cpu, backward_inside=inside)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("loss", ["normalised_mse", "cosine"])
@pytest.mark.parametrize("impl", ["reference", "padded"])
def test_denoising_attention(impl, loss, state):
    cpu = torch.device("cpu")
    task = denoising(impl, loss, cpu)
    check_gradients(task, state, cpu, backward_inside=state != "autocast")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_retrieval_ranks(processor, impl, state):
    check_ranks(impl, state, torch.device("cpu"))


def test_int8_products_that_saturate_are_not_counted():
    code = """
import torch
from cmdlab_kernels import retrieval_float32_cpu, retrieval_ranks
retrieval_float32_cpu.PAIRS = 0  # few pairs are not multiplied in int8
torch.manual_seed(0)
speech, image = (torch.randint(-2, 3, (n, 12)).float() for n in (700, 2100))
inputs = speech, image, torch.arange(700) % 3, torch.arange(2100) % 3
found, expected = (retrieval_ranks(*inputs, impl=impl) for impl in ("cpu", "reference"))
assert torch.equal(found.speech_greater, expected.speech_greater), found.shares
assert torch.equal(found.image_greater, expected.image_greater), found.shares
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # a processor with VNNI keeps it
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("state", STATES)
def test_triton_info_nce(triton_device, state):
    check_gradients(contrastive("triton", triton_device), state, triton_device)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("loss", ["normalised_mse", "cosine"])
def test_triton_denoising_attention(triton_device, loss, state):
    task = denoising("triton", loss, triton_device)
    check_gradients(task, state, triton_device, backward_inside=state != "autocast")


@pytest.mark.parametrize("state", STATES)
def test_triton_retrieval_ranks(triton_device, state):
    check_ranks("triton", state, triton_device)
