"""InfoNCE: hand-worked values, a brute-force sum, and its Triton kernels against float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cmdlab_kernels.info_nce import info_nce
from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def pairs(n, d, *, ids=None, seed=0, dtype=torch.float64, device="cpu"):
    """Return unit-norm speech and image [n, d] and ids, about a third of them repeated."""
    generator = torch.Generator().manual_seed(seed)
    speech, image = F.normalize(torch.randn(2, n, d, generator=generator), dim=-1)
    image = F.normalize(image + speech, dim=-1)
    image_id = torch.randint(0, max(1, ids or n), (n,), generator=generator)
    return speech.to(device, dtype), image.to(device, dtype), image_id.to(device)


def loss_and_gradients(speech, image, image_id, scale, dtype, impl):
    leaves = [x.to(dtype).detach().requires_grad_() for x in (speech, image)]
    leaves.append(torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32)))
    leaves[2] = leaves[2].to(speech.device).requires_grad_()
    loss = info_nce(leaves[0], leaves[1], image_id, leaves[2], impl=impl)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


def errors(found, truth):
    """Return the largest error of each tensor, relative to the truth's largest entry."""
    pairs = zip(found, truth, strict=True)
    return [float((f.double() - t).abs().max() / (1 + t.abs().max())) for f, t in pairs]


ON_CPU = pytest.mark.parametrize("impl", ["reference", "cpu", "auto"])


@ON_CPU
@pytest.mark.parametrize("number", [torch.tensor, float])
def test_two_pairs_by_hand(impl, number):
    speech = torch.eye(2)
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # S = [[1, .6], [0, .8]]
    scale = number(2.0)
    rows = [math.log1p(math.exp(2 * (0.6 - 1))), math.log1p(math.exp(2 * (0 - 0.8)))]
    columns = [math.log1p(math.exp(2 * (0 - 1))), math.log1p(math.exp(2 * (0.6 - 0.8)))]
    loss = info_nce(speech, image, torch.tensor([5, 9]), scale, impl=impl)
    assert loss.item() == pytest.approx(sum(rows + columns) / 4, rel=1e-6)


@ON_CPU
def test_captions_of_one_image_are_not_negatives(impl):
    speech, image, _ = pairs(6, 4)
    loss = info_nce(speech, image, torch.zeros(6, dtype=torch.int64), 30.0, impl=impl)
    assert loss.item() == pytest.approx(0, abs=1e-14)


@ON_CPU
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), ids=st.integers(1, 12), seed=st.integers(0, 99))
def test_equals_the_sum_written_out_in_any_order_and_direction(impl, n, ids, seed):
    speech, image, image_id = pairs(n, 5, ids=ids, seed=seed)
    score = (7.0 * speech @ image.T).tolist()
    total = 0.0
    for i in range(n):
        allowed = [j for j in range(n) if j == i or image_id[j] != image_id[i]]
        total += math.log(sum(math.exp(score[i][j] - score[i][i]) for j in allowed)) / 2
        total += math.log(sum(math.exp(score[j][i] - score[i][i]) for j in allowed)) / 2
    scale = torch.tensor(7.0, dtype=torch.float64)
    order = torch.randperm(n)
    loss = info_nce(speech, image, image_id, scale, impl=impl)
    assert loss.item() == pytest.approx(total / n, abs=1e-12)
    swapped = info_nce(image[order], speech[order], image_id[order], scale, impl=impl)
    assert swapped.item() == pytest.approx(total / n, abs=1e-12)


@ON_CPU
@pytest.mark.parametrize("ids", [4, None])
def test_gradients(impl, ids):
    speech, image, image_id = pairs(7, 3, ids=ids)
    scale = torch.tensor(9.0, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (speech, image, scale)]
    run = partial(info_nce, impl=impl)
    assert torch.autograd.gradcheck(lambda s, v, c: run(s, v, image_id, c), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.5, 14.0, 100.0])
