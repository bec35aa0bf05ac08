"""`retrieval_ranks` with the gallery split over processes equals the single process."""

from datetime import timedelta

import pytest
import torch
from cmdlab_kernels import retrieval_ranks
from torch import distributed, multiprocessing

pytestmark = pytest.mark.usefixtures("processor")

FIELDS = ("speech_greater", "speech_equal", "image_greater", "image_equal")


def run_shard(rank, world, folder, inputs, cuts):
    """One process of the group: it holds all captions and its own images."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        *("gloo", f"file://{folder}/meeting"),
        timeout=timedelta(seconds=20),  # a rank that waits for ever fails the test
        rank=rank,
        world_size=world,
    )
    speech, image, speech_image_id, image_id = inputs[rank] if isinstance(inputs, list) else inputs
    mine = torch.arange(len(image)).tensor_split(cuts[: world - 1])[rank]
    try:
        result = retrieval_ranks(
            speech, image[mine], speech_image_id, image_id[mine], group=distributed.group.WORLD
        )
        torch.save([getattr(result, field) for field in FIELDS], folder / f"{rank}.pt")
    except ValueError as error:
        torch.save(str(error), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def run(world, folder, inputs, cuts=(5, 12)):
    multiprocessing.start_processes(
        run_shard, (world, folder, inputs, cuts), nprocs=world, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def embeddings():
    generator = torch.Generator().manual_seed(0)
    speech = torch.randint(-2, 3, (60, 6), generator=generator).float()  # full of ties
    image = torch.randint(-2, 3, (20, 6), generator=generator).float()
    return speech, image, torch.randperm(60, generator=generator) % 20, torch.arange(20)


def several_views():
    speech, image, speech_image_id, image_id = embeddings()
    return speech, image, speech_image_id % 7, image_id % 7


@pytest.mark.parametrize(
    ("world", "cuts", "make"),
    [
        (2, (5,), embeddings),
        (3, (5, 12), embeddings),
        (3, (5, 5), embeddings),  # the second shard is empty
        (2, (5,), several_views),
    ],
)
def test_shards_add_up(tmp_path, world, cuts, make):
    inputs = make()
    whole = retrieval_ranks(*inputs)
    shards = run(world, tmp_path, inputs, cuts)
    for shard in shards:
        assert torch.equal(shard[0], whole.speech_greater)
        assert torch.equal(shard[1], whole.speech_equal)
    assert torch.equal(torch.cat([shard[2] for shard in shards]), whole.image_greater)
    assert torch.equal(torch.cat([shard[3] for shard in shards]), whole.image_equal)


def test_a_caption_whose_image_is_on_no_shard_is_refused(tmp_path):
    speech, image, speech_image_id, image_id = embeddings()
    speech = torch.cat([speech, speech[:1]])
    speech_image_id = torch.cat([speech_image_id, torch.tensor([99])])
    for message in run(2, tmp_path, (speech, image, speech_image_id, image_id)):
        assert "on no rank" in message


def nan_in_an_image(speech, image, speech_image_id, image_id):
    image[3, 2] = torch.nan
    return "must be finite"


def an_image_without_a_caption(speech, image, speech_image_id, image_id):
    image_id[3] = 99
    return "99 has no caption"


@pytest.mark.parametrize("spoil", [nan_in_an_image, an_image_without_a_caption])
def test_one_bad_shard_raises_on_every_rank(tmp_path, spoil):
    inputs = embeddings()
    message = spoil(*inputs)
    first, *others = run(3, tmp_path, inputs)
    assert message in first
    assert all("another rank of the group failed" in other for other in others)


def fewer(speech, image, speech_image_id, image_id):
    return speech[:-1], image, speech_image_id[:-1], image_id


def narrower(speech, image, speech_image_id, image_id):
    """As many numbers in all, but twice the captions of half the width."""
    return speech.view(120, 3), image[:, :3], speech_image_id.repeat(2), image_id


def other_dtype(speech, image, speech_image_id, image_id):
    return speech.bfloat16(), image.bfloat16(), speech_image_id, image_id


def other_order(speech, image, speech_image_id, image_id):
    return speech, image, speech_image_id.flip(0), image_id


@pytest.mark.parametrize("change", [fewer, narrower, other_dtype, other_order])
def test_ranks_that_pass_different_captions_are_refused(tmp_path, change):
    for message in run(2, tmp_path, [embeddings(), change(*embeddings())]):
        assert "the same captions" in message
