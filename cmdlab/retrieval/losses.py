"""The loss of a training step: contrastive, and restoration beside it."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from cmdlab_kernels.info_nce import info_nce
from torch import Tensor, nn

from cmdlab.retrieval.denoising import Denoiser, Denoising, Reading
from cmdlab.retrieval.model import RetrievalModel, Shape


class Batch(NamedTuple):
    """N captions, each with its image, as the frozen encoders give them."""

    states: Tensor  # [layers, all tokens, width] of the speech, caption after caption
    lengths: Tensor  # int64 [N], tokens of each caption
    patches: Tensor  # [N, P, width] of the image
    embedding: Tensor  # [N, D] of the image, unit norm
    image_id: Tensor  # int64 [N]


class Losses(NamedTuple):
    """Three 0-d tensors; `denoising` is None where there is no denoiser."""

    total: Tensor
    contrastive: Tensor
    denoising: Tensor | None


def make_denoisers(settings: Denoising, shape: Shape, patches: int) -> nn.ModuleDict:
    """One `Denoiser` for each modality that is corrupted; `patches` of an image have a position."""
    denoisers = nn.ModuleDict()
    if settings.direction in ("image", "both"):
        denoisers["image"] = Denoiser(settings, shape.image_width, shape.speech_width, patches)
    if settings.direction in ("speech", "both"):
        denoisers["speech"] = Denoiser(settings, shape.speech_width, shape.image_width, LONGEST)
    return denoisers


LONGEST = 256  # speech tokens that have a position of their own


def training_losses(
    model: RetrievalModel,
    denoisers: nn.ModuleDict,
    batch: Batch,
    weight: float,
    generator: torch.Generator,
) -> Losses:
    """Id-aware symmetric InfoNCE + `weight` × the mean restoration loss of the denoisers."""
    encoded = encode(model, batch)
    contrastive = info_nce(encoded.speech, encoded.image, batch.image_id, model.scale)
    if not len(denoisers):
        return Losses(contrastive, contrastive, None)
    item_id = item_ids(batch.image_id)
    reading = readings(model, batch, encoded, settings_of(denoisers))
    restoration = [
        denoisers[side](reading[side], item_id[side], generator)
        for side in reading
        if side in denoisers
    ]
    denoising = torch.stack(restoration).mean()
    return Losses(contrastive + weight * denoising, contrastive, denoising)


class Encoded(NamedTuple):
    """What the heads make of N pairs."""

    mixed: Tensor  # [N, T, width] of the speech, before its head reads it
    speech_tokens: Tensor  # [N, T, width], contextual
    image_tokens: Tensor  # [N, P, width]
    speech: Tensor  # embeddings [N, D], unit norm, float32 in autocast too
    image: Tensor  # likewise


def encode(model: RetrievalModel, batch: Batch) -> Encoded:
    """Both heads' tokens and embeddings."""
    head = model.speech_head
    mixed = head.mix(batch.states, batch.lengths)
    speech_tokens = head.contextualise(mixed, batch.lengths)
    image_tokens, image = model.image_head(batch.patches, batch.embedding)
    speech = head.pool(speech_tokens, batch.lengths)
    wide = torch.promote_types(speech.dtype, torch.float32)
    return Encoded(mixed, speech_tokens, image_tokens, speech.to(wide), image.to(wide))


def readings(
    model: RetrievalModel,
    batch: Batch,
    encoded: Encoded,
    settings: Denoising | None,
    behind: int = 0,
) -> dict[str, Reading]:
    """What the denoiser of either side reads; "image" first, as they are drawn for.

    The settings say where the context or the target of a row is that of the row before it. That of
    the first one is the last one's, or with `behind` the first `behind` rows are left out: they are
    there for those after them alone.
    """
    if settings is None:
        return {}
    lengths = batch.lengths
    patches = torch.full_like(lengths, encoded.image_tokens.shape[1])
    head = model.speech_head

    def chosen(tensor: Tensor, whose: str) -> Tensor:
        return (tensor.roll(1, 0) if whose == "other" else tensor)[behind:]

    def reading(
        tokens: Tensor,
        lengths: Tensor,
        context: tuple[Tensor, Tensor],
        reads: Callable[[Tensor], Tensor] | None,
    ) -> Reading:
        return Reading(
            *(chosen(tokens, "own"), chosen(lengths, "own")),
            *(chosen(context[0], settings.context), chosen(context[1], settings.context)),
            *(chosen(tokens, settings.target_of), chosen(lengths, settings.target_of)),
            reads,
        )

    pools = model.image_head.pools_patches
    return {
        "image": reading(
            *(batch.patches, patches),
            (encoded.speech_tokens, lengths),
            model.image_head.contextualise if pools else None,
        ),
        "speech": reading(
            *(encoded.mixed.detach(), lengths),
            (encoded.image_tokens, patches),
            lambda tokens: head.contextualise(tokens, chosen(lengths, "own")),
        ),
    }


def settings_of(denoisers: nn.ModuleDict) -> Denoising | None:
    """Those of all denoisers of a run, which are alike; None where there is none."""
    for one in denoisers.values():
        return cast(Denoiser, one).settings
    return None


def item_ids(image_id: Tensor) -> dict[str, Tensor]:
    """int64 [N] for either side: rows of one image hold the same patches, no two the same speech.

    image_id: int64 [N].
    """
    return {"image": image_id, "speech": torch.arange(len(image_id), device=image_id.device)}
