"""Time InfoNCE, forward and back, against its reference, torch.compile of it, and open_clip."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import GRAPH, gate, peak_memory, row, timings
from cmdlab_kernels.info_nce import info_nce, info_nce_reference
from torch import Tensor

GATE_ROWS = 2048  # float64 holds this many squared
GATE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
Leaves = tuple[Tensor, Tensor, Tensor, Tensor]  # speech, image, image_id, scale


def benchmark(device: str, quick: bool, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cuda":
        sizes = [(2048, 768)] if quick else [(4096, 768), (32768, 768)]
    else:
        sizes = [(64, 256)] if quick else [(128, 256), (512, 256), (2048, 256)]
    product = ceilings[str(dtype).removeprefix("torch.")]
    rows = []
    for n, d in sizes:
        torch.compiler.reset()
        losses = providers()
        for name, loss in losses.items():
            check(name, loss, inputs(min(n, GATE_ROWS), d, dtype, device))
        leaves = inputs(n, d, dtype, device)
        for mode, products in (("forward", 1), ("forward + backward", 4)):
            flops, least_bytes = products * 2.0 * n * n * d, products * leaves[0].nbytes * 2.0
            run = forward if mode == "forward" else forward_backward
            functions = {k: partial(run, f, leaves) for k, f in losses.items()}
            rows += [
                row(
                    *("info_nce", name, mode, str(dtype).removeprefix("torch.")),
                    *(f"{n}x{d}", "seconds", seconds),
                    flops=flops,
                    least_bytes=least_bytes,
                    floor=max(flops / product, least_bytes / ceilings["copy"]),
                    peak_memory_bytes=peak_memory(functions[name.removesuffix(GRAPH)], device),
                )
                for name, seconds in timings(functions, device).items()
            ]
    return rows


def inputs(n: int, d: int, dtype: torch.dtype, device: str) -> Leaves:
    """Pairs of distinct images, since open_clip's loss knows no ids."""
    generator = torch.Generator().manual_seed(0)
    speech = F.normalize(torch.randn(n, d, generator=generator), dim=-1)
    image = F.normalize(speech + torch.randn(n, d, generator=generator), dim=-1)
    scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)
    embeddings = [x.to(device, dtype).requires_grad_() for x in (speech, image)]
    return embeddings[0], embeddings[1], torch.arange(n, device=device), scale


def providers() -> dict[str, Callable[..., Tensor]]:
    losses: dict[str, Callable[..., Tensor]] = {
        "cmdlab_kernels": info_nce,
        "reference": info_nce_reference,
        "torch.compile": torch.compile(info_nce_reference, dynamic=False),
    }
    try:
        from open_clip.loss import ClipLoss
    except ImportError as error:
        print(f"open_clip is left out: {error}", file=sys.stderr)
    else:
        clip_loss = ClipLoss()
        losses["open_clip ClipLoss"] = lambda speech, image, _, scale: clip_loss(
            image, speech, scale.to(image.dtype)
        )
    return losses


def forward(loss: Callable[..., Tensor], leaves: Leaves) -> Tensor:
    with torch.no_grad():
        return loss(*leaves)


def forward_backward(loss: Callable[..., Tensor], leaves: Leaves) -> list[Tensor]:
    result = loss(*leaves)
    differentiable = [x for x in leaves if x.requires_grad]
    return [result.detach(), *torch.autograd.grad(result, differentiable)]


def check(name: str, loss: Callable[..., Tensor], leaves: Leaves) -> None:
    """Compare loss and gradients with the reference in float64."""
    speech, image, image_id, scale = leaves
    exact = tuple(x.detach().double().requires_grad_() for x in (speech, image, scale))
    truth = forward_backward(info_nce_reference, (exact[0], exact[1], image_id, exact[2]))
    for found, expected in zip(forward_backward(loss, leaves), truth, strict=True):
        error = (found.double() - expected).abs().max() / expected.abs().max()
        gate(name, bool(error <= GATE_ERROR[speech.dtype]))
