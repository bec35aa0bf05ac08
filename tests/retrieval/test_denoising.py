"""Cross-Modal Denoising: what is corrupted, with what, and what enters the loss."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdlab.errors import InputError
from cmdlab.retrieval.denoising import Corruption, Denoiser, Denoising, Reading, corrupt
from cmdlab.retrieval.recipe import parameters_of

WIDTH, CONTEXT, LONGEST = 16, 12, 6
LENGTHS = torch.tensor([6, 1, 4, 3])
CONTEXT_LENGTHS = torch.tensor([2, 5, 1, 3])
IDS = torch.arange(4)
CHOICES = {one.name: one.choices for one in parameters_of([Denoising])}
POINTS = list(product(CHOICES["corruption"], CHOICES["target"], CHOICES["loss"], (1, 3)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [4, 6, 16] to corrupt and context [4, 5, 12]."""
    random = generator(1)
    return (
        torch.randn(4, LONGEST, WIDTH, generator=random),
        torch.randn(4, 5, CONTEXT, generator=random),
    )


def make_denoiser(**settings: object) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(Denoising(**settings), WIDTH, CONTEXT, LONGEST)  # type: ignore[arg-type]


def loss_of(
    denoiser: Denoiser,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    context: torch.Tensor,
    context_lengths: torch.Tensor,
    ids: torch.Tensor,
    random: torch.Generator,
) -> torch.Tensor:
    """Of a batch whose items are restored from their own other side, and to be themselves."""
    reading = Reading(tokens, lengths, context, context_lengths, tokens, lengths, None)
    return denoiser(reading, ids, random)


def corruption(
    name: str,
    lengths: torch.Tensor,
    rate: float = 0.5,
    seed: int = 0,
    ids: torch.Tensor | None = None,
) -> Corruption:
    """Of tokens that hold their item and their place, so that each can be told apart."""
    longest = int(lengths.max())
    items, places = torch.meshgrid(torch.arange(len(lengths)), torch.arange(longest), indexing="ij")
    tokens = torch.stack([items, places], -1).float()
    settings = Denoising(corruption=name, rate=rate)
    ids = torch.arange(len(lengths)) if ids is None else ids
    return corrupt(tokens, lengths, ids, settings, torch.full((1, 2), -7.0), generator(seed))


lengths_of_items = st.lists(st.integers(0, 12), min_size=2, max_size=6).filter(
    lambda lengths: sum(length > 0 for length in lengths) > 1
)


@settings(max_examples=100, deadline=None)
@given(lengths_of_items, st.floats(0.01, 1.0), st.integers(0, 99))
def test_of_each_item_the_rate_is_corrupted_and_at_least_one_token(lengths, rate, seed):
    found = corruption("swap", torch.tensor(lengths), rate, seed)
    assert (found.item[1:] >= found.item[:-1]).all()
    for item, length in enumerate(lengths):
        places = found.place[found.item == item].tolist()
        assert len(set(places)) == len(places)
        assert all(0 <= place < length for place in places)
        if length and rate * length >= 1:
            assert abs(len(places) - rate * length) <= 0.5 + 1e-4
        else:
            assert len(places) == min(length, 1)


@settings(max_examples=100, deadline=None)
@given(lengths_of_items, st.integers(0, 99))
def test_a_swapped_token_is_a_real_one_of_another_item(lengths, seed):
    found = corruption("swap", torch.tensor(lengths), seed=seed)
    donor, place = found.table[found.index].long().unbind(1)
    assert (donor != found.item).all()
    assert (place < torch.tensor(lengths)[donor]).all()


@settings(max_examples=100, deadline=None)
@given(lengths_of_items, st.data(), st.integers(0, 99))
def test_two_rows_of_one_item_give_each_other_nothing(lengths, data, seed):
    """Two captions of an image are two rows with the same patches."""
    ids = torch.tensor(data.draw(st.lists(st.integers(3, 5), min_size=6, max_size=6)))
    ids, lengths = ids[: len(lengths)], torch.tensor(lengths)
    found = corruption("swap", lengths, seed=seed, ids=ids)
    donor, place = found.table[found.index].long().unbind(1)
    others = torch.stack([((ids != one) & (lengths > 0)).any() for one in ids])[found.item]
    assert (ids[donor] != ids[found.item])[others].all()
    assert (place < lengths[donor]).all()
    stays = (donor == found.item) & (place == found.place)
    assert stays[~others].all()


