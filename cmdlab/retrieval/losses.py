"""The loss of a training step: contrastive, and restoration beside it."""

from typing import NamedTuple

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
    restoration = []
    for side, reading in readings(model, batch, encoded).items():
        if side in denoisers:
            *sides, head = reading
            restoration.append(denoisers[side](*sides, item_id[side], generator, head))
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
    model: RetrievalModel, batch: Batch, encoded: Encoded, behind: int = 0
) -> dict[str, Reading]:
    """What the denoiser of either side reads; "image" first, as they are drawn for.

    The context of each row is its own other side, or with `behind` that of the row so far before
    it; the first rows, which have none then, are left out.
    """
    lengths = batch.lengths
    patches = torch.full_like(lengths, encoded.image_tokens.shape[1])
    last = len(lengths) - behind
    head = model.speech_head
    return {
        "image": Reading(
            batch.patches[behind:],
            patches[behind:],
            encoded.speech_tokens[:last],
            lengths[:last],
            model.image_head.contextualise if model.image_head.pools_patches else None,
        ),
        "speech": Reading(
            encoded.mixed.detach()[behind:],
            lengths[behind:],
            encoded.image_tokens[:last],
            patches[:last],
            lambda tokens: head.contextualise(tokens, lengths[behind:]),
        ),
    }


def item_ids(image_id: Tensor) -> dict[str, Tensor]:
    """int64 [N] for either side: rows of one image hold the same patches, no two the same speech.

    image_id: int64 [N].
    """
    return {"image": image_id, "speech": torch.arange(len(image_id), device=image_id.device)}
