"""The loss of a step, by hand and against float64, and which parameters each part of it trains."""

import math
from dataclasses import replace

import pytest
import torch

from cmdlab.retrieval.denoising import Denoising
from cmdlab.retrieval.losses import Batch, make_denoisers, training_losses
from cmdlab.retrieval.model import RetrievalModel, Shape

SHAPE = Shape(speech_layers=2, speech_width=16, image_width=12, embedding=8)


def make_batch(ids: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.nn.functional.normalize(torch.randn(9, 8, generator=generator), dim=-1)
    patches = torch.randn(9, 4, 12, generator=generator)
    image_id = torch.tensor(ids)
    lengths = torch.randint(1, 7, (len(ids),), generator=generator)
    return Batch(
        torch.randn(2, int(lengths.sum()), 16, generator=generator),
        lengths,
        patches[image_id],
        pictures[image_id],
        image_id,
    )


def make_model() -> RetrievalModel:
    torch.manual_seed(0)
    return RetrievalModel(SHAPE)


def losses(model, batch, *, weight=0.7, seed=0, **settings):
    torch.manual_seed(1)
    denoisers = make_denoisers(Denoising(**settings), SHAPE, 4)
    return training_losses(model, denoisers, batch, weight, torch.Generator().manual_seed(seed))


def test_two_captions_of_one_image_are_not_negatives_in_float64():
    """Each caption against its own image and those of other ids, in both directions, by loops."""
    ids = [3, 5, 3, 8, 5, 3]
    model, batch = make_model(), make_batch(ids)
    with torch.no_grad():
        found = training_losses(model, torch.nn.ModuleDict(), batch, 0.0, torch.Generator())
        speech = model.speech_head(batch.states, batch.lengths)[1].double()
        score = (model.scale.double() * speech @ batch.embedding.double().T).tolist()
    total = 0.0
    for i in range(6):
        allowed = [j for j in range(6) if j == i or ids[j] != ids[i]]
        total += math.log(sum(math.exp(score[i][j]) for j in allowed)) - score[i][i]
        total += math.log(sum(math.exp(score[j][i]) for j in allowed)) - score[i][i]
    assert found.contrastive.item() == pytest.approx(total / 12, rel=1e-5)
    assert found.total is found.contrastive
    assert found.denoising is None


def test_captions_of_a_single_image_have_nothing_to_contrast():
    model = make_model()
    found = training_losses(model, torch.nn.ModuleDict(), make_batch([4] * 5), 0, torch.Generator())
    assert found.contrastive == 0


def test_the_total_is_weighted():
    found = losses(make_model(), make_batch([0, 1, 2, 3]), weight=0.7)
    expected = found.contrastive + 0.7 * found.denoising
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_both_directions_are_averaged():
    batch = make_batch([0, 1, 2, 3])
    # With all tokens masked, nothing is left to chance but the denoisers' weights.
    settings = {"corruption": "mask", "rate": 1.0}
    torch.manual_seed(1)
    both = make_denoisers(Denoising(direction="both", **settings), SHAPE, 4)
    assert set(both) == {"image", "speech"}
    model, generator = make_model(), torch.Generator()
    apart = [
        training_losses(model, torch.nn.ModuleDict({side: both[side]}), batch, 1.0, generator)
        for side in ("image", "speech")
    ]
    together = training_losses(model, both, batch, 1.0, generator)
    mean = (apart[0].denoising + apart[1].denoising) / 2
    assert together.denoising.item() == pytest.approx(mean.item(), rel=1e-6)


@pytest.mark.parametrize("direction", ["image", "speech"])
def test_a_denoiser_for_the_corrupted_side_alone(direction):
    denoisers = make_denoisers(Denoising(direction=direction), SHAPE, 4)
    assert set(denoisers) == {direction}
    assert denoisers[direction].mask.shape == (1, {"image": 12, "speech": 16}[direction])


@pytest.mark.parametrize("corruption", ["swap", "mask"])
@pytest.mark.parametrize("direction", ["image", "speech", "both"])
def test_restoring_trains_the_speech_head_too(direction, corruption):
    model = make_model()
    found = losses(
        model, make_batch([0, 1, 2, 3]), direction=direction, corruption=corruption
    ).denoising
    found.backward()
    assert (model.speech_head.transformer.linear1.weight.grad != 0).any()
    assert model.speech_head.projection.weight.grad is None  # of retrieval's embedding alone
    assert model.log_scale.grad is None


def test_the_head_reads_corrupted_speech_and_frozen_tokens_are_restored():
    """Every token masked, and a denoiser that adds nothing to what the head made of them."""
    model, batch = make_model(), make_batch([0, 1, 2, 3])
    torch.manual_seed(1)
    denoisers = make_denoisers(
        Denoising(direction="speech", rate=1.0, target="tokens", depth=1), SHAPE, 4
    )
    denoiser = denoisers["speech"]
    with torch.no_grad():
        denoiser.output[0].zero_()
        denoiser.position.zero_()
    found = training_losses(model, denoisers, batch, 1.0, torch.Generator()).denoising
    mixed = batch.states.mean(0).double()  # the layers' weights are equal at first
    states = mixed.split(batch.lengths.tolist())
    masked = denoiser.mask.expand(4, 6, 16)
    errors = []
    for row, length in enumerate(batch.lengths.tolist()):
        read = model.speech_head.contextualise(masked[row : row + 1], batch.lengths[row : row + 1])
        for place in range(length):
            target = states[row][place]
            error = (read[0, place].double() - target).square().sum() / target.square().sum()
            errors.append(error.item())
    assert found.item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    found.backward()
    assert model.speech_head.layer_weights.grad is None  # or the targets could be made poorer


def test_pictures_are_restored_to_their_frozen_patches():
    """With a head on the patches as without one: the head reads, and is not what is restored."""
    batch = make_batch([0, 1, 2, 3])
    torch.manual_seed(0)
    model = RetrievalModel(replace(SHAPE, image_head="patches"))
    denoisers = make_denoisers(Denoising(rate=1.0, target="tokens", depth=1), SHAPE, 4)
    denoiser = denoisers["image"]
    with torch.no_grad():
        denoiser.output[0].zero_()
        denoiser.position.zero_()
    found = training_losses(model, denoisers, batch, 1.0, torch.Generator()).denoising
    read = model.image_head.contextualise(denoiser.mask[None])[0]
    error = (read.double() - batch.patches.double()).square().sum(-1)
    expected = (error / batch.patches.double().square().sum(-1)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
