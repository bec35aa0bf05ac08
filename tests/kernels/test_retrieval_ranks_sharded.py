"""`retrieval_ranks` with the gallery split over processes equals the single process."""

import pytest
import torch
from cmdlab_kernels import retrieval_ranks
from torch import distributed, multiprocessing

FIELDS = ("speech_greater", "speech_equal", "image_greater", "image_equal")


def run_shard(rank, world, folder, inputs):
    """One process of the group: it holds all captions and its own images."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    speech, image, speech_image_id, image_id = inputs
    mine = torch.arange(len(image)).tensor_split([5, 12][: world - 1])[rank]
    try:
        result = retrieval_ranks(
            speech, image[mine], speech_image_id, image_id[mine], group=distributed.group.WORLD
        )
        torch.save([getattr(result, field) for field in FIELDS], folder / f"{rank}.pt")
    except ValueError as error:
        torch.save(str(error), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def run(world, folder, inputs):
    multiprocessing.start_processes(
        run_shard, (world, folder, inputs), nprocs=world, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def embeddings():
    generator = torch.Generator().manual_seed(0)
    speech = torch.randint(-2, 3, (60, 6), generator=generator).float()  # full of ties
    image = torch.randint(-2, 3, (20, 6), generator=generator).float()
    return speech, image, torch.randperm(60, generator=generator) % 20, torch.arange(20)


@pytest.mark.parametrize("world", [2, 3])
def test_shards_add_up(tmp_path, world):
    inputs = embeddings()
    whole = retrieval_ranks(*inputs)
    shards = run(world, tmp_path, inputs)
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