@settings(max_examples=100, deadline=None)
@given(lengths_of_items, st.integers(0, 99))
def test_a_shuffled_token_is_another_one_of_its_item(lengths, seed):
    found = corruption("shuffle", torch.tensor(lengths), seed=seed)
    donor, place = found.table[found.index].long().unbind(1)
    several = torch.tensor(lengths)[found.item] > 1
    assert (donor == found.item).all()
    assert (place < torch.tensor(lengths)[donor]).all()
    assert (place != found.place)[several].all()
    assert (place == found.place)[~several].all()


def test_all_tokens_of_all_others_are_donors():
    found = corruption("swap", torch.tensor([3, 2, 200]), rate=1.0)
    taken = {tuple(one) for one in found.table[found.index[found.item == 2]].long().tolist()}
    assert taken == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}


def test_the_mask_token_stands_in_every_masked_place():
    found = corruption("mask", LENGTHS)
    assert found.table[found.index].tolist() == [[-7.0, -7.0]] * len(found.item)


def test_the_noise_is_as_strong_as_its_token():
    tokens = (
        torch.randn(2, 200, 64, generator=generator(3)) * torch.tensor([0.1, 5.0])[:, None, None]
    )
    lengths = torch.tensor([200, 200])
    settings = Denoising(corruption="gaussian", rate=1.0)
    found = corrupt(tokens, lengths, torch.arange(2), settings, torch.zeros(1, 64), generator())
    noise = (found.table[found.index] - tokens[found.item, found.place]).view(2, 200, 64)
    assert noise[0].std() == pytest.approx(0.1, rel=0.05)
    assert noise[1].std() == pytest.approx(5.0, rel=0.05)
    assert abs(noise[1].mean()) < 0.2


