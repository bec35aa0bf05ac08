"""Adversarial inputs against the certified paths: they must never differ from brute force."""

import numpy as np
import pytest
import torch
from cmdlab_kernels import retrieval_ranks, retrieval_ranks_cpu
from cmdlab_kernels.retrieval_bounds import doubtful_interval, round_rows
from hypothesis import given, settings
from hypothesis import strategies as st

FIELDS = ("speech_greater", "speech_equal", "image_greater", "image_equal")
PRECISIONS = {p.name: p for p in retrieval_ranks_cpu.precisions()}


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
    return [
        counts.tolist()
        for counts in (
            (wrong > row).sum(1),
            (wrong == row).sum(1),
            (wrong > column).sum(0),
            (wrong == column).sum(0),
        )
    ]


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def near_ties(generator, n, m, d):
    """Images that are one vector, some with one entry moved by one ulp."""
    image = normal(generator, d).expand(m, d).clone()
    for j in range(0, m, 2):
        k = int(torch.randint(d, (), generator=generator))
        image[j, k] = torch.nextafter(image[j, k], torch.tensor(torch.inf))
    return normal(generator, n, d), image


def dynamic_range(generator, n, m, d):
    def rows(count):
        return normal(generator, count, d) * 10.0 ** (
            torch.randint(-12, 13, (count, d), generator=generator)
        )

    return rows(n), rows(m)


def duplicates(generator, n, m, d):
    few = normal(generator, 3, d)
    pick = torch.randint(3, (n + m,), generator=generator)
    return few[pick[:n]], few[pick[n:]]


def zeros(generator, n, m, d):
    speech, image = normal(generator, n, d), normal(generator, m, d)
    speech[torch.rand(n, generator=generator) < 0.5] = 0
    image[torch.rand(m, generator=generator) < 0.5] = 0
    return speech, image


def denormals(generator, n, m, d):
    return normal(generator, n, d) * 1e-40, normal(generator, m, d) * 1e-42


def not_unit_norm(generator, n, m, d):
    def rows(count):
        scale = 10.0 ** torch.randint(-6, 7, (count, 1), generator=generator)
        return normal(generator, count, d) * scale

    return rows(n), rows(m)


def near_infinity(generator, n, m, d):
    largest = torch.finfo(torch.float32).max
    return tuple(
        torch.nn.functional.normalize(normal(generator, k, d), dim=1) * largest for k in (n, m)
    )


def small_integers(generator, n, m, d):
    return tuple(torch.randint(-2, 3, (k, d), generator=generator).float() for k in (n, m))


def trained(generator, n, m, d):
    image = torch.nn.functional.normalize(normal(generator, m, d), dim=1)
    speech = image[torch.arange(n) % m] + 0.05 * normal(generator, n, d)
    return speech, image


ATTACKS = (
    near_ties,
    dynamic_range,
    duplicates,
    zeros,
    denormals,
    not_unit_norm,
    near_infinity,
    small_integers,
    trained,
)


@pytest.mark.parametrize("name", list(PRECISIONS))
@settings(deadline=None, max_examples=60)
@given(
    attack=st.sampled_from(ATTACKS),
    seed=st.integers(0, 2**31),
    images=st.integers(1, 30),
    width=st.integers(1, 48),
)
def test_never_differs_from_brute_force(name, attack, seed, images, width):
    """Each precision on its own, never giving up on what it is allowed to try."""
    precision = PRECISIONS[name]
    without_limit = retrieval_ranks_cpu.Precision(
        precision.name, precision.dtype, precision.product_dtype, 1.0
    )
    generator = torch.Generator().manual_seed(seed)
    captions = 2 * images
    speech, image = attack(generator, captions, images, width)
    inputs = speech, image, torch.arange(captions) % images, torch.arange(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_ranks_cpu, "precisions", lambda: [without_limit])
        result = retrieval_ranks(*inputs, impl="cpu")
    assert [getattr(result, field).tolist() for field in FIELDS] == brute_force(*inputs)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float32], ids=str
)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 300))
def test_the_bound_holds(dtype, seed, width):
    """No product of the rounded rows leaves the interval around its own float64 score."""
    generator = torch.Generator().manual_seed(seed)
    speech, image = not_unit_norm(generator, 40, 40, width)
    low_speech, low_image = round_rows(speech, dtype), round_rows(image, dtype)
    products = low_speech.values.double() @ low_image.values.double().T
    lower, upper = doubtful_interval(
        (speech.double() * image.double()).sum(1), low_speech, low_image
    )
    assert (products.diagonal() >= lower).all()
    assert (products.diagonal() <= upper).all()


def test_little_in_doubt_keeps_the_fastest_precision_and_much_gives_it_up():
    generator = torch.Generator().manual_seed(0)
    speech, image = trained(generator, 300, 100, 256)
    ids = torch.arange(300) % 100, torch.arange(100)
    fastest = retrieval_ranks_cpu.precisions()[0].name
    assert retrieval_ranks(speech, image, *ids).path == fastest
    same = torch.full((1, 256), 0.1)
    assert retrieval_ranks(same.expand(300, -1), same.expand(100, -1), *ids).path == "exact"


def test_captions_that_need_different_precisions_make_one_result(monkeypatch):
    """A third of them sharp, a third untrained, a third collapsed."""
    generator = torch.Generator().manual_seed(0)
    speech, image = trained(generator, 900, 300, 64)
    speech[1::3] = normal(generator, 300, 64)
    speech[2::3] = image[0]
    image[100:] = image[100]
    inputs = speech, image, torch.arange(900) % 300, torch.arange(300)
    passes, count = [], retrieval_ranks_cpu._count

    def spy(precision, speech, image, chosen, *rest):
        passes.append(len(chosen))
        return count(precision, speech, image, chosen, *rest)

    monkeypatch.setattr(retrieval_ranks_cpu, "_count", spy)
    result = retrieval_ranks(*inputs)
    assert [getattr(result, field).tolist() for field in FIELDS] == brute_force(*inputs)
    assert result.path == "exact"
    assert 0 < passes[0] < 900


def test_tiles_of_any_size_and_padding_give_the_same_counts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    speech, image = small_integers(generator, 300, 77, 9)
    inputs = speech, image, torch.arange(300) % 77, torch.arange(77)
    expected = brute_force(*inputs)
    for height, width in ((1, 8), (48, 16), (479, 40)):
        monkeypatch.setattr(retrieval_ranks_cpu, "HEIGHT", height)
        monkeypatch.setattr(retrieval_ranks_cpu, "WIDTH", width)
        monkeypatch.setattr(
            retrieval_ranks_cpu,
            "precisions",
            lambda: [retrieval_ranks_cpu.Precision("cpu-fp32", torch.float32, torch.float32, 1.0)],
        )
        result = retrieval_ranks(*inputs, impl="cpu")
        assert [getattr(result, field).tolist() for field in FIELDS] == expected


def test_reduced_precision_products_asked_for_by_the_user_do_not_reach_float32(monkeypatch):
    monkeypatch.setattr(retrieval_ranks_cpu, "precisions", lambda: [retrieval_ranks_cpu.FP32])
    generator = torch.Generator().manual_seed(0)
    speech, image = trained(generator, 512, 512, 512)
    inputs = speech, image, torch.arange(512), torch.arange(512)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        result = retrieval_ranks(*inputs, impl="cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert [getattr(result, field).tolist() for field in FIELDS] == brute_force(*inputs)
