"""Dense similarity: the definition in loops, gradients, its loss, and its ranks of a split."""

import math

import pytest
import torch
from cmdlab_kernels.info_nce import info_nce_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdlab.evaluation import rank_table, retrieval_metrics
from cmdlab.retrieval import dense
from cmdlab.retrieval.dense import Dense, dense_similarity, info_nce_of_scores
from cmdlab.retrieval.model import RetrievalModel, Shape
from cmdlab.retrieval.training import Training, make_batch, train

SHAPE = Shape(2, 16, 12, 8)


def made_up(lengths: list[int], images: int, patches: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal(sum(lengths), 5), torch.tensor(lengths), normal(images, patches, 5)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    images=st.integers(1, 5),
    patches=st.integers(1, 4),
    held=st.integers(1, 60),
)
@settings(max_examples=30, deadline=None)
def test_it_is_the_mean_over_frames_of_the_best_patch(lengths, images, patches, held):
    frames, tensor, seen = made_up(lengths, images, patches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "PRODUCTS", held)  # the chunks must not matter
        found = dense_similarity(frames, tensor, seen)
    for i, own in enumerate(frames.split(lengths)):
        for j in range(images):
            best = [max(float(frame @ patch) for patch in seen[j]) for frame in own]
            assert found[i, j].item() == pytest.approx(math.fsum(best) / len(best))


def test_its_gradient_is_that_of_the_highest_product():
    frames, lengths, patches = made_up([3, 1, 5], 4, 6)
    inputs = (frames.requires_grad_(), patches.requires_grad_())
    assert torch.autograd.gradcheck(lambda f, p: dense_similarity(f, lengths, p), inputs)


def test_of_single_unit_tokens_the_loss_is_that_of_embeddings():
    generator = torch.Generator().manual_seed(1)
    speech, image = (
        torch.nn.functional.normalize(torch.randn(7, 5, generator=generator), dim=1)
        for _ in range(2)
    )
    image_id = torch.tensor([0, 1, 2, 0, 3, 1, 4])
    scale = torch.tensor(8.0)
    scores = scale * dense_similarity(speech, torch.ones(7, dtype=torch.int64), image[:, None])
    expected = info_nce_reference(speech, image, image_id, scale)
    assert info_nce_of_scores(scores, image_id).item() == pytest.approx(expected.item())


def test_padding_and_company_change_no_similarity(toy_features):
    """A caption's scores are the same alone and in a batch of longer ones."""
    features = toy_features(images=6)
    torch.manual_seed(0)
    model, ranker = RetrievalModel(SHAPE), Dense(SHAPE)
    together = ranker.searcher(model, features, range(12))
    for caption in range(12):
        alone = ranker.searcher(model, features, [caption])
        assert torch.allclose(together(caption), alone(0), atol=1e-5)


def test_the_ranks_of_a_split_are_those_of_its_searches(toy_features):
    features = toy_features(images=7)
    torch.manual_seed(0)
    model, ranker = RetrievalModel(SHAPE), Dense(SHAPE)
    search = ranker.searcher(model, features, range(14))
    scores = torch.stack([search(i) for i in range(14)])
    expected = rank_table(scores, torch.eye(7), features.image_index, torch.arange(7))
    found = ranker.rank(model, features, "cpu")
    for direction in ("speech_to_image", "image_to_speech"):
        assert found.ranks(direction).tolist() == expected.ranks(direction).tolist()


def test_it_learns_and_ranks_by_what_it_learnt(toy_features):
    torch.set_num_threads(1)
    training = Training(seed=1, steps=60, batch_size=16, warm_up=5, method="dense")
    trained = train(training, toy_features(images=30), toy_features(images=30, seed=1))
    assert trained.validation["mean_R@1"] > 10  # by chance it would be 3
    assert trained.ranker is trained.competitor
    found = retrieval_metrics(trained.ranker.rank(trained.model, toy_features(seed=1), "cpu"))
    assert found["mean_R@1"] > 10


def test_every_weight_that_it_uses_is_trained(toy_features):
    features = toy_features(images=8)
    torch.manual_seed(0)
    model, competitor = RetrievalModel(SHAPE), Dense(SHAPE)
    batch = make_batch(features, torch.arange(0, 16, 2), "cpu")
    competitor.losses(model, batch, torch.Generator()).total.backward()
    assert all(one.grad.abs().sum() > 0 for one in competitor.parameters())
    assert model.speech_head.layer_weights.grad.abs().sum() > 0
    assert model.log_scale.grad.abs() > 0
    assert model.speech_head.projection.weight.grad is None  # the embedding has no part
