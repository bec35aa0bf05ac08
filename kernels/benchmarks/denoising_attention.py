"""Time the denoising task, forward and back, against pipelines of torch's own attention.

The peers do the whole task too: gather the donors, project, attend, project, add the residual, take
the loss. "dense" computes every query, as a padded batch comes; "padded" the corrupted ones alone,
padded to the longest item, whose length it is told. FlexAttention's block mask is made beforehand.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import GRAPH, gate, peak_memory, row, timings
from cmdlab_kernels.denoising_attention import (
    Projections,
    denoising_attention,
    restoration_loss,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

RATE = 0.3
GATE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
BACKENDS = {
    "cpu": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "cuda": [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}  # on CUDA the flash backend takes no mask
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One batch. The differentiable inputs are `clean`, `position`, `tokens` and the weights."""

    clean: Tensor  # [B · T, D]
    donor: Tensor  # [P]
    position: Tensor  # [T, D]
    place: Tensor  # [P]
    item: Tensor  # [P]
    tokens: Tensor  # [B, K, E]
    lengths: Tensor  # [B]
    projections: Projections
    heads: int

    def leaves(self) -> list[Tensor]:
        return [self.clean, self.position, self.tokens, *self.projections]

    def valid(self) -> Tensor:  # [B, K]
        return torch.arange(self.tokens.shape[1], device=self.item.device) < self.lengths[:, None]

    def converted(self, dtype: torch.dtype) -> "Task":
        clean, position, tokens, *weights = (
            x.detach().to(dtype).requires_grad_() for x in self.leaves()
        )
        return Task(
            *(clean, self.donor, position, self.place, self.item),
            *(tokens, self.lengths, Projections(*weights), self.heads),
        )