@pytest.mark.parametrize("name", CHOICES["corruption"])
def test_the_generator_decides(name):
    one, again, other = (corruption(name, LENGTHS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.place, again.place)
    assert torch.equal(one.table[one.index], again.table[again.index])
    assert not torch.equal(one.place, other.place)


@pytest.mark.parametrize(("corrupts", "target", "loss", "depth"), POINTS)
def test_every_point_of_the_axes_runs_and_trains_what_it_should(corrupts, target, loss, depth):
    tokens, context = (tensor.requires_grad_() for tensor in batch())
    denoiser = make_denoiser(corruption=corrupts, target=target, loss=loss, depth=depth)
    value = loss_of(denoiser, tokens, LENGTHS, context, CONTEXT_LENGTHS, IDS, generator())
    assert value.shape == ()
    assert torch.isfinite(value)
    value.backward()
    assert context.grad.abs().sum() > 0
    for name, parameter in denoiser.named_parameters():
        used = name != "mask" or corrupts == "mask"
        assert (parameter.grad is not None and bool((parameter.grad != 0).any())) == used, name
    # Targets take no gradient; what stands in the corrupted places does, and the mask is no token.
    through_queries = tokens.grad is not None and bool((tokens.grad != 0).any())
    assert through_queries == (corrupts != "mask")


@pytest.mark.parametrize(("corrupts", "target", "loss", "depth"), POINTS)
def test_padding_never_reaches_loss_or_gradients(corrupts, target, loss, depth):
    tokens, context = batch()
    lengths, context_lengths = LENGTHS.clone(), CONTEXT_LENGTHS.clone()
    lengths[2], context_lengths[3] = 0, 0  # an item without tokens, and one without context
    found = []
    for poison in (0.0, torch.nan):
        for row in range(4):
            tokens[row, lengths[row] :] = poison
            context[row, context_lengths[row] :] = poison
        leaves = [tokens.clone().requires_grad_(), context.clone().requires_grad_()]
        denoiser = make_denoiser(corruption=corrupts, target=target, loss=loss, depth=depth)
        value = loss_of(denoiser, leaves[0], lengths, leaves[1], context_lengths, IDS, generator())
        value.backward()
        gradients = [p.grad for p in (*leaves, *denoiser.parameters()) if p.grad is not None]
        found.append([value.detach(), *gradients])
    for clean, poisoned in zip(*found, strict=True):
        assert torch.isfinite(poisoned).all()
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("loss", CHOICES["loss"])
def test_only_corrupted_places_enter_the_loss(loss):
    tokens, context = batch()
    denoiser = make_denoiser(target="tokens", depth=1, loss=loss)
    places = corrupt(tokens, LENGTHS, IDS, denoiser.settings, denoiser.mask, generator())
    changed = torch.full((4, LONGEST), True)
    changed[places.item, places.place] = False
    assert changed.any()
    other = torch.where(changed[..., None], 100.0, tokens)
    value, same = (
        loss_of(denoiser, one, LENGTHS, context, CONTEXT_LENGTHS, IDS, generator())
        for one in (tokens, other)
    )
    assert torch.equal(value, same)
    other = torch.where(changed[..., None], tokens, 100.0)
    assert loss_of(denoiser, other, LENGTHS, context, CONTEXT_LENGTHS, IDS, generator()) != value


def test_the_pooled_target_is_the_mean_of_an_items_tokens():
    tokens, context = batch()
    settings = {"corruption": "mask", "rate": 1.0}
    pooled = make_denoiser(target="pooled", **settings)
    means = torch.stack([one[:n].mean(0) for one, n in zip(tokens, LENGTHS.tolist(), strict=True)])
    value = loss_of(pooled, tokens, LENGTHS, context, CONTEXT_LENGTHS, IDS, generator())
    # With every token equal to the mean, the token itself is the same target.
    flat = means[:, None].expand_as(tokens).contiguous()
    same = make_denoiser(target="tokens", **settings)
    expected = loss_of(same, flat, LENGTHS, context, CONTEXT_LENGTHS, IDS, generator())
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_item_is_restored_from_its_own_context_alone():
    tokens, context = batch()
    denoiser = make_denoiser(corruption="mask", target="tokens")
    context.requires_grad_()
    loss_of(
        denoiser, tokens, torch.tensor([6, 0, 0, 0]), context, CONTEXT_LENGTHS, IDS, generator()
    ).backward()
    assert (context.grad[0, :2] != 0).any()
    assert (context.grad[0, 2:] == 0).all()
    assert (context.grad[1:] == 0).all()


@pytest.mark.parametrize("loss", CHOICES["loss"])
def test_what_the_other_modality_tells_is_learnt(loss):
    """The context holds the clean tokens, so a denoiser that attends can restore them."""
    random = generator(5)
    denoiser = make_denoiser(corruption="mask", loss=loss, rate=1.0)
    optimiser = torch.optim.AdamW(denoiser.parameters(), 1e-2)
    values = []
    for step in range(60):
        told = torch.randn(16, 1, CONTEXT, generator=random)
        tokens = torch.nn.functional.pad(told, (0, WIDTH - CONTEXT)).expand(-1, 3, -1)
        lengths, ones = torch.full((16,), 3), torch.ones(16, dtype=torch.int64)
        value = loss_of(denoiser, tokens, lengths, told, ones, torch.arange(16), generator(step))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    # Three tokens of an item are alike, so InfoNCE cannot tell them apart: ln 3 is its floor.
    floor = 1.0986 if loss == "info_nce" else 0.0
    assert values[-1] - floor < 0.5 * (values[0] - floor)


@pytest.mark.parametrize("target", CHOICES["target"])
def test_equal_targets_are_not_each_others_negatives(target):
    """Two rows of one image hold the same tokens; only a third row is something else."""
    tokens, context = batch()
    tokens[1] = tokens[0]
    lengths, ones = torch.tensor([6, 6]), torch.tensor([1, 1])
    denoiser = make_denoiser(corruption="mask", loss="info_nce", target=target, rate=1.0)
    values = [
        loss_of(
            denoiser, tokens[:2], lengths, context[:2], ones, torch.tensor(ids), generator()
        ).item()
        for ids in ([7, 7], [7, 8])
    ]
    if target == "pooled":
        assert values[0] == 0  # one target for all: nothing to tell apart
    assert values[0] < values[1]


def test_places_beyond_the_last_position_share_it():
    denoiser = make_denoiser(corruption="mask", rate=1.0)
    tokens = torch.randn(1, 9, WIDTH, generator=generator())
    _, context = batch()
    value = loss_of(
        denoiser, tokens, torch.tensor([9]), context[:1], CONTEXT_LENGTHS[:1], IDS[:1], generator()
    )
    assert torch.isfinite(value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"direction": "text"},
        {"corruption": "dropout"},
        {"target": "pixels"},
        {"loss": "mse"},
        {"rate": 0.0},
        {"rate": 1.5},
        {"rate": float("nan")},
        {"depth": 0},
        {"depth": 1.5},
        {"rate": "0.3"},
        {"context": "nobody"},
        {"target_of": "none"},
        {"gradient": "none"},
    ],
)
def test_a_point_off_the_axes_is_refused(wrong):
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: "):
        Denoising(**wrong)
