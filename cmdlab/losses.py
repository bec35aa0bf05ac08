"""The loss of a training step: contrastive, and restoration beside it."""

from typing import NamedTuple

import torch
from cmdlab_kernels.info_nce import info_nce
from torch import Tensor, nn

from cmdlab.denoising import Denoiser, Denoising
from cmdlab.model import RetrievalModel, Shape


class Batch(NamedTuple):
    """N captions, each with its image, as the frozen encoders give them."""

    states: Tensor  # [N, layers, T, width] of the speech
    lengths: Tensor  # int64 [N]
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
    speech_tokens, speech = model.speech_head(batch.states, batch.lengths)
    image_tokens, image = model.image_head(batch.patches, batch.embedding)
    contrastive = info_nce(speech, image, batch.image_id, model.scale)
    if not len(denoisers):
        return Losses(contrastive, contrastive, None)
    patches = torch.full_like(batch.lengths, image_tokens.shape[1])
    sides = {"image": (image_tokens, patches), "speech": (speech_tokens, batch.lengths)}
    restoration = []
    for corrupted, other in (("image", "speech"), ("speech", "image")):
        if corrupted in denoisers:
            restoration.append(denoisers[corrupted](*sides[corrupted], *sides[other], generator))
    denoising = torch.stack(restoration).mean()
    return Losses(contrastive + weight * denoising, contrastive, denoising)
