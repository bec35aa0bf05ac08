"""Training on several devices, or on one in several portions, to what one computes at once.

The rows of a step's batch are shared out: a process that `torchrun` started has one share, which it
may cut into chunks that are computed one after another. What a loss needs of all rows is exchanged
without its graph: the embeddings, the tokens that a swap puts into another share, the restored
places that InfoNCE compares. The loss of the whole batch is taken on these as leaves, and the
gradient of a share's own rows goes back through that share. This is gathering with gradients, of
which none has to be sent back; and with chunks, which are encoded once without their graph and
again with it, it is GradCache (Gao et al. 2021, arXiv 2101.06983).

The gradients of all shares are then summed in one flat buffer. DistributedDataParallel would not
do: it averages, it expects one backward pass of a step, and it leaves a parameter alone that is
used outside its forward, as the temperature is.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from typing import cast

import torch
import torch.distributed as dist
from cmdlab_kernels.info_nce import info_nce
from torch import Tensor, nn

from cmdlab.errors import InputError
from cmdlab.retrieval.denoising import (
    Corruption,
    Denoiser,
    Reading,
    compared,
    corruption,
    draw,
)
from cmdlab.retrieval.losses import (
    Batch,
    Losses,
    encode,
    item_ids,
    readings,
    settings_of,
)
from cmdlab.retrieval.model import RetrievalModel


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes of `torchrun` for the time of a `with`, and give this one's device.

    device: "cpu" (exchanged by gloo) or "cuda" (by NCCL, each process with a GPU of its own).
    Without torchrun nothing is joined and the device is as given.
    Raises InputError for a GPU named by its number under torchrun, and for more processes than
    GPUs.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device not in ("cpu", "cuda"):
        raise InputError(
            f"device: under torchrun each process has a GPU of its own; say cuda, not {device}"
        )
    if device == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise InputError(
                f"torchrun started more processes than there are GPUs; say --nproc-per-node {there}"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    # The first process may work alone for hours, on features, while the others wait for it.
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl", timeout=timedelta(days=7), init_method="env://"
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this is the one process that writes, prints and shows progress."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process through the `with` before the others: they find what it made."""
    if not is_first_process():
        dist.barrier()
    yield
    if is_first_process() and process_count() > 1:
        dist.barrier()


