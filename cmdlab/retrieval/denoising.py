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
from typing import NamedTuple

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
    places, or the item's mean token ("pooled"). depth: the number of cross-attentions.

    The rest are controls, each of which leaves all but one thing as it is. corruption "none": the
    places are chosen and judged, and their tokens stay. context: the tokens attended to are those
    of the item's own other side, those of the batch's row before it ("other"), or one learnt token
    for all ("none"). target_of: what is to be restored is the item's own, or of the row before it.
    gradient: the loss reaches the trained heads of both sides, or of one alone.
    """

    direction: str = parameter(
        "image", "which side is corrupted", choices=("image", "speech", "both")
    )
    corruption: str = parameter(
        "mask", "what becomes of a token", choices=("swap", "gaussian", "mask", "shuffle", "none")
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
        "whose other side is attended to",
        choices=("own", "other", "none"),
    )
    target_of: str = parameter("own", "whose tokens are to be restored", choices=("own", "other"))
    gradient: str = parameter(
        "both",
        "the side whose head the loss reaches",
        choices=("both", "corrupted", "attended"),
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
        tokens[self.item, self.place] = self.table[self.index].to(tokens.dtype)
        index = self.item * tokens.shape[1] + self.place
        return Corruption(self.item, self.place, head(tokens).flatten(0, 1), index)


class Reading(NamedTuple):
    """What a denoiser reads of a batch, the items of either side in the same order."""

    tokens: Tensor  # [batch, T, width], clean, of the side that is corrupted
    lengths: Tensor  # int64 [batch]
    context: Tensor  # [batch, K, context_width] of the other modality
    context_lengths: Tensor  # int64 [batch]
    target: Tensor  # [batch, T, width], clean, of which the restored are to be
    target_lengths: Tensor  # int64 [batch]
    head: Callable[[Tensor], Tensor] | None  # reads the corrupted tokens and gives as many


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
        if settings.context == "none":
            self.constant = nn.Parameter(0.02 * torch.randn(1, context_width))

    def forward(self, reading: Reading, item_id: Tensor, generator: torch.Generator) -> Tensor:
        """The restoration loss of a batch, 0-d.

        item_id: int64 [batch], alike where tokens are of the same item. `generator` decides the
        corruption. Whose context and target `reading` holds, `readings` has chosen.
        """
        tokens = reading.tokens
        corrupted = corrupt(tokens, reading.lengths, item_id, self.settings, self.mask, generator)
        if self.settings.loss != "info_nce":
            return self.judge(corrupted, reading)
        chosen = compared(len(corrupted.item), generator)
        restored, target = self.restore(corrupted, reading)
        ids = self.target_id(item_id, corrupted.item, corrupted.place, tokens.shape[1])
        return self.compare(restored[chosen], target[chosen], ids[chosen])

    def judge(self, corrupted: Corruption, reading: Reading) -> Tensor:
        """The mean loss of the corrupted places, 0-d, each judged by itself: all but "info_nce"."""
        loss = self.settings.loss
        target, target_index = self._target(reading, corrupted)
        if self.settings.depth > 1:
            restored = self._restore(corrupted, reading)
            return restoration_loss(restored, target, target_index, loss=loss)  # type: ignore[arg-type]
        corrupted = self._read(corrupted, reading)
        context, context_lengths = self._context(reading)
        return denoising_attention(
            _narrow(corrupted.table),
            corrupted.index,
            _narrow(self.position),
            corrupted.place.clamp(max=len(self.position) - 1),
            corrupted.item,
            _narrow(context),
            context_lengths,
            self._projections(0),
            self.heads,
            _narrow(target),
            target_index,
            loss=loss,  # type: ignore[arg-type]
        )

    def restore(self, corrupted: Corruption, reading: Reading) -> tuple[Tensor, Tensor]:
        """The restored places [P, width] and what they were to be, which takes no gradient."""
        target, target_index = self._target(reading, corrupted)
        return self._restore(corrupted, reading), target[target_index]

    def compare(self, restored: Tensor, target: Tensor, target_id: Tensor) -> Tensor:
        """InfoNCE, 0-d, between places [n, width] that are restored and their targets; those of
        one `target_id` (int64 [n]) are not compared."""
        wide = torch.promote_types(restored.dtype, torch.float32)  # in autocast too
        restored, target = restored.to(wide), target.to(wide)
        return info_nce(
            nn.functional.normalize(restored, dim=-1),
            nn.functional.normalize(target, dim=-1),
            target_id,
            restored.new_tensor(10.0),
        )

    def target_id(self, item_id: Tensor, item: Tensor, place: Tensor, longest: int) -> Tensor:
        """For each corrupted place the id of its target; equal targets of one item have one id.

        item_id: int64 [N] of the whole batch.
        """
        places = longest if self.settings.target == "tokens" else 1
        if self.settings.target_of == "other":
            item_id = item_id.roll(1)
        return item_id[item] * places + place % places

    def _read(self, corrupted: Corruption, reading: Reading) -> Corruption:
        if reading.head is None:
            return corrupted
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and self.settings.gradient != "attended"
        ):
            return corrupted.read_by(reading.head, reading.tokens)

    def _context(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """What is attended to [batch, K, context_width], and how many tokens of it."""
        if self.settings.context == "none":
            lengths = torch.ones_like(reading.context_lengths)
            return self.constant.expand(len(lengths), 1, -1), lengths
        alone = self.settings.gradient == "corrupted"
        return reading.context.detach() if alone else reading.context, reading.context_lengths

    def _restore(self, corrupted: Corruption, reading: Reading) -> Tensor:
        corrupted = self._read(corrupted, reading)
        context, context_lengths = self._context(reading)
        place = corrupted.place.clamp(max=len(self.position) - 1)
        restored = corrupted.table[corrupted.index] + self.position[place]
        for i in range(self.settings.depth):
            restored = cross_attention(
                _narrow(restored),
                corrupted.item,
                _narrow(context),
                context_lengths,
                self._projections(i),
                self.heads,
            )
            if i < len(self.feed_forward):
                restored = restored + self.feed_forward[i](restored)
        return restored

    def _projections(self, i: int) -> Projections:
        return Projections(*map(_narrow, (self.query[i], self.key_value[i], self.output[i])))

    def _target(self, reading: Reading, to: Corruption) -> tuple[Tensor, Tensor]:
        """The table of clean features, without gradient, and each corrupted place's row in it."""
        clean, lengths = reading.target.detach(), reading.target_lengths.clamp(min=1)
        if self.settings.target == "tokens":
            place = to.place % lengths[to.item]  # another's may be fewer
            return clean.flatten(0, 1), to.item * clean.shape[1] + place
        valid = torch.arange(clean.shape[1], device=clean.device) < reading.target_lengths[:, None]
        total = clean.masked_fill(~valid[..., None], 0).sum(1)
        return total / lengths[:, None], to.item


