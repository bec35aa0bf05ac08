"""Adversarial inputs against the certified paths: they must never differ from brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cmdlab_kernels import (
    retrieval_float32_cpu,
    retrieval_ranks,
    retrieval_ranks_cpu,
    retrieval_tiles_cpu,
)
from cmdlab_kernels.retrieval_bounds import doubtful_interval, ordinary, round_rows
from cmdlab_kernels.retrieval_ranks import best_scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("processor")

FIELDS = ("speech_greater", "speech_equal", "image_greater", "image_equal")
PRECISIONS = {p.name: p for p in (retrieval_tiles_cpu.INT8, retrieval_tiles_cpu.BF16)}
if not retrieval_tiles_cpu.int8_is_exact():  # test_torch_state.py says when
    del PRECISIONS["cpu-int8"]


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
        exponents = torch.randint(-40, 9, (count, d), generator=generator)
        return normal(generator, count, d) * 2.0**exponents

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


def some_denormals(generator, n, m, d):
    def rows(count):
        tiny = torch.rand(count, d, generator=generator) < 0.5
        return normal(generator, count, d) * torch.where(tiny, 1e-40, 1.0)

    return rows(n), rows(m)


def not_unit_norm(generator, n, m, d):
    def rows(count):
        scale = 10.0 ** torch.randint(-6, 7, (count, 1), generator=generator)
        return normal(generator, count, d) * scale

    return rows(n), rows(m)


def tiny_rows(generator, n, m, d):
    """Rows whose squares underflow in float32 beside rows of ordinary size."""

    def rows(count):
        tiny = torch.rand(count, 1, generator=generator) < 0.5
        return normal(generator, count, d) * torch.where(tiny, 2.0**-70, 1.0)

    speech, image = rows(n), rows(m)
    image[1::2] = image[: m // 2]  # ties
    return speech, image


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
    some_denormals,
    not_unit_norm,
    tiny_rows,
    small_integers,
    trained,
)


def assert_equal_to_brute_force(result, *inputs):
    assert [getattr(result, field).tolist() for field in FIELDS] == brute_force(*inputs)


@settings(deadline=None, max_examples=60)
@given(
    attack=st.sampled_from(ATTACKS),
    seed=st.integers(0, 2**31),
    images=st.integers(1, 30),
    width=st.integers(1, 48),
)
def test_never_differs_from_brute_force(attack, seed, images, width):
    inputs = attacked(attack, seed, images, width)
    assert_equal_to_brute_force(retrieval_ranks(*inputs, impl="cpu"), *inputs)


@pytest.mark.parametrize("name", [*PRECISIONS, retrieval_float32_cpu.PATH])
@settings(deadline=None, max_examples=60)
@given(
    attack=st.sampled_from(ATTACKS),
    seed=st.integers(0, 2**31),
    images=st.integers(1, 30),
    width=st.integers(1, 48),
)
def test_a_precision_that_never_gives_up_does_not_either(name, attack, seed, images, width):
    inputs = attacked(attack, seed, images, width)
    tried = []
    if name in PRECISIONS:
        tried = [replace(PRECISIONS[name], doubtful_limit=1.0, crowded_limit=1.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_ranks_cpu, "precisions", lambda dimensions: tried)
        patch.setattr(retrieval_float32_cpu, "CROWDED_LIMIT", 1.0)
        patch.setattr(retrieval_float32_cpu, "PAIRS", 0)
        patch.setattr(retrieval_float32_cpu, "BLOCK", 150)
        result = retrieval_ranks(*inputs, impl="cpu")
    assert_equal_to_brute_force(result, *inputs)
    assert result.path == (name if ordinary(*inputs[:2]) else "exact")  # all may be zeros


def attacked(attack, seed, images, width):
    generator = torch.Generator().manual_seed(seed)
    speech, image = attack(generator, 2 * images, images, width)
    return speech, image, torch.arange(2 * images) % images, torch.arange(images)


def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("name", ["INT8", "FP16", "FP32"])
@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the device is always the same
)
@given(
    attack=st.sampled_from(ATTACKS),
    seed=st.integers(0, 2**31),
    images=st.integers(1, 30),
    width=st.integers(1, 48),
)
def test_triton_never_differs_from_brute_force(triton_device, name, attack, seed, images, width):
    pytest.importorskip("triton")
    from cmdlab_kernels import retrieval_ranks_triton

    without_limit = replace(getattr(retrieval_ranks_triton, name), doubtful_limit=1.0)
    generator = torch.Generator().manual_seed(seed)
    captions = 2 * images
    speech, image = attack(generator, captions, images, width)
    shown = torch.arange(images) // 2  # two views of each image
    inputs = speech, image, shown[torch.arange(captions) % images], shown
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_ranks_triton, "precisions", lambda *_: (without_limit,))
        result = retrieval_ranks(*(x.to(triton_device) for x in inputs), impl="triton")
    assert_equal_to_brute_force(result, *inputs)
    assert result.path == (without_limit.name if ordinary(speech, image) else "exact")


def all_denormal(generator, n, m, d):
    return normal(generator, n, d) * 1e-40, normal(generator, m, d) * 1e-42


def near_infinity(generator, n, m, d):
    largest = torch.finfo(torch.float32).max
    return tuple(
        torch.nn.functional.normalize(normal(generator, k, d), dim=1) * largest for k in (n, m)
    )


def far_float64(generator, n, m, d):
    """Copies whose squares overflow on one side and underflow on the other, or nearly so."""
    exponent = int(torch.randint(140, 170, (), generator=generator))
    image = normal(generator, m // 4 + 1, d).double().repeat(4, 1)[:m]
    speech = normal(generator, n, d).double()
    if exponent % 2:
        return speech * 10.0**exponent, image * 10.0**-exponent
    return speech * 10.0**-exponent, image * 10.0**exponent


@settings(deadline=None, max_examples=60)
@given(
    attack=st.sampled_from((all_denormal, near_infinity, far_float64)),
    seed=st.integers(0, 2**31),
    images=st.integers(1, 40),
    width=st.sampled_from((1, 31, 512)),
)
def test_inputs_beyond_the_bound_are_counted_exactly(attack, seed, images, width):
    generator = torch.Generator().manual_seed(seed)
    speech, image = attack(generator, 2 * images, images, width)
    inputs = speech, image, torch.arange(2 * images) % images, torch.arange(images)
    result = retrieval_ranks(*inputs, impl="cpu")
    assert_equal_to_brute_force(result, *inputs)
    assert result.path == "exact"


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
    low = retrieval_ranks_cpu.precisions(256)
    fastest = low[0].name if low else retrieval_float32_cpu.PATH
    assert retrieval_ranks(speech, image, *ids).shares == {fastest: 1}
    same = torch.full((1, 256), 0.1)
    assert retrieval_ranks(same.expand(300, -1), same.expand(100, -1), *ids).shares == {"exact": 1}


def test_captions_that_need_different_precisions_make_one_result():
    """A third of them sharp, a third untrained, a third collapsed."""
    generator = torch.Generator().manual_seed(0)
    speech, image = trained(generator, 900, 300, 256)
    speech[1::3] = normal(generator, 300, 256) / 16
    speech[2::3] = image[2::3] = image[2]
    inputs = speech, image, torch.arange(900) % 300, torch.arange(300)
    result = retrieval_ranks(*inputs)
    assert_equal_to_brute_force(result, *inputs)
    assert result.path == "exact"
    assert result.shares["exact"] == pytest.approx(1 / 3)
    assert sum(result.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_tiles_of_any_size_and_padding_give_the_same_counts(monkeypatch, name):
    generator = torch.Generator().manual_seed(0)
    speech, image = small_integers(generator, 300, 77, 9)
    inputs = speech, image, torch.arange(300) % 77, torch.arange(77)
    expected = brute_force(*inputs)
    without_limit = replace(PRECISIONS[name], doubtful_limit=1.0, crowded_limit=1.0)
    monkeypatch.setattr(retrieval_float32_cpu, "PAIRS", 0)
    monkeypatch.setattr(retrieval_ranks_cpu, "precisions", lambda dimensions: [without_limit])
    for height, width in ((1, 8), (48, 16), (479, 40)):
        monkeypatch.setattr(retrieval_tiles_cpu, "HEIGHT", height)
        monkeypatch.setattr(retrieval_tiles_cpu, "WIDTH", width)
        result = retrieval_ranks(*inputs, impl="cpu")
        assert [getattr(result, field).tolist() for field in FIELDS] == expected
        assert result.path == name


@pytest.mark.parametrize("crowded_limit", [0.03, 1.0])  # much is tied: rows are counted exactly
def test_float32_blocks_of_any_size_give_the_same_counts(monkeypatch, crowded_limit):
    generator = torch.Generator().manual_seed(0)
    speech, image = small_integers(generator, 90, 23, 9)
    ids = torch.arange(90) % 23, torch.arange(23)
    expected = brute_force(speech, image, *ids)
    monkeypatch.setattr(retrieval_float32_cpu, "CROWDED_LIMIT", crowded_limit)
    best = best_scores(speech, image, *ids, "cpu", whole_gallery=True)
    for width, block, compared in ((1, 1, 1), (16, 200, 50), (23, 23 * 89, 2**19), (99, 9**9, 5)):
        monkeypatch.setattr(retrieval_float32_cpu, "WIDTH", width)
        monkeypatch.setattr(retrieval_float32_cpu, "BLOCK", block)
        monkeypatch.setattr(retrieval_float32_cpu, "COMPARED", compared)
        counts = retrieval_float32_cpu.count_float32(speech, image, *ids, *best)
        assert [getattr(counts, field).tolist() for field in FIELDS] == expected


def test_few_pairs_compared_in_tiles_of_any_size_give_the_same_counts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    speech, image = trained(generator, 300, 77, 256)
    speech[::9], image[5:8] = speech[0], image[5]  # some ties, too few to give the product up
    inputs = speech, image, torch.arange(300) % 77, torch.arange(77)
    expected = brute_force(*inputs)
    assert sum(map(sum, expected[1::2])) > 0
    monkeypatch.setattr(retrieval_float32_cpu, "PAIRS", 300 * 77)
    for compared in (1, 7 * 77, 299 * 77, 2**20):
        monkeypatch.setattr(retrieval_float32_cpu, "COMPARED", compared)
        counts = retrieval_float32_cpu.count_small(*inputs)
        assert [getattr(counts, field).tolist() for field in FIELDS] == expected


@pytest.mark.parametrize(("pairs", "path"), [(300, "cpu-fp32"), (299, "cpu-bf16")])
def test_one_product_serves_few_pairs_though_others_are_faster(monkeypatch, pairs, path):
    generator = torch.Generator().manual_seed(0)
    inputs = *trained(generator, 30, 10, 64), torch.arange(30) % 10, torch.arange(10)
    without_limit = replace(PRECISIONS["cpu-bf16"], doubtful_limit=1.0, crowded_limit=1.0)
    monkeypatch.setattr(retrieval_ranks_cpu, "precisions", lambda dimensions: [without_limit])
    monkeypatch.setattr(retrieval_float32_cpu, "PAIRS", pairs)
    assert retrieval_ranks(*inputs, impl="cpu").path == path


def test_reduced_precision_products_asked_for_by_the_user_do_not_reach_float32():
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
    assert_equal_to_brute_force(result, *inputs)
