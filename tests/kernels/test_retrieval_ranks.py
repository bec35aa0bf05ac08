"""`retrieval_ranks` against hand-written scores and a brute force that shares no code with it."""

import numpy as np
import pytest
import torch
from cmdlab_kernels import retrieval_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("processor")

FIELDS = ("speech_greater", "speech_equal", "image_greater", "image_equal")
ON_CPU = ("reference", "cpu", "auto")


def brute_force(speech, image, speech_image_id, image_id):
    """Counts from all float64 scores, each summed in the order of the dimensions."""
    speech, image = speech.double().numpy(), image.double().numpy()
    scores = np.zeros((len(speech), len(image)))
    for dimension in range(speech.shape[1]):
        scores += np.multiply.outer(speech[:, dimension], image[:, dimension])
    positive = speech_image_id.numpy()[:, None] == image_id.numpy()
    best = np.where(positive, scores, -np.inf)
    wrong = np.where(positive, -np.inf, scores)
    row, column = best.max(1, keepdims=True), best.max(0)
    return (
        (wrong > row).sum(1),
        (wrong == row).sum(1),
        (wrong > column).sum(0),
        (wrong == column).sum(0),
    )


def assert_equal_to_brute_force(result, *inputs):
    for field, expected in zip(FIELDS, brute_force(*inputs), strict=True):
        np.testing.assert_array_equal(getattr(result, field).cpu().numpy(), expected, field)


def ids(captions, images, generator):
    """Every image captioned at least once, both sides shuffled, ids neither dense nor sorted."""
    image_id = torch.randperm(images, generator=generator) * 7 - 3
    extra = torch.randint(images, (captions - images,), generator=generator)
    owner = torch.cat([torch.arange(images), extra])
    return image_id[owner[torch.randperm(captions, generator=generator)]], image_id


@pytest.mark.parametrize("impl", ON_CPU)
def test_counts_of_a_hand_written_matrix(impl):
    # Image vectors are unit axes, so a caption's vector is its row of scores.
    speech = torch.tensor(
        [
            [0.9, 0.5, 0.5, 0.1],  # image 10, alone on top
            [0.7, 0.7, 0.2, 0.1],  # image 10, tied with 11
            [0.9, 0.3, 0.1, 0.8],  # image 11: two above
            [0.2, 0.2, 0.2, 0.2],  # image 12: all tied
            [0.1, 0.6, 0.4, 0.5],  # image 13: one above
        ]
    )
    result = retrieval_ranks(
        speech,
        torch.eye(4),
        torch.tensor([10, 10, 11, 12, 13]),
        torch.tensor([10, 11, 12, 13]),
        impl=impl,
    )
    assert result.speech_greater.tolist() == [0, 0, 2, 0, 1]
    assert result.speech_equal.tolist() == [0, 1, 0, 3, 0]
    # best caption of each image: .9, .3, .2, .5
    assert result.image_greater.tolist() == [0, 3, 2, 1]
    assert result.image_equal.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("impl", ON_CPU)
def test_constant_embeddings_tie_with_everything(impl):
    speech, image = torch.full((12, 5), 0.3), torch.full((4, 5), 0.7)
    owner = torch.arange(12) // 3
    result = retrieval_ranks(speech, image, owner, torch.arange(4), impl=impl)
    assert result.speech_equal.tolist() == [3] * 12
    assert result.image_equal.tolist() == [9] * 4
    assert not result.speech_greater.any()
    assert not result.image_greater.any()


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize(
    ("captions", "images", "width"), [(1, 1, 1), (257, 31, 33), (70, 70, 1), (1100, 600, 24)]
)
def test_equal_to_brute_force(impl, dtype, captions, images, width):
    generator = torch.Generator().manual_seed(captions)
    speech_image_id, image_id = ids(captions, images, generator)
    speech = torch.randn(captions, width, generator=generator).to(dtype)
    image = torch.randn(images, width, generator=generator).to(dtype)
    inputs = speech, image, speech_image_id, image_id
    assert_equal_to_brute_force(retrieval_ranks(*inputs, impl=impl), *inputs)


@pytest.mark.parametrize("impl", ON_CPU)
def test_the_best_of_several_views_counts_and_none_of_them_competes(impl):
    image = torch.tensor([[0.9, 0.0], [0.5, 0.0], [0.6, 0.0], [0.5, 0.1]])
    speech = torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    result = retrieval_ranks(
        speech, image, torch.tensor([5, 8]), torch.tensor([5, 8, 8, 5]), impl=impl
    )
    assert result.speech_greater.tolist() == [0, 1]  # caption 1: view .6 against .9
    assert result.speech_equal.tolist() == [0, 0]
    assert result.image_greater.tolist() == [0, 1, 1, 0]
    assert result.image_equal.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("groups", [1, 3, 200])
