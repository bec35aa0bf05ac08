"""The Triton path of `retrieval_ranks`, on a GPU or interpreted."""

import pytest
import torch
from cmdlab_kernels import retrieval_ranks
from cmdlab_kernels.retrieval_scores import tile_scores

pytest.importorskip("triton")

FIELDS = ("speech_greater", "speech_equal", "image_greater", "image_equal")


def trained(captions, images, width, dtype, noise=1.0):
    """Embeddings whose right answers mostly score high, as after training."""
    generator = torch.Generator().manual_seed(captions)
    image = torch.randn(images, width, generator=generator)
    owner = torch.arange(captions) % images
    speech = image[owner] + noise * torch.randn(captions, width, generator=generator)
    speech, image = (torch.nn.functional.normalize(x, dim=1).to(dtype) for x in (speech, image))
    return speech, image, owner + 5, torch.arange(images) + 5


def assert_equal_to_reference(inputs, device, path=None):
    expected = retrieval_ranks(*inputs, impl="reference")
    result = retrieval_ranks(*(x.to(device) for x in inputs), impl="triton")
    for field in FIELDS:
        assert torch.equal(getattr(result, field).cpu(), getattr(expected, field)), field
    if path:
        assert result.path == path


def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("shape", [(1, 1, 1), (130, 127, 33), (257, 129, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_equals_the_reference(triton_device, shape, dtype):
    assert_equal_to_reference(trained(*shape, dtype), triton_device)


@pytest.mark.parametrize("name", ["INT8", "FP16", "FP32"])
def test_triton_precisions(triton_device, monkeypatch, name):
    from cmdlab_kernels import retrieval_ranks_triton

    precision = getattr(retrieval_ranks_triton, name)
    monkeypatch.setattr(retrieval_ranks_triton, "precisions", lambda *_: (precision,))
    inputs = trained(190, 70, 40, torch.float32)
    assert_equal_to_reference(inputs, triton_device, precision.name)


def test_triton_pair_scores_are_the_defined_ones(triton_device):
    from cmdlab_kernels import retrieval_ranks_triton

    speech, image, *_ = (x.to(triton_device) for x in trained(90, 30, 67, torch.float32))
    generator = torch.Generator().manual_seed(0)
    row, column = (
        torch.randint(n, (130,), generator=generator).to(triton_device) for n in (90, 30)
    )
    scores = retrieval_ranks_triton.pair_scores(speech, image, row, column)
    assert torch.equal(scores, tile_scores(speech, image)[row, column])
    pairs = torch.stack([row, column], 1)  # so that either index lies in steps
    assert torch.equal(
        retrieval_ranks_triton.pair_scores(speech, image, pairs[:, 0], pairs[:, 1]), scores
    )


def test_triton_exact_path_with_few_doubts(triton_device, monkeypatch):
    from cmdlab_kernels import retrieval_ranks_triton

    monkeypatch.setattr(retrieval_ranks_triton, "precisions", lambda *_: ())
    speech, image, *ids = trained(130, 127, 33, torch.float32)
    image[7] = image[8]  # ties are in doubt
    assert_equal_to_reference((speech, image, *ids), triton_device, "exact")


def test_triton_several_views_of_an_image(triton_device):
    speech, image, *_ = trained(150, 140, 24, torch.float32)
    inputs = speech, image, torch.arange(150) % 14 * 3, torch.arange(140) % 14 * 3
    assert_equal_to_reference(inputs, triton_device)


def test_triton_ties(triton_device):
    generator = torch.Generator().manual_seed(0)
    speech = torch.randint(-1, 2, (100, 5), generator=generator).float()
    image = torch.randint(-1, 2, (50, 5), generator=generator).float()
    assert_equal_to_reference(
        (speech, image, torch.arange(100) % 50, torch.arange(50)), triton_device
    )


def test_triton_falls_back_when_too_much_is_in_doubt(triton_device, monkeypatch):
    from cmdlab_kernels import retrieval_ranks_triton

    monkeypatch.setattr(retrieval_ranks_triton, "PILOT_ROWS", 8)
    speech, image = torch.full((40, 8), 0.3), torch.full((20, 8), 0.7)
    inputs = speech, image, torch.arange(40) % 20, torch.arange(20)
    assert_equal_to_reference(inputs, triton_device, "exact")


def test_triton_in_several_launches(triton_device, monkeypatch):
    from cmdlab_kernels import retrieval_ranks_triton

    monkeypatch.setattr(retrieval_ranks_triton, "PAIRS_AT_ONCE", 4000)
    monkeypatch.setattr(retrieval_ranks_triton, "PILOT_ROWS", 16)
    assert_equal_to_reference(trained(100, 90, 24, torch.float32), triton_device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_thousand_runs_are_equal():
    inputs = [x.cuda() for x in trained(1000, 300, 96, torch.float32)]
    first = retrieval_ranks(*inputs, impl="triton")
    for _ in range(1000):
        again = retrieval_ranks(*inputs, impl="triton")
        assert all(torch.equal(getattr(first, f), getattr(again, f)) for f in FIELDS)