@pytest.mark.parametrize(("n", "d", "ids"), [(1, 3, None), (65, 33, 40), (257, 128, None)])
def test_cpu_is_as_exact_as_the_reference(n, d, ids, scale, dtype):
    speech, image, image_id = pairs(n, d, ids=ids, dtype=dtype)
    run = partial(loss_and_gradients, speech, image, image_id, scale)
    truth = run(torch.float64, "reference")
    reference_errors = errors(run(dtype, "reference"), truth)
    for ours, its in zip(errors(run(dtype, "cpu"), truth), reference_errors, strict=True):
        assert ours <= its + TOLERANCE[dtype] / 10


@pytest.mark.parametrize("scale", [40.0, 100.0, 1000.0])
def test_cpu_where_one_shift_does_not_serve_all_rows(scale):
    """A third of the rows far below the rest, and some longer than one."""
    speech, image, image_id = pairs(90, 9, dtype=torch.float32)
    axis = torch.eye(9)[0]
    speech[::3] = F.normalize(0.3 * speech[::3] + axis, dim=-1)
    image = F.normalize(0.3 * image - axis, dim=-1)
    image[:5] *= 3
    run = partial(loss_and_gradients, speech, image, image_id, scale)
    truth = run(torch.float64, "reference")
    for ours, its in zip(
        errors(run(torch.float32, "cpu"), truth),
        errors(run(torch.float32, "reference"), truth),
        strict=True,
    ):
        assert ours <= 2 * its + 1e-6


def test_cpu_operator_registration():
    speech, image, image_id = pairs(20, 5, ids=12, dtype=torch.float32)
    scale = torch.tensor(8.0)
    operators = torch.ops.cmdlab_kernels
    leaves = [x.requires_grad_() for x in (speech, image)]
    torch.library.opcheck(
        operators.info_nce_cpu_fwd, (*leaves, image_id, scale.clone().requires_grad_())
    )
    with torch.no_grad():
        _, *kept = operators.info_nce_cpu_fwd(speech, image, image_id, scale)
        arguments = (torch.tensor(1.0), speech, image, scale, *kept)
        torch.library.opcheck(operators.info_nce_cpu_bwd, arguments)