def _narrow(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype, where that is on: the kernels compute in their inputs'."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _weights(outputs: int, inputs: int, count: int) -> nn.ParameterList:
    """Weights of linear maps without bias, as `nn.Linear` initialises them."""
    return nn.ParameterList(nn.Linear(inputs, outputs, bias=False).weight for _ in range(count))


@dataclass(frozen=True)
class Draw:
    """All that is left to chance in corrupting a batch: P places and whose token is put at each.

    It knows lengths and ids alone, so whoever has a part of the batch can draw for all of it.
    """

    item: Tensor  # int64 [P], never decreasing; like all that follows, on the CPU
    place: Tensor  # int64 [P]
    donor: Tensor  # int64 [P], the item of the token that is put there
    donor_place: Tensor  # int64 [P], and its place within that item
    noise: Tensor | None  # float32 [P, width], for "gaussian"

    def put(self, tokens: Tensor, first: int = 0) -> Tensor:
        """What is put at each place [P, width], of tokens [n, T, width] of the items from `first`
        on; zero where the donor is another item. Not for "mask"."""
        of = self.donor - first
        row = ((of >= 0) & (of < len(tokens))).nonzero()[:, 0]
        taken = tokens[of[row].to(tokens.device), self.donor_place[row].to(tokens.device)]
        if self.noise is not None:
            noise = self.noise[row].to(tokens.device)
            taken = taken + noise * taken.std(-1, keepdim=True)
        put = taken.new_zeros(len(self.item), tokens.shape[2])
        return put.index_copy(0, row.to(tokens.device), taken)


def corrupt(
    tokens: Tensor,
    lengths: Tensor,
    item_id: Tensor,
    settings: Denoising,
    mask: Tensor,
    generator: torch.Generator,
) -> Corruption:
    """Choose the places to corrupt and what is put there.

    tokens: [batch, T, width]; mask: [1, width], for "mask"; the rest as in `draw`.
    """
    drawn = draw(lengths, item_id, tokens.shape[1], tokens.shape[2], settings, generator)
    table = mask if settings.corruption == "mask" else drawn.put(tokens)
    return corruption(drawn.item, drawn.place, table)


def corruption(item: Tensor, place: Tensor, table: Tensor) -> Corruption:
    """The corruption of P places by a token for each, `table` [P, width], or by one for all."""
    index = torch.zeros_like(item) if len(table) == 1 else torch.arange(len(item))
    return Corruption(*(part.to(table.device) for part in (item, place, table, index)))


def draw(
    lengths: Tensor,
    item_id: Tensor,
    longest: int,
    width: int,
    settings: Denoising,
    generator: torch.Generator,
) -> Draw:
    """Draw the places and the donors of a batch whose tokens are [batch, longest, width].

    lengths, item_id: int64 [batch]. Of each item round(rate · length) places are chosen, at least
    one where it has any. `generator` is a CPU generator, so the choice does not depend on the
    device.
    """
    lengths, item_id = lengths.cpu(), item_id.cpu()
    valid = torch.arange(longest) < lengths[:, None]
    order = torch.rand(len(lengths), longest, generator=generator).masked_fill(~valid, 2.0)
    count = (settings.rate * lengths).round().clamp(min=1).minimum(lengths)
    chosen = order.argsort(1).argsort(1) < count[:, None]
    item, place = chosen.nonzero(as_tuple=True)
    donor, at, noise = item, place, None
    if settings.corruption == "gaussian":
        noise = torch.randn(len(item), width, generator=generator)
    elif settings.corruption == "swap":
        filled = lengths.nonzero().flatten()  # an item without tokens has none to give
        order = item_id[filled].argsort(stable=True)
        filled, ids = filled[order], item_id[filled][order]
        own = item_id[item]
        past = torch.searchsorted(ids, own, right=True)  # behind those of the same item
        others = len(filled) - (past - torch.searchsorted(ids, own))
        step = (torch.rand(item.shape, generator=generator) * others).long()
        donor = torch.where(others > 0, filled[(past + step) % max(len(filled), 1)], item)
        at = (torch.rand(item.shape, generator=generator) * lengths[donor]).long()
        at = torch.where(others > 0, at, place)
    elif settings.corruption == "shuffle":
        others = lengths[item] - 1
        step = (torch.rand(item.shape, generator=generator) * others).long()
        at = (place + 1 + step) % (others + 1)
    return Draw(item, place, donor, at, noise)


def compared(places: int, generator: torch.Generator) -> Tensor:
    """The corrupted places that InfoNCE compares, int64 [at most NEGATIVES], drawn after them."""
    return torch.randperm(places, generator=generator)[:NEGATIVES]