def test_any_number_of_positives_equals_brute_force(impl, groups):
    generator = torch.Generator().manual_seed(groups)
    speech = torch.randint(-2, 3, (700, 12), generator=generator).float()
    image = torch.randint(-2, 3, (2100, 12), generator=generator).float()
    speech_image_id = torch.randperm(700, generator=generator) % groups * 5 - 9
    image_id = torch.randperm(2100, generator=generator) % groups * 5 - 9
    inputs = speech, image, speech_image_id, image_id
    assert_equal_to_brute_force(retrieval_ranks(*inputs, impl=impl), *inputs)


@pytest.mark.parametrize("impl", ["cpu", "auto"])
@pytest.mark.parametrize(
    "sizes", [(1e150, 1e-170), (1e-170, 1e150), (1e300, 1e-300), (1e-9, 1e308)]
)
def test_float64_entries_whose_squares_underflow_or_overflow(impl, sizes):
    generator = torch.Generator().manual_seed(0)
    speech = sizes[0] * torch.randn(80, 512, dtype=torch.float64, generator=generator)
    image = sizes[1] * torch.randn(20, 512, dtype=torch.float64, generator=generator)
    image = image.clamp(-sizes[1], sizes[1]).repeat(4, 1)  # copies, whose scores must tie
    speech[0], image[::20] = 0, image[::20] * 1e-20  # not all rows are like the largest
    inputs = speech, image, torch.arange(80), torch.arange(80)
    assert_equal_to_brute_force(retrieval_ranks(*inputs, impl=impl), *inputs)


def test_sums_that_would_overflow_int32():
    """Ones are 127 in int8, and 127² times so many dimensions is more than an int32 holds."""
    dimensions = 2**31 // 127**2 + 1
    speech, image = torch.ones(16, dimensions), torch.ones(2, dimensions)
    image[1, : dimensions // 3] = -1
    inputs = speech, image, torch.tensor([1] * 15 + [0]), torch.arange(2)
    assert_equal_to_brute_force(retrieval_ranks(*inputs, impl="cpu"), *inputs)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), images=st.integers(1, 40), width=st.integers(1, 40))
def test_counts_do_not_depend_on_the_order(seed, images, width):
    generator = torch.Generator().manual_seed(seed)
    captions = images * 3
    speech_image_id, image_id = ids(captions, images, generator)
    speech = torch.randint(-2, 3, (captions, width), generator=generator).float()
    image = torch.randint(-2, 3, (images, width), generator=generator).float()
    result = retrieval_ranks(speech, image, speech_image_id, image_id)
    rows = torch.randperm(captions, generator=generator)
    columns = torch.randperm(images, generator=generator)
    permuted = retrieval_ranks(
        speech[rows], image[columns], speech_image_id[rows], image_id[columns]
    )
    assert torch.equal(result.speech_greater[rows], permuted.speech_greater)
    assert torch.equal(result.speech_equal[rows], permuted.speech_equal)
    assert torch.equal(result.image_greater[columns], permuted.image_greater)
    assert torch.equal(result.image_equal[columns], permuted.image_equal)


def small():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 5, generator=generator), torch.randn(4, 5, generator=generator)


def test_registration():
    speech, image = small()
    owner, image_id = torch.arange(12) % 4, torch.arange(4)
    for impl in ("reference", "cpu"):
        inputs = speech, image, owner, image_id, impl
        torch.library.opcheck(torch.ops.cmdlab_kernels.retrieval_ranks, inputs)


def test_under_torch_compile():
    speech, image = small()
    owner, image_id = torch.arange(12) % 4, torch.arange(4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def recall(speech, image):
        return (retrieval_ranks(speech, image, owner, image_id).speech_greater < 1).float().mean()

    expected = retrieval_ranks(speech, image, owner, image_id, impl="reference")
    assert recall(speech, image) == (expected.speech_greater < 1).float().mean()


def test_result_requires_no_grad():
    speech, image = small()
    speech.requires_grad_()
    result = retrieval_ranks(speech, image, torch.arange(12) % 4, torch.arange(4))
    assert not result.speech_greater.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "supported are"),
        ({"impl": "triton"}, "supports CUDA"),
        ({"speech": torch.zeros(12, 6)}, r"\[N, D\]"),
        ({"speech": torch.zeros(0, 5)}, "empty"),
        ({"speech": torch.full((12, 5), torch.nan)}, "finite"),
        ({"image": torch.full((4, 5), torch.inf)}, "finite"),
        ({"image": torch.zeros(4, 5, dtype=torch.float64)}, "one dtype"),
        ({"speech_image_id": torch.zeros(3, dtype=torch.int64)}, "must match"),
        ({"speech_image_id": torch.arange(12, dtype=torch.int32) % 4}, "int64"),
        ({"speech_image_id": torch.arange(12) % 5}, "4 is not in image_id"),
        ({"speech_image_id": torch.arange(12) % 3}, "3 has no caption"),
    ],
)
def test_refusals(change, message):
    speech, image = small()
    inputs = {
        "speech": speech,
        "image": image,
        "speech_image_id": torch.arange(12) % 4,
        "image_id": torch.arange(4),
    }
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(**inputs | change)