def test_compiles_whole():
    speech, image, image_id = pairs(9, 4, ids=5)
    compiled = torch.compile(info_nce, backend="aot_eager", fullgraph=True)
    for impl in ("auto", "reference", "cpu"):
        loss = compiled(speech, image, image_id, torch.tensor(5.0), impl=impl)
        torch.testing.assert_close(loss, info_nce(speech, image, image_id, torch.tensor(5.0)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"impl": "fast"}, "impl must be"),
        ({"speech": torch.ones(3, 2)}, r"\[N, D\]"),
        ({"image": torch.ones(4, 2, dtype=torch.float64)}, "share a float dtype"),
        ({"image_id": torch.zeros(3, dtype=torch.int64)}, r"int64 \[4\]"),
        ({"image_id": torch.zeros(4)}, r"int64 \[4\]"),
        ({"scale": torch.ones(1)}, "0-d float"),
        ({"scale": [1.0]}, "0-d float"),
        ({"scale": torch.tensor(1.0, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    inputs = {
        "speech": torch.ones(4, 2),
        "image": torch.ones(4, 2),
        "image_id": torch.arange(4),
        "scale": torch.tensor(1.0),
    }
    with pytest.raises(ValueError, match=says):
        info_nce(**(inputs | change))


def test_kernels_need_cuda(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="float32, float16 and bfloat16 on CUDA"):
        info_nce(*pairs(4, 2, dtype=torch.float32), torch.tensor(1.0), impl="triton")


def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (63, 16), (65, 33), (129, 64), (257, 70)])
def test_triton_is_as_exact_as_torch(triton_device, nan_memory, n, d, dtype):
    if dtype == torch.bfloat16 and triton_device.type == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    speech, image, image_id = pairs(n, d, ids=2 * n // 3, dtype=dtype, device=triton_device)
    run = partial(loss_and_gradients, speech, image, image_id, 20.0)
    truth = run(torch.float64, "reference")
    torch_errors = errors(run(dtype, "reference"), truth)
    for ours, theirs in zip(errors(run(dtype, "triton"), truth), torch_errors, strict=True):
        assert ours <= theirs + TOLERANCE[dtype]


def test_triton_with_every_score_far_below_the_scale(triton_device):
    """Scale 100 and cosines near −1: exp(score − scale) is zero in float32."""
    speech, image, image_id = pairs(70, 9, device=triton_device)
    axis = torch.eye(9, dtype=torch.float64, device=triton_device)[0]
    speech, image = (
        F.normalize(0.3 * speech + axis, dim=-1),
        F.normalize(0.3 * image - axis, dim=-1),
    )
    assert (speech @ image.T).max() < -0.65
    run = partial(loss_and_gradients, speech.float(), image.float(), image_id, 100.0)
    truth = run(torch.float64, "reference")
    assert max(errors(run(torch.float32, "triton"), truth)) < 1e-4


def test_triton_with_rows_longer_than_one(triton_device):
    """Logits far above the scale: exp(score − scale) is infinite in float32."""
    generator = torch.Generator().manual_seed(0)
    speech, image = 2 * torch.randn(2, 60, 4, generator=generator).to(triton_device)
    image_id = torch.arange(60, device=triton_device)
    for scale in (1.0, 30.0):
        run = partial(loss_and_gradients, speech, image, image_id, scale)
        truth = run(torch.float64, "reference")
        assert max(errors(run(torch.float32, "triton"), truth)) < 1e-4


def test_triton_backward_in_chunks(triton_device, monkeypatch):
    from cmdlab_kernels import info_nce_triton

    speech, image, image_id = pairs(150, 8, ids=90, dtype=torch.float32, device=triton_device)
    whole = loss_and_gradients(speech, image, image_id, 20.0, torch.float32, "triton")
    monkeypatch.setattr(info_nce_triton, "COLUMNS_AT_ONCE", 48)
    chunks = loss_and_gradients(speech, image, image_id, 20.0, torch.float32, "triton")
    for a, b in zip(whole, chunks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_triton_operator_registration(triton_device):
    from cmdlab_kernels.info_nce_triton import info_nce_bwd, info_nce_fwd

    speech, image, image_id = pairs(20, 5, ids=12, dtype=torch.float32, device=triton_device)
    scale = torch.tensor(8.0, device=triton_device)
    leaves = [x.requires_grad_() for x in (speech, image)]
    torch.library.opcheck(info_nce_fwd, (*leaves, image_id, scale.requires_grad_()))
    with torch.no_grad():
        _, row_lse, column_lse = info_nce_fwd(speech, image, image_id, scale)
        arguments = (scale, speech, image, image_id, scale, row_lse, column_lse)
        torch.library.opcheck(info_nce_bwd, arguments)


def test_triton_compiles_whole(triton_device):
    speech, image, image_id = pairs(20, 5, ids=12, dtype=torch.float32, device=triton_device)
    scale = torch.tensor(8.0, device=triton_device)
    backend = "inductor" if triton_device.type == "cuda" else "aot_eager"
    step = torch.compile(partial(info_nce, impl="triton"), backend=backend, fullgraph=True)
    expected = info_nce(speech, image, image_id, scale, impl="triton")
    torch.testing.assert_close(step(speech, image, image_id, scale), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="repeats and memory are a GPU's")
def test_triton_repeats_bit_for_bit_without_the_score_matrix(triton_device):
    speech, image, image_id = pairs(1024, 256, ids=700, dtype=torch.bfloat16, device=triton_device)
    run = partial(loss_and_gradients, image_id=image_id, scale=30.0, impl="triton")
    first = run(speech, image, dtype=torch.bfloat16)
    for _ in range(1000):
        again = run(speech, image, dtype=torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    n = 16384
    speech, image, image_id = pairs(n, 64, dtype=torch.bfloat16, device=triton_device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_and_gradients(speech, image, image_id, 30.0, torch.bfloat16, "triton")
    assert torch.cuda.max_memory_allocated() - before < n * n  # bytes: half a bfloat16 matrix