def benchmark(device: str, quick: bool, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    # items, places an item, keys, heads, width of a head
    if device == "cpu":
        sizes = [(items, 64, 64, 4, 32) for items in ((8,) if quick else (32, 128, 512))]
    else:
        sizes = [(items, 257, 300, 12, 64) for items in ((8,) if quick else (64, 256))]
    return [row for size in sizes for row in _size(size, device, ceilings)]


def _size(size: tuple[int, ...], device: str, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    torch.compiler.reset()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    task = make_task(size, dtype, device)
    flops, least_bytes = forward_cost(task, dtype.itemsize)
    product = ceilings[str(dtype).removeprefix("torch.")]
    wide = task.converted(torch.float64)
    exact = forward_backward(wide, partial(ours, wide, impl="padded"))
    runnable = {}
    for name, loss in providers(task, device).items():
        try:
            found = forward_backward(task, loss)
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            print(f"{name} is left out, it does not run: {reason}", file=sys.stderr)
            continue
        for value, truth in zip(found, exact, strict=True):
            error = (value.double() - truth).abs().max() / truth.abs().max()
            gate(name, bool(error <= GATE_ERROR[dtype]))
        runnable[name] = loss
    rows = []
    for mode, passes in (("forward", 1), ("forward + backward", 3)):
        run = forward if mode == "forward" else partial(forward_backward, task)
        functions = {k: partial(run, f) for k, f in runnable.items()}
        rows += [
            row(
                *("denoising_attention", name, mode, str(dtype).removeprefix("torch.")),
                *("B{} T{} K{} H{} d{}".format(*size), "seconds", seconds),
                flops=passes * flops,
                least_bytes=passes * least_bytes,
                floor=passes * max(flops / product, least_bytes / ceilings["copy"]),
                peak_memory_bytes=peak_memory(functions[name.removesuffix(GRAPH)], device),
            )
            for name, seconds in timings(functions, device).items()
        ]
    return rows


def make_task(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Task:
    """Swap at `RATE`, with keys between two thirds of the longest and the longest."""
    b, t, k, heads, head_width = size
    generator = torch.Generator().manual_seed(0)
    width = heads * head_width

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return values.to(device, dtype).requires_grad_()

    item, place = (torch.rand(b, t, generator=generator) < RATE).nonzero(as_tuple=True)
    donor = torch.randint(b * t, item.shape, generator=generator)
    lengths = torch.randint(2 * k // 3, k + 1, (b,), generator=generator)
    lengths[0] = k
    donor, place, item, lengths = (x.to(device) for x in (donor, place, item, lengths))
    weights = Projections(normal(width, width), normal(2 * width, width), normal(width, width))
    clean, position, tokens = normal(b * t, width), normal(t, width), normal(b, k, width)
    return Task(clean, donor, position, place, item, tokens, lengths, weights, heads)


def forward_cost(task: Task, itemsize: int) -> tuple[float, float]:
    """Operations of the projections and the attention, and the bytes of all inputs read once."""
    p, width = len(task.item), task.clean.shape[1]
    keys = int(task.lengths.sum())
    pairs = int(task.lengths[task.item].sum())
    work = 2 * width * width * (2 * p + 2 * keys) + 4 * pairs * width
    moved = itemsize * width * (3 * p + keys + 4 * width)
    return float(work), float(moved)


def providers(task: Task, device: str) -> dict[str, Callable[[], Tensor]]:
    counts = torch.bincount(task.item, minlength=len(task.lengths))
    longest = int(counts.max())
    slot = torch.arange(len(task.item), device=device) - (counts.cumsum(0) - counts)[task.item]
    dense = partial(dense_pipeline, task, task.item * len(task.position) + task.place)
    padded = partial(padded_pipeline, task, task.item * longest + slot, longest)
    mask = task.valid()[:, None, None]
    found: dict[str, Callable[[], Tensor]] = {"cmdlab_kernels": partial(ours, task)}
    if device == "cpu":
        found["reference"] = partial(ours, task, impl="reference")
    for backend in BACKENDS[device]:
        attend = partial(attend_with, backend, mask)
        name = backend.name.removesuffix("_ATTENTION").lower()
        found[f"dense, SDPA {name}"] = partial(dense, attend)
        found[f"padded, SDPA {name}"] = partial(padded, attend)
    compiled = torch.compile(padded, dynamic=False)
    found["padded, torch.compile"] = partial(compiled, partial(plain_attention, mask))
    if device == "cuda":  # on the CPU it has no backward
        lengths = task.lengths

        def in_item(item: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key < lengths[item]

        blocks = create_block_mask(
            in_item, len(lengths), None, longest, task.tokens.shape[1], device=device
        )
        attend = partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks)
        found["padded, FlexAttention"] = partial(padded, attend)
    return found


def ours(task: Task, impl: Any = "auto") -> Tensor:
    index = task.item * len(task.position) + task.place
    return denoising_attention(
        *(task.clean, task.donor, task.position, task.place, task.item, task.tokens),
        *(task.lengths, task.projections, task.heads, task.clean, index),
        impl=impl,
    )


def dense_pipeline(task: Task, row: Tensor, attend: Attend) -> Tensor:
    """Compute every query, then the loss of the corrupted ones."""
    b, (t, d) = len(task.lengths), task.position.shape
    query = task.clean.index_copy(0, row, task.clean[task.donor]).view(b, t, d) + task.position
    q = split_heads(F.linear(query, task.projections.query), task.heads)
    out = attend(q, *keys_and_values(task)).transpose(1, 2).flatten(2)
    restored = query + F.linear(out, task.projections.output)
    return restoration_loss(restored.flatten(0, 1)[row], task.clean, row, impl="reference")


def padded_pipeline(task: Task, row: Tensor, longest: int, attend: Attend) -> Tensor:
    """Compute the corrupted queries, `longest` places an item."""
    b, target = len(task.lengths), task.item * len(task.position) + task.place
    query = task.clean[task.donor] + task.position[task.place]
    q = F.linear(query, task.projections.query)
    q = q.new_zeros(b * longest, q.shape[1]).index_copy(0, row, q).view(b, longest, -1)
    out = attend(split_heads(q, task.heads), *keys_and_values(task))
    out = out.transpose(1, 2).flatten(2).flatten(0, 1)[row]
    restored = query + F.linear(out, task.projections.output)
    return restoration_loss(restored, task.clean, target, impl="reference")


def keys_and_values(task: Task) -> tuple[Tensor, Tensor]:
    keys, values = F.linear(task.tokens, task.projections.key_value).chunk(2, dim=-1)
    return split_heads(keys, task.heads), split_heads(values, task.heads)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, tokens, d]


def attend_with(backend: SDPBackend, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def plain_attention(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def forward(loss: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return loss()


def forward_backward(task: Task, loss: Callable[[], Tensor]) -> list[Tensor]:
    result = loss()
    return [result.detach(), *torch.autograd.grad(result, task.leaves())]
