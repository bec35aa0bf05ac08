"""The loss of a training step: contrastive, and restoration beside it."""

from typing import NamedTuple

import torch
from cmdlab_kernels.info_nce import info_nce
from torch import Tensor, nn

from cmdlab.retrieval.denoising import Denoiser, Denoising
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
    head = model.speech_head
    mixed = head.mix(batch.states, batch.lengths)
    speech_tokens = head.contextualise(mixed, batch.lengths)
    image_tokens, image = model.image_head(batch.patches, batch.embedding)
    contrastive = info_nce(
        head.pool(speech_tokens, batch.lengths), image, batch.image_id, model.scale
    )
    if not len(denoisers):
        return Losses(contrastive, contrastive, None)
    patches = torch.full_like(batch.lengths, image_tokens.shape[1])
    captions = torch.arange(len(batch.lengths), device=batch.lengths.device)
    restoration = []
    if "image" in denoisers:
        restoration.append(
            denoisers["image"](
                batch.patches,
                patches,
                speech_tokens,
                batch.lengths,
                batch.image_id,
                generator,
                model.image_head.contextualise if model.image_head.pools_patches else None,
            )
        )
    if "speech" in denoisers:
        restoration.append(
            denoisers["speech"](
                mixed.detach(),
                batch.lengths,
                image_tokens,
                patches,
                captions,
                generator,
                lambda tokens: head.contextualise(tokens, batch.lengths),
            )
        )
    denoising = torch.stack(restoration).mean()
    return Losses(contrastive + weight * denoising, contrastive, denoising)