def check_alike(number: int, device: str, message: str) -> None:
    """Raise InputError with the message where the processes do not all have the same number."""
    if process_count() > 1:
        ends = torch.tensor([number, -number], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise InputError(message)


def rows_of_process(total: int, denoisers: nn.ModuleDict) -> Tensor:
    """The rows, int64 [n], of a batch of `total` pairs that this process loads: those of its share.

    Where a denoiser needs the row before, as a control, that of the first one comes first.
    """
    share = _share(total)
    return torch.arange(int(share[0]) - _behind(denoisers), int(share[-1]) + 1) % total


def backward_in_shares(
    model: RetrievalModel,
    denoisers: nn.ModuleDict,
    loaded: Batch,
    total: int,
    weight: float,
    generator: torch.Generator,
    *,
    chunk: int = 0,
    precision: torch.dtype | None = None,
) -> Losses:
    """Add the gradients of `training_losses` of a batch of `total` pairs to the parameters, and
    return these losses.

    loaded: the `rows_of_process` of it, on any device. chunk: pairs of them that are moved to the
    model's device and computed at a time, 0 for all. precision: of autocast, None without.

    Every process calls it with the same weights and the same state of `generator` and is left with
    the same gradients, which must be None before. Each chunk starts from a random state of its own,
    so dropout is the same in both of its forward passes.
    """
    device, seed = model.log_scale.device, generator.initial_seed()
    settings, behind, share = settings_of(denoisers), _behind(denoisers), _share(total)
    chunks = [(int(own[0]), int(own[-1]) + 1) for own in share.split(chunk or len(share))]
    whole = len(chunks) == 1  # then its graph is kept, and nothing is computed twice
    lengths, image_id = loaded.lengths.new_zeros(2, total, device=device)
    lengths[share] = loaded.lengths[behind:].to(device)
    image_id[share] = loaded.image_id[behind:].to(device)
    _add_up(lengths, image_id)
    token_counts = {
        "image": torch.full((total,), loaded.patches.shape[1]),
        "speech": lengths.cpu(),
    }
    item_id = item_ids(image_id.cpu())
    restorations = {
        side: _Restoration(cast(Denoiser, one), token_counts[side], item_id[side], generator)
        for side, one in denoisers.items()
    }
    autocast = partial(torch.autocast, device.type, precision, enabled=precision is not None)

    @lru_cache(maxsize=1)
    def encoded(first: int, last: int, graph: bool) -> tuple[Tensor, Tensor, dict[str, Reading]]:
        torch.manual_seed((seed + first) % 2**64)
        begin = first - int(share[0])
        batch = _part(loaded, begin, last - first + begin + behind, device)
        with torch.set_grad_enabled(graph), autocast():
            made = encode(model, batch)
        return (
            made.speech[behind:],
            made.image[behind:],
            readings(model, batch, made, settings, behind),
        )

    @lru_cache(maxsize=max(len(restorations), 1))
    def restored(side: str, first: int, last: int, graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        reading = encoded(first, last, graph)[2][side]
        with torch.set_grad_enabled(graph), autocast():
            return restorations[side].restore(reading, first, last)

    speech = model.log_scale.detach().new_zeros(total, model.shape.embedding)
    image = torch.zeros_like(speech)
    for first, last in chunks:
        own_speech, own_image, reading = encoded(first, last, whole)
        speech[first:last], image[first:last] = own_speech.detach(), own_image.detach()
        for side, one in restorations.items():
            one.put_of(reading[side].tokens, first)
    _add_up(speech, image, *(one.put for one in restorations.values()))
    comparing = {side: one for side, one in restorations.items() if one.compares}
    for first, last in chunks if comparing else []:
        for side, one in comparing.items():
            one.gather(*restored(side, first, last, whole))
    for one in comparing.values():
        _add_up(one.restored, one.target)
        one.compare()

    contrastive = info_nce(speech.requires_grad_(), image.requires_grad_(), image_id, model.scale)
    d_speech, d_image, d_scale = torch.autograd.grad(contrastive, (speech, image, model.log_scale))
    if is_first_process():  # every process has all of it, and it is to be counted once
        model.log_scale.grad = d_scale
    for first, last in chunks:
        own_speech, own_image, reading = encoded(first, last, True)
        gradients = [(own_speech, d_speech[first:last]), (own_image, d_image[first:last])]
        for side, one in restorations.items():
            if one.compares:
                at, places, _ = restored(side, first, last, True)
                value, gradient = places, one.d_restored[at]
            else:
                with autocast():
                    value = one.judge(reading[side], first, last)
                gradient = torch.ones_like(value)
            gradients.append((value, weight / len(restorations) * gradient))
        values, given = zip(*((v, g) for v, g in gradients if v.requires_grad), strict=True)
        torch.autograd.backward(values, given)
    _add_up_gradients([*model.parameters(), *denoisers.parameters()])
    contrastive = contrastive.detach()
    if not restorations:
        return Losses(contrastive, contrastive, None)
    _add_up(*(one.loss for one in restorations.values() if not one.compares))
    denoising = torch.stack([one.loss for one in restorations.values()]).mean()
    return Losses(contrastive + weight * denoising, contrastive, denoising)


class _Restoration:
    """One denoiser's part in a batch of which each share restores its own corrupted places."""

    def __init__(
        self, denoiser: Denoiser, lengths: Tensor, item_id: Tensor, generator: torch.Generator
    ) -> None:
        """lengths, item_id: int64 [N], of the whole batch, on the CPU."""
        self.denoiser, self.settings = denoiser, denoiser.settings
        self.compares = self.settings.loss == "info_nce"
        longest, width = int(lengths.max()), denoiser.mask.shape[1]
        self.drawn = draw(lengths, item_id, longest, width, self.settings, generator)
        places = len(self.drawn.item)
        new = denoiser.mask.detach().new_zeros
        self.put = new(0 if self.settings.corruption == "mask" else places, width)
        self.loss = new(())
        if self.compares:
            self.chosen = compared(places, generator)
            self.restored, self.target = new(len(self.chosen), width), new(len(self.chosen), width)
            self.target_id = denoiser.target_id(
                item_id, self.drawn.item, self.drawn.place, longest
            )[self.chosen].to(new(0).device)

    def put_of(self, tokens: Tensor, first: int) -> None:
        """Add what the items from `first` on give to the corrupted places of all."""
        if len(self.put):
            self.put += self.drawn.put(tokens, first)

    def judge(self, reading: Reading, first: int, last: int) -> Tensor:
        """What the places of the items first .. last - 1 add to the loss of all, 0-d."""
        corrupted, _ = self._corruption(first, last)
        part = len(corrupted.item) / max(len(self.drawn.item), 1)
        value = self.denoiser.judge(corrupted, reading) * part
        self.loss += value.detach()
        return value

    def restore(self, reading: Reading, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the places that are compared, those of the items first .. last - 1: which they are,
        int64 [n], and restored and target [n, width]."""
        corrupted, begin = self._corruption(first, last)
        within = self.chosen - begin
        at = ((within >= 0) & (within < len(corrupted.item))).nonzero()[:, 0]
        restored, target = self.denoiser.restore(corrupted, reading)
        place = within[at].to(restored.device)
        restored = restored[place].to(self.restored.dtype)  # a narrower one in autocast
        return at.to(restored.device), restored, target[place].to(self.target.dtype)

    def gather(self, at: Tensor, restored: Tensor, target: Tensor) -> None:
        self.restored[at], self.target[at] = restored.detach(), target

    def compare(self) -> None:
        """The loss of all, and its gradient by what was restored."""
        leaf = self.restored.requires_grad_()
        loss = self.denoiser.compare(leaf, self.target, self.target_id)
        (self.d_restored,) = torch.autograd.grad(loss, leaf)
        self.loss = loss.detach()

    def _corruption(self, first: int, last: int) -> tuple[Corruption, int]:
        """The corrupted places of the items first .. last - 1, and how many come before them."""
        ends = torch.tensor([first, last])
        begin, end = torch.searchsorted(self.drawn.item, ends).tolist()
        masked = self.settings.corruption == "mask"
        table = self.denoiser.mask if masked else self.put[begin:end]
        item, place = self.drawn.item[begin:end] - first, self.drawn.place[begin:end]
        return corruption(item, place, table), begin


def _share(total: int) -> Tensor:
    """The rows whose loss this process computes: some that lie together, int64 [n]."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(total).tensor_split(process_count())[rank]


def _behind(denoisers: nn.ModuleDict) -> int:
    """1 where a row's context or target is that of the row before it, else 0."""
    settings = settings_of(denoisers)
    return int(settings is not None and "other" in (settings.context, settings.target_of))


def _part(batch: Batch, first: int, last: int, device: torch.device) -> Batch:
    """The rows first .. last - 1, on the device."""
    begin, end = batch.lengths[:first].sum(), batch.lengths[:last].sum()
    part = Batch(batch.states[:, begin:end], *(tensor[first:last] for tensor in batch[1:]))
    return Batch(*(tensor.to(device) for tensor in part))


def _add_up(*tensors: Tensor) -> None:
    """Sum each over the processes, in place."""
    if process_count() > 1:
        for tensor in tensors:
            if tensor.numel():
                dist.all_reduce(tensor)


def _add_up_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over the processes; where none has one, there is none."""
    if process_count() == 1:
        return
    used = torch.stack([one.new_tensor(float(one.grad is not None)) for one in parameters])
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    flat = torch.cat([*(part.flatten() for part in parts), used])
    dist.all_reduce(flat)
    *gradients, used = flat.split([*(one.numel() for one in parameters), len(parameters)])
    for one, gradient, users in zip(parameters, gradients, used.tolist(), strict=True):
        one.grad = gradient.view_as(one) if users else None
