"""Cross-Modal Denoising (Zhou et al. 2024): a task beside contrastive training, never at retrieval.

Some tokens of one modality are corrupted as the frozen encoder gave them, and read by that
modality's trained head where it has one; the `Denoiser` restores them by attending to the clean
tokens of the other modality. The target takes no gradient and is of the frozen encoder's tokens, so
it cannot be made easier by making the head's tokens poorer. Only the corrupted places are restored.
Which modality is corrupted, how and how much, what is to be restored and how the restoration is
judged, are the study's axes.

A mask token tells nothing of what it hides. Where no head reads the tokens around it, as with the
global image head, it is restored from the other modality alone; under the pooled target that is to
tell the picture's mean patch from speech, and the rate is but the number of times it is asked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cmdlab_kernels.denoising_attention import (
    Projections,
    cross_attention,
    denoising_attention,
    restoration_loss,
)
from cmdlab_kernels.info_nce import info_nce
from torch import Tensor, nn

from cmdlab.errors import InputError, check_types
from cmdlab.retrieval.recipe import check_choices, parameter

NEGATIVES = 512  # corrupted places that the InfoNCE loss compares with each other


@dataclass(frozen=True)
class Denoising:
    """One point of the study's axes.

    direction: the modality that is corrupted. corruption: a token is replaced by one of another
    item of the batch ("swap"), by itself with noise of its own standard deviation ("gaussian"), by
    a learnt token ("mask"), or by another one of the same item ("shuffle"); where there is no other
    one it stays. rate: the fraction of an item's tokens. target: the clean "tokens" at those
    places, or the item's mean token ("pooled"). depth: the number of cross-attentions. context: the
    tokens attended to are those of the item's "own" other side or, as a control that leaves all
    but the pairing as it is, of the batch's row before it ("other").
    """

    direction: str = parameter(
        "image", "which side is corrupted", choices=("image", "speech", "both")
    )
    corruption: str = parameter(
        "mask", "what becomes of a token", choices=("swap", "gaussian", "mask", "shuffle")
    )
    rate: float = parameter(0.1, "fraction of the tokens that is corrupted, above 0, at most 1")
    target: str = parameter("pooled", "what is to be restored", choices=("tokens", "pooled"))
    loss: str = parameter(
        "normalised_mse",
        "how the restored is judged",
        choices=("normalised_mse", "cosine", "info_nce"),
    )
    depth: int = parameter(2, "cross-attentions of the denoiser")
    context: str = parameter(
        "own",
        "whose other side is attended to, another pair's as a control",
        choices=("own", "other"),
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        if not 0 < self.rate <= 1:
            raise InputError(f"rate: {self.rate} does not lie in (0, 1]")
        if self.depth < 1:
            raise InputError(f"depth: {self.depth} is not at least 1")


@dataclass(frozen=True)
class Corruption:
    """P corrupted places over a batch; the query at place p is `table[index[p]]`."""

    item: Tensor  # int64 [P], never decreasing
    place: Tensor  # int64 [P]
    table: Tensor  # [S, width]
    index: Tensor  # int64 [P]

    def read_by(self, head: Callable[[Tensor], Tensor], clean: Tensor) -> "Corruption":
        """The same places in what `head` makes of the tokens [batch, T, width] with these in."""
        tokens = clean.clone()
        tokens[self.item, self.place] = self.table[self.index]
        index = self.item * tokens.shape[1] + self.place
        return Corruption(self.item, self.place, head(tokens).flatten(0, 1), index)


class Denoiser(nn.Module):
    """Restores corrupted tokens of one modality by cross-attention to the other's.

    width, context_width: of the tokens of either side; longest: how many of the corrupted side's
    places have a position of their own (later ones share the last).
    """

    def __init__(
        self, settings: Denoising, width: int, context_width: int, longest: int, heads: int = 4
    ) -> None:
        super().__init__()
        self.settings = settings
        self.heads = heads
        self.position = nn.Parameter(0.02 * torch.randn(longest, width))
        self.mask = nn.Parameter(0.02 * torch.randn(1, width))
        self.query = _weights(width, width, settings.depth)
        self.key_value = _weights(2 * width, context_width, settings.depth)
        self.output = _weights(width, width, settings.depth)
        self.feed_forward = nn.ModuleList(  # one between two cross-attentions
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(settings.depth - 1)
        )

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        context: Tensor,
        context_lengths: Tensor,
        item_id: Tensor,
        generator: torch.Generator,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The restoration loss of a batch, 0-d.

        tokens: [batch, T, width], clean, to be corrupted; context: [batch, K, context_width] of the
        other modality; lengths: int64 [batch] of each; item_id: int64 [batch], alike where tokens
        are of the same item. `generator` decides the corruption. `head` reads the corrupted tokens
        and gives as many; without one the denoiser reads them itself. The targets take no gradient.
        """
        corrupted = corrupt(tokens, lengths, item_id, self.settings, self.mask, generator)
        target, target_index = self._target(tokens, lengths, corrupted)
        if head is not None:
            corrupted = corrupted.read_by(head, tokens)
        if self.settings.context == "other":
            context, context_lengths = context.roll(1, 0), context_lengths.roll(1)
        position = self.position
        place = corrupted.place.clamp(max=len(position) - 1)
        if self.settings.depth == 1 and self.settings.loss != "info_nce":
            return denoising_attention(
                corrupted.table,
                corrupted.index,
                position,
                place,
                corrupted.item,
                context,
                context_lengths,
                self._projections(0),
                self.heads,
                target,
                target_index,
                loss=self.settings.loss,  # type: ignore[arg-type]
            )
        restored = corrupted.table[corrupted.index] + position[place]
        for i in range(self.settings.depth):
            restored = cross_attention(
                restored, corrupted.item, context, context_lengths, self._projections(i), self.heads
            )
            if i < len(self.feed_forward):
                restored = restored + self.feed_forward[i](restored)
        if self.settings.loss != "info_nce":
            return restoration_loss(restored, target, target_index, loss=self.settings.loss)  # type: ignore[arg-type]
        chosen = torch.randperm(len(restored), generator=generator)[:NEGATIVES]
        return info_nce(
            nn.functional.normalize(restored[chosen], dim=-1),
            nn.functional.normalize(target[target_index[chosen]], dim=-1),
            self._target_id(item_id, corrupted, tokens.shape[1])[chosen],
            restored.new_tensor(10.0),
        )

    def _projections(self, i: int) -> Projections:
        return Projections(self.query[i], self.key_value[i], self.output[i])

    def _target(self, tokens: Tensor, lengths: Tensor, to: Corruption) -> tuple[Tensor, Tensor]:
        """The table of clean features, without gradient, and each corrupted place's row in it."""
        clean = tokens.detach()
        if self.settings.target == "tokens":
            return clean.flatten(0, 1), to.item * tokens.shape[1] + to.place
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        total = clean.masked_fill(~valid[..., None], 0).sum(1)
        return total / lengths.clamp(min=1)[:, None], to.item

    def _target_id(self, item_id: Tensor, to: Corruption, longest: int) -> Tensor:
        """For each corrupted place the id of its target; equal targets of one item have one id."""
        places = longest if self.settings.target == "tokens" else 1
        return item_id[to.item] * places + to.place % places


