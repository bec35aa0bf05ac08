"""The controls of the denoising task, each of which changes one thing; what is measured of them."""

import pytest
import torch

from cmdlab.retrieval.denoising import Denoising, Reading, corrupt
from cmdlab.retrieval.diagnosis import gradient_cosine, restoration_by_context
from cmdlab.retrieval.losses import (
    Batch,
    encode,
    make_denoisers,
    readings,
    settings_of,
    training_losses,
)
from cmdlab.retrieval.model import RetrievalModel, Shape

SHAPE = Shape(speech_layers=2, speech_width=16, image_width=12, embedding=8, image_head="patches")
SIDES = ("image", "speech")


@pytest.fixture
def model() -> RetrievalModel:
    torch.manual_seed(0)
    return RetrievalModel(SHAPE)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 6, 1, 4, 5])
    return Batch(
        torch.randn(2, int(lengths.sum()), 16, generator=generator),
        lengths,
        torch.randn(5, 4, 12, generator=generator),
        torch.nn.functional.normalize(torch.randn(5, 8, generator=generator), dim=-1),
        torch.arange(5),
    )


def denoisers_of(settings: Denoising) -> torch.nn.ModuleDict:
    torch.manual_seed(1)
    return make_denoisers(settings, SHAPE, 4)


def losses(model: RetrievalModel, batch: Batch, settings: Denoising):
    random = torch.Generator().manual_seed(2)
    return training_losses(model, denoisers_of(settings), batch, 1.0, random)


def read(model: RetrievalModel, batch: Batch, **settings: str) -> dict[str, Reading]:
    return readings(model, batch, encode(model, batch), Denoising("both", **settings))


@pytest.mark.parametrize("side", SIDES)
def test_anothers_context_and_anothers_target_are_those_of_the_row_before(model, batch, side):
    own = read(model, batch)[side]
    before = [4, 0, 1, 2, 3]
    other = read(model, batch, context="other")[side]
    assert torch.equal(other.context, own.context[before])
    assert torch.equal(other.context_lengths, own.context_lengths[before])
    assert torch.equal(other.target, own.target)
    other = read(model, batch, target_of="other")[side]
    assert torch.equal(other.target, own.target[before])
    assert torch.equal(other.target_lengths, own.target_lengths[before])
    assert torch.equal(other.context, own.context)
    for reading in (own, other):
        assert torch.equal(reading.tokens, own.target)


@pytest.mark.parametrize("target", ["tokens", "pooled"])
def test_with_another_target_what_is_restored_is_judged_by_that(model, batch, target):
    """With the row before made equal to the row, own and other are the same loss."""
    settings = {"direction": "image", "corruption": "mask", "target": target}
    own, other = (Denoising(**settings, target_of=name) for name in ("own", "other"))
    assert losses(model, batch, own).denoising != losses(model, batch, other).denoising
    alike = batch._replace(patches=batch.patches[:1].expand_as(batch.patches).contiguous())
    assert losses(model, alike, own).denoising == losses(model, alike, other).denoising


def test_without_corruption_the_places_are_those_of_a_swap_and_their_tokens_stay(batch):
    swap, none = (denoisers_of(Denoising("image", name, 0.5))["image"] for name in ("swap", "none"))
    lengths = torch.full((5,), 4)
    found = [
        corrupt(batch.patches, lengths, batch.image_id, one.settings, one.mask, random)
        for one, random in ((swap, torch.Generator()), (none, torch.Generator()))
    ]
    assert torch.equal(found[0].place, found[1].place)
    assert torch.equal(found[0].item, found[1].item)
    own = batch.patches[found[1].item, found[1].place]
    assert torch.equal(found[1].table[found[1].index], own)
    assert (found[0].table[found[0].index] != own).any(1).all()


@pytest.mark.parametrize("direction", SIDES)
@pytest.mark.parametrize("gradient", ["both", "corrupted", "attended"])
def test_the_gradient_reaches_the_heads_that_it_should(model, batch, direction, gradient):
    settings = Denoising(direction, "swap", 0.5, "tokens", gradient=gradient)
    loss = losses(model, batch, settings).denoising
    assert loss is not None
    loss.backward()
    heads = {"image": model.image_head, "speech": model.speech_head}
    for side, head in heads.items():
        reached = any(
            one.grad is not None and bool((one.grad != 0).any()) for one in head.parameters()
        )
        its = "corrupted" if side == direction else "attended"
        assert reached == (gradient in ("both", its)), side


@pytest.mark.parametrize("depth", [1, 2])
def test_without_context_the_other_side_is_not_looked_at(model, batch, depth):
    settings = Denoising("image", "swap", 0.5, "tokens", depth=depth, context="none")
    loss = losses(model, batch, settings).denoising
    other = batch._replace(states=torch.randn_like(batch.states))
    assert loss == losses(model, other, settings).denoising
    denoisers = denoisers_of(settings)
    training_losses(model, denoisers, batch, 1.0, torch.Generator()).denoising.backward()
    assert (denoisers["image"].constant.grad != 0).any()
    assert all(one.grad is None for one in model.speech_head.parameters())


def test_what_is_drawn_from_the_other_side_is_the_loss_with_anothers_less_the_own(model, batch):
    settings = Denoising("both", "mask", 1.0)
    denoisers = denoisers_of(settings)
    found = restoration_by_context(model, denoisers, batch, torch.Generator().manual_seed(2))
    assert settings_of(denoisers) == settings  # a measurement leaves all as it was
    for context in ("own", "other"):
        one = Denoising("both", "mask", 1.0, context=context)
        expected = losses(model, batch, one).denoising
        assert found[context] == pytest.approx(expected.item(), rel=1e-5)
    none = denoisers_of(Denoising("both", "mask", 1.0, context="none"))
    found = restoration_by_context(model, none, batch, torch.Generator().manual_seed(2))
    assert found["own"] == found["other"]


def test_the_cosine_is_that_of_both_losses_gradients_by_the_models_parameters(model, batch):
    settings = Denoising("both", "swap", 0.5)
    gradients = []
    for name in ("contrastive", "denoising"):
        model.zero_grad()
        getattr(losses(model, batch, settings), name).backward()
        gradients.append(
            torch.cat(
                [
                    torch.zeros(one.numel()) if one.grad is None else one.grad.flatten()
                    for one in model.parameters()
                ]
            )
        )
    model.zero_grad()
    expected = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    random, denoisers = torch.Generator().manual_seed(2), denoisers_of(settings)
    state = torch.get_rng_state()
    found = gradient_cosine(model, denoisers, batch, random)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < abs(found) < 1
    assert all(one.grad is None for one in model.parameters())
    alone = make_denoisers(Denoising("image", "mask", 0.5, context="none"), SHAPE, 4)
    global_head = RetrievalModel(Shape(2, 16, 12, 8))
    assert gradient_cosine(global_head, alone, batch, random) is None
