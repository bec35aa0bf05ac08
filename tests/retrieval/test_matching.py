"""The matching head: what a pair's logit depends on, its negatives, and ranks that stay honest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdlab.evaluation import rank_table, ranks_of_scores, retrieval_metrics
from cmdlab.retrieval.matching import Matching, best_of, hard_negatives, reordered
from cmdlab.retrieval.model import RetrievalModel, Shape
from cmdlab.retrieval.training import Training, make_batch, rank, train

SHAPE = Shape(2, 16, 12, 8)
DIRECTIONS = ("speech_to_image", "image_to_speech")


@pytest.fixture
def head() -> Matching:
    torch.manual_seed(0)
    return Matching(SHAPE, candidates=3).double()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_logit_is_its_pair_s_alone(head):
    """Not of padding, nor of the other pairs, nor of their order."""
    spoken, patches, lengths = tokens(5, 9, 16), tokens(4, 6, 12, seed=1), torch.arange(5) * 2 + 1
    captions, images = torch.cartesian_prod(torch.arange(5), torch.arange(4)).T
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    hear, see = head.hear(spoken, lengths), head.see(patches)
    found = head.logits(hear, see, captions[order], images[order])[order.argsort()]
    for i, (caption, image) in enumerate(zip(captions.tolist(), images.tolist(), strict=True)):
        length = lengths[caption : caption + 1]
        alone = head.hear(spoken[caption : caption + 1, : int(length)], length)
        zero = torch.tensor([0])
        logit = head.logits(alone, head.see(patches[image : image + 1]), zero, zero)
        assert logit.item() == pytest.approx(found[i].item())
    assert found.unique().numel() == 20


def test_a_logit_has_torch_s_own_attention_in_it(head):
    """Against nn.MultiheadAttention with the same weights."""
    spoken, patches = tokens(1, 5, 16), tokens(1, 6, 12, seed=1)
    attention = torch.nn.MultiheadAttention(
        16, SHAPE.heads, bias=False, kdim=12, vdim=12, batch_first=True, dtype=torch.float64
    )
    attention.load_state_dict(
        {
            "q_proj_weight": head.query.weight,
            "k_proj_weight": head.key.weight,
            "v_proj_weight": head.value.weight,
            "out_proj.weight": head.attended.weight,
        }
    )
    seen = head.norm(patches)
    hidden = torch.nn.functional.gelu(head.token(spoken) + attention(spoken, seen, seen)[0])
    expected = head.logit(hidden.mean(1))[0, 0]
    zero = torch.tensor([0])
    found = head.logits(head.hear(spoken, torch.tensor([5])), head.see(patches), zero, zero)
    assert found.item() == pytest.approx(expected.item())


@given(ids=st.lists(st.integers(0, 4), min_size=1, max_size=9), seed=st.integers(0, 9))
@settings(deadline=None)
def test_no_negative_is_of_the_same_image(ids, seed):
    image_id = torch.tensor(ids)
    similarity = 50 * torch.randn(len(ids), len(ids), generator=torch.Generator().manual_seed(seed))
    captions, images = hard_negatives(similarity, image_id, torch.Generator().manual_seed(seed))
    assert (image_id[captions] != image_id[images]).all()
    with_others = [i for i, one in enumerate(ids) if set(ids) != {one}]
    half = len(with_others)
    assert captions[:half].tolist() == images[half:].tolist() == with_others
    assert len(captions) == len(images) == 2 * half


def test_the_harder_a_negative_the_oftener_it_is_drawn():
    weights = torch.tensor([1e-6, 1.0, 2.0, 5.0])
    similarity = weights.log().repeat(4, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = [hard_negatives(similarity, torch.arange(4), generator) for _ in range(1000)]
    first = torch.stack([images[0] for _, images in drawn])  # of the first caption
    share = torch.bincount(first, minlength=4) / len(first)
    assert share.tolist() == pytest.approx([0, 1 / 8, 2 / 8, 5 / 8], abs=0.05)
    caption = torch.stack([captions[4] for captions, _ in drawn])  # of the first image
    assert set(caption.tolist()) == {1, 2, 3}


@given(
    scores=st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=5),
    matched=st.lists(st.integers(0, 3), min_size=30, max_size=30),
    count=st.integers(1, 7),
)
@settings(deadline=None)
def test_candidates_are_ordered_again_and_the_others_come_after(scores, matched, count):
    first = torch.tensor(scores, dtype=torch.float32)
    again = torch.tensor(matched, dtype=torch.float64)[: first.numel()].view_as(first)
    best = best_of(first, count)
    assert (best.sum(1) <= count).all() or count >= 6
    found = reordered(first, best, again)
    for row in range(len(first)):
        # The same order, by Python's own sort: candidates before others, each by their own score.
        keys = [
            (bool(best[row, j]), float(again[row, j] if best[row, j] else first[row, j]))
            for j in range(6)
        ]
        for i in range(6):
            for j in range(6):
                assert (found[row, i] < found[row, j]).item() == (keys[i] < keys[j])
                if not best[row, i] and best[row, j]:
                    assert first[row, i] < first[row, j]  # a tie is never split


def test_a_system_that_gives_all_the_same_is_last(toy_features):
    """Neither a place in the gallery nor among the candidates helps: every tie is counted."""
    features = toy_features(images=9)
    torch.manual_seed(0)
    model, ranker = RetrievalModel(SHAPE), Matching(SHAPE, candidates=3)
    for parameter in model.speech_head.projection.parameters():
        parameter.data.zero_()  # every embedding is zero
    table = ranker.rank(model, features, "cpu")
    assert (table.ranks("speech_to_image") == 9).all()
    assert (table.ranks("image_to_speech") == 17).all()


@pytest.mark.parametrize("candidates", [1, 4, 99])
def test_where_the_head_knows_nothing_the_ranks_are_those_of_embeddings(toy_features, candidates):
    features = toy_features(images=12)
    torch.manual_seed(0)
    model, ranker = RetrievalModel(SHAPE), Matching(SHAPE, candidates)
    for parameter in ranker.logit[-1].parameters():
        parameter.data.zero_()
    plain, again = rank(model, features), rank(model, features, ranker=ranker)
    for direction in DIRECTIONS:
        assert plain.ranks(direction).tolist() == again.ranks(direction).tolist()


def test_the_ranks_of_a_split_are_those_of_its_searches(toy_features):
    features = toy_features(images=12)
    torch.manual_seed(0)
    model, ranker = RetrievalModel(SHAPE), Matching(SHAPE, candidates=8)
    ranker.logit[-1].weight.data *= 50  # so that the order changes
    search = ranker.searcher(model, features, range(24))
    scores = torch.stack([search(i) for i in range(24)])
    found = ranker.rank(model, features, "cpu")
    expected = ranks_of_scores(scores, scores, features.image_index)
    plain = rank(model, features)
    assert found.speech_greater.tolist() == expected.speech_greater.tolist()
    assert found.speech_greater.tolist() != plain.speech_greater.tolist()
    assert found.image_greater.tolist() != plain.image_greater.tolist()
    # Who was no candidate keeps the rank.
    left_out = plain.speech_greater >= 8
    assert left_out.any()
    assert (found.speech_greater[left_out] == plain.speech_greater[left_out]).all()
    left_out = plain.image_greater >= 9  # one of an image's two captions may be above the other
    assert (found.image_greater[left_out] == plain.image_greater[left_out]).all()


def test_images_are_ranked_by_their_own_candidates(toy_features):
    """Image → speech, in loops: each image orders the captions that are nearest to it."""
    features = toy_features(images=6)
    torch.manual_seed(0)
    model, ranker = RetrievalModel(SHAPE), Matching(SHAPE, candidates=4)
    ranker.logit[-1].weight.data *= 50
    everything = Matching(SHAPE, candidates=99)
    everything.load_state_dict(ranker.state_dict())
    search = everything.searcher(model, features, range(12))  # in the order of similarity + logit
    matched = np.stack([search(i).numpy() for i in range(12)])
    plain = rank_table(*embeddings(model, features), features.image_index, torch.arange(6))
    scores = (lambda speech, image: (speech @ image.T).numpy())(*embeddings(model, features))
    # A search shifts each caption's scores by a constant, which a column must not see.
    shift = matched - reference_sums(model, everything, features)
    assert np.allclose(shift, shift[:, :1])
    sums = matched - shift
    found = ranker.rank(model, features, "cpu").ranks("image_to_speech")
    owner = features.image_index.numpy()
    for image in range(6):
        order = sorted(range(12), key=lambda c: -scores[c, image])
        again = sorted(order[:4], key=lambda c: -sums[c, image]) + order[4:]
        wrong_before = 0
        for caption in again:
            if owner[caption] == image:
                break
            wrong_before += 1
        assert found[image] == 1 + wrong_before
    assert plain.ranks("image_to_speech").tolist() != found.tolist()


def embeddings(model, features):
    states, lengths = features.speech.tokens(range(len(features.speech)))
    with torch.no_grad():
        return model.speech_head(states, lengths)[1], features.image.embeddings


def reference_sums(model, ranker, features) -> np.ndarray:
    """scale · similarity + logit of every pair, [N, M]."""
    states, lengths = features.speech.tokens(range(len(features.speech)))
    images = range(len(features.image))
    with torch.no_grad():
        spoken, speech = model.speech_head(states, lengths)
        pairs = torch.cartesian_prod(torch.arange(len(speech)), torch.tensor(images)).T
        hear, see = ranker.hear(spoken, lengths), ranker.see(features.image.patches(images))
        logits = ranker.logits(hear, see, *pairs).view(len(speech), len(images))
        return (model.scale * speech @ features.image.embeddings.T + logits).numpy()


def test_it_learns_to_tell_pairs_from_hard_negatives(toy_features):
    features = toy_features(images=30)
    torch.set_num_threads(1)
    training = Training(seed=1, steps=80, batch_size=16, warm_up=5, method="matching", rerank=8)
    trained = train(training, features, toy_features(images=30, seed=1))
    assert trained.validation["mean_R@1"] > 30  # by chance it would be 3
    batch = make_batch(features, torch.arange(0, 60, 4), "cpu")
    losses = trained.competitor.losses(trained.model, batch, torch.Generator().manual_seed(0))
    chance = -(1 / 3 * np.log(1 / 3) + 2 / 3 * np.log(2 / 3))  # one pair to two that are none
    assert (losses.total - losses.contrastive).item() < 0.8 * chance
    found = rank(trained.model, toy_features(images=30, seed=1), ranker=trained.ranker)
    assert retrieval_metrics(found)["mean_R@1"] == trained.validation["mean_R@1"]


def test_the_loss_trains_head_and_speech(toy_features):
    features = toy_features(images=8)
    torch.manual_seed(0)
    model, competitor = RetrievalModel(SHAPE), Matching(SHAPE, 3)
    batch = make_batch(features, torch.arange(0, 16, 2), "cpu")
    losses = competitor.losses(model, batch, torch.Generator().manual_seed(0))
    (losses.total - losses.contrastive).backward()
    assert all(one.grad.abs().sum() > 0 for one in competitor.parameters())
    assert model.speech_head.transformer.linear1.weight.grad.abs().sum() > 0
    assert not model.log_scale.grad  # the draw of negatives takes none
