"""The momentum queue: its loss against the definition in float64, and what it remembers."""

import pytest
import torch

from cmdlab.retrieval.model import RetrievalModel, Shape
from cmdlab.retrieval.momentum import MomentumQueue
from cmdlab.retrieval.training import Training, make_batch, train

SHAPE = Shape(2, 16, 12, 8, image_head="patches")


@pytest.fixture
def features(toy_features):
    return toy_features(images=10)


def made(steps: int = 100, batch_size: int = 6, soft: float = 0.4):
    torch.manual_seed(0)
    model = RetrievalModel(SHAPE)
    return model, MomentumQueue(model, steps, batch_size, soft)


def moved(model: RetrievalModel, seed: int) -> None:
    """A step of some optimiser."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            one += 0.1 * torch.randn(one.shape, generator=generator)


def embeddings(model, batch):
    return (
        model.speech_head(batch.states, batch.lengths)[1],
        model.image_head(batch.patches, batch.embedding)[1],
    )


def test_the_loss_is_that_of_its_definition(features):
    """Three steps: in loops over the pairs that were seen, with a copy that follows by hand."""
    model, queue = made(soft=0.4)
    slow = RetrievalModel(SHAPE)
    slow.load_state_dict(model.state_dict())
    past: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    for step in range(3):
        moved(model, step)
        captions = torch.tensor([0, 1, 4, 7, 12, 13]) + step
        batch = make_batch(features, captions, "cpu")
        found = queue.losses(model, batch, torch.Generator())
        with torch.no_grad():
            for own, other in zip(slow.parameters(), model.parameters(), strict=True):
                own.copy_(queue.momentum * own + (1 - queue.momentum) * other)
            fast = [one.double() for one in embeddings(model, batch)]
            slower = [one.double() for one in embeddings(slow, batch)]
        now = list(zip(*slower, batch.image_id.tolist(), strict=True))
        keys = now + past
        scale = model.scale.double().item()
        share = min(len(past), queue.length) / queue.length
        total = 0.0
        for side in (0, 1):  # captions among images, images among captions
            for i in range(6):
                stack = torch.stack([key[1 - side] for key in keys])
                log_p = (scale * stack @ fast[side][i]).log_softmax(0)
                similar = (scale * stack @ slower[side][i]).softmax(0)
                own = torch.tensor([float(key[2] == now[i][2]) for key in keys]).double()
                target = 0.4 * share * similar + (1 - 0.4 * share) * own / own.sum()
                total -= (target * log_p).sum().item() / 12
        assert found.total.item() == pytest.approx(total, rel=1e-5)
        assert found.denoising is None
        past += now
    assert queue.length == 24 > len(past) - 6  # nothing had left it yet


def test_the_oldest_pairs_leave_first(features):
    model, queue = made(steps=50, batch_size=6)  # holds two batches
    assert queue.length == 12
    for first in range(0, 20, 5):
        queue.losses(model, make_batch(features, torch.arange(first, first + 5), "cpu"), None)
    kept = sorted(queue.image_id.tolist())
    seen = features.image_index[torch.arange(20)].tolist()
    assert kept == sorted(seen[-12:])
    expected = embeddings(model, make_batch(features, torch.arange(15, 20), "cpu"))
    place = (torch.arange(15, 20)) % 12
    assert torch.allclose(queue.speech[place], expected[0], atol=1e-6)
    assert torch.allclose(queue.image[place], expected[1], atol=1e-6)


def test_sizes_keep_their_proportion_to_the_run():
    lengths = {steps: made(steps, 128)[1].length for steps in (1, 300, 100_000)}
    assert lengths == {1: 128, 300: 1536, 100_000: 65_536}
    momentum = [made(steps, 128)[1].momentum for steps in (1, 300, 5000, 100_000)]
    assert momentum == pytest.approx([0, 1 - 1 / 12, 0.995, 0.995])


def test_the_heads_are_trained_and_the_copy_is_not(features):
    model, queue = made()
    batch = make_batch(features, torch.arange(6), "cpu")
    queue.losses(model, batch, None).total.backward()
    assert all(one.grad is not None for one in model.parameters())
    assert not any(one.requires_grad for one in queue.parameters())


def test_it_learns_and_is_not_there_at_retrieval(toy_features):
    torch.set_num_threads(1)
    training = Training(seed=1, steps=60, batch_size=16, warm_up=5, method="queue")
    trained = train(training, toy_features(images=30), toy_features(images=30, seed=1))
    assert trained.validation["mean_R@1"] > 30  # by chance it would be 3
    assert trained.ranker is None
