"""Why denoising helps, or does not: what it draws from the other side, and where it pulls.

Both are measured beside training and change nothing of it.
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from cmdlab.retrieval.denoising import Denoiser
from cmdlab.retrieval.losses import (
    Batch,
    encode,
    item_ids,
    readings,
    settings_of,
    training_losses,
)
from cmdlab.retrieval.model import RetrievalModel


def gradient_cosine(
    model: RetrievalModel, denoisers: nn.ModuleDict, batch: Batch, generator: torch.Generator
) -> float | None:
    """The cosine between the gradients of the two losses by the model's own parameters, in [-1, 1].

    Near 1 the denoising loss pulls where the contrastive one does, near 0 elsewhere, below against
    it. None where the denoising loss reaches none of them, as where a control keeps it out.
    """
    with torch.random.fork_rng(devices=[]):
        losses = training_losses(model, denoisers, batch, 1.0, generator)
    assert losses.denoising is not None
    shared = list(model.parameters())
    contrastive, denoising = (
        _flat(torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True), shared)
        for loss in (losses.contrastive, losses.denoising)
    )
    length = contrastive.norm() * denoising.norm()
    return (contrastive @ denoising / length).item() if length > 0 else None


def _flat(gradients: tuple[Tensor | None, ...], parameters: list[nn.Parameter]) -> Tensor:
    """float64: sums over so many entries should not be rounded."""
    return torch.cat(
        [
            torch.zeros(one.numel(), dtype=torch.float64)
            if gradient is None
            else gradient.flatten().double().cpu()
            for gradient, one in zip(gradients, parameters, strict=True)
        ]
    )


@torch.inference_mode()
def restoration_by_context(
    model: RetrievalModel, denoisers: nn.ModuleDict, batch: Batch, generator: torch.Generator
) -> dict[str, float]:
    """The restoration loss of a batch with each item's own other side to attend to ("own"), and
    with that of the row before it ("other"), the same places corrupted alike.

    How much the second is above the first is what restoring draws from the other side: nothing
    where a control gave one learnt token for all.
    """
    settings = settings_of(denoisers)
    assert settings is not None
    encoded = encode(model, batch)
    state, ids = generator.get_state(), item_ids(batch.image_id)
    found = {}
    for context in ("own", "other"):
        generator.set_state(state)
        reading = readings(model, batch, encoded, replace(settings, context=context))
        losses = [
            cast(Denoiser, one)(reading[side], ids[side], generator)
            for side, one in denoisers.items()
        ]
        found[context] = torch.stack(losses).mean().item()
    return found