def _weights(outputs: int, inputs: int, count: int) -> nn.ParameterList:
    """Weights of linear maps without bias, as `nn.Linear` initialises them."""
    return nn.ParameterList(nn.Linear(inputs, outputs, bias=False).weight for _ in range(count))


def corrupt(
    tokens: Tensor,
    lengths: Tensor,
    item_id: Tensor,
    settings: Denoising,
    mask: Tensor,
    generator: torch.Generator,
) -> Corruption:
    """Choose the places to corrupt and what is put there.

    tokens: [batch, T, width]; lengths, item_id: int64 [batch]; mask: [1, width], for "mask".
    Of each item round(rate · length) places are chosen, at least one where it has any.
    `generator` is a CPU generator, so the choice does not depend on the device.
    """
    batch, longest, width = tokens.shape
    device = tokens.device
    host_lengths = lengths.cpu()
    valid = torch.arange(longest) < host_lengths[:, None]
    order = torch.rand(batch, longest, generator=generator).masked_fill(~valid, 2.0)
    count = (settings.rate * host_lengths).round().clamp(min=1).minimum(host_lengths)
    chosen = order.argsort(1).argsort(1) < count[:, None]
    item, place = chosen.nonzero(as_tuple=True)
    flat = tokens.flatten(0, 1)
    if settings.corruption == "mask":
        table, index = mask, torch.zeros_like(item)
    elif settings.corruption == "gaussian":
        clean = flat[(item * longest + place).to(device)]
        noise = torch.randn(len(item), width, generator=generator).to(device)
        table = clean + noise * clean.std(-1, keepdim=True)
        index = torch.arange(len(item))
    else:
        donor = item
        if settings.corruption == "swap":
            filled = host_lengths.nonzero().flatten()  # an item without tokens has none to give
            order = item_id.cpu()[filled].argsort(stable=True)
            filled, ids = filled[order], item_id.cpu()[filled][order]
            own = item_id.cpu()[item]
            past = torch.searchsorted(ids, own, right=True)  # behind those of the same item
            others = len(filled) - (past - torch.searchsorted(ids, own))
            step = (torch.rand(item.shape, generator=generator) * others).long()
            donor = torch.where(others > 0, filled[(past + step) % max(len(filled), 1)], item)
            at = (torch.rand(item.shape, generator=generator) * host_lengths[donor]).long()
            at = torch.where(others > 0, at, place)
        else:
            others = host_lengths[item] - 1
            step = (torch.rand(item.shape, generator=generator) * others).long()
            at = (place + 1 + step) % (others + 1)
        table, index = flat, donor * longest + at
    return Corruption(item.to(device), place.to(device), table, index.to(device))
