"""The denoising task's attention and loss: meaning, padding, gradients, kernels against float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cmdlab_kernels.denoising_attention import (
    Projections,
    cross_attention,
    denoising_attention,
    padded_attention,
    reference_attention,
    restoration_loss,
)
from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def task(
    lengths, places, *, d=8, e=6, heads=2, head_width=4, steps=9, dtype=torch.float64, device="cpu"
):
    """Return the inputs of `denoising_attention`, for items of these key lengths and places."""
    generator = torch.Generator().manual_seed(0)
    b, k, w = len(lengths), max(1, *lengths), heads * head_width

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    item = torch.repeat_interleave(torch.arange(b), torch.tensor(places))
    place = torch.cat([torch.randperm(steps, generator=generator)[:n].sort()[0] for n in places])
    clean = normal(b * steps, d)
    return {
        "source": clean,
        "source_index": torch.randint(b * steps, (sum(places),), generator=generator).to(device),
        "position": normal(steps, d),
        "place": place.to(device),
        "item": item.to(device),
        "tokens": normal(b, k, e),
        "lengths": torch.tensor(lengths, device=device),
        "projections": Projections(
            normal(w, d) / d**0.5, normal(2 * w, e) / e**0.5, normal(d, w) / w**0.5
        ),
        "heads": heads,
        "target": clean,
        "target_index": (item * steps + place).to(device),
    }


def leaves_of(inputs, dtype):
    """Return the task in `dtype` and its differentiable inputs."""
    inputs = dict(inputs)
    for name in ("source", "position", "tokens"):
        inputs[name] = inputs[name].to(dtype).detach().requires_grad_()
    weights = [w.to(dtype).detach().requires_grad_() for w in inputs["projections"]]
    inputs["projections"] = Projections(*weights)
    inputs["target"] = inputs["target"].to(dtype).clone()
    return inputs, [inputs["source"], inputs["position"], inputs["tokens"], *weights]


def loss_and_gradients(inputs, dtype, **options):
    inputs, leaves = leaves_of(inputs, dtype)
    loss = denoising_attention(**inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def errors(found, truth):
    """Return the largest error of each tensor, relative to the truth's largest entry."""
    pairs = zip(found, truth, strict=True)
    return [float((f.double() - t).abs().max() / (1 + t.abs().max())) for f, t in pairs]


def poisoned(inputs):
    """Return the task with NaN in the padding of its tokens."""
    padding = torch.arange(inputs["tokens"].shape[1], device=inputs["lengths"].device)
    padding = padding >= inputs["lengths"][:, None]
    return inputs | {"tokens": inputs["tokens"].masked_fill(padding[..., None], torch.nan)}


def test_one_query_written_out():
    query, tokens = torch.randn(1, 4), torch.randn(1, 3, 5)
    projections = Projections(torch.randn(6, 4), torch.randn(12, 5), torch.randn(4, 6))
    item, lengths = torch.tensor([0]), torch.tensor([2])
    q = projections.query @ query[0]
    key_value = projections.key_value @ tokens[0, :2].T  # [12, 2]
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        weights = (q[head] @ key_value[:6][head] / 3**0.5).softmax(0)
        heads.append(key_value[6:][head] @ weights)
    expected = query[0] + projections.output @ torch.cat(heads)
    for impl in ("reference", "padded"):
        found = cross_attention(query, item, tokens, lengths, projections, 2, impl=impl)
        torch.testing.assert_close(found[0], expected)


def test_losses_by_hand():
    restored = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    target = torch.tensor([[0.0, 0.0], [4.0, 3.0], [3.0, 4.0]])
    mse = restoration_loss(restored, target, torch.tensor([1, 2]))
    assert mse.item() == pytest.approx(((1 + 1) / 25 + (4 + 9) / 25) / 2)
    cosine = restoration_loss(restored, target, torch.tensor([1, 2]), loss="cosine")
    assert cosine.item() == pytest.approx(1 - (24 / 25 + 7 / (5 * 2**0.5)) / 2, rel=1e-5)
    assert restoration_loss(restored, restored, torch.tensor([0, 1]), loss="cosine") < 1e-6


def test_query_is_the_donor_at_its_place():
    inputs = task([0, 0], [1, 2])  # without keys the query comes back, so the loss shows it
    query = inputs["source"][inputs["source_index"]] + inputs["position"][inputs["place"]]
    expected = restoration_loss(query, inputs["target"], inputs["target_index"])
    torch.testing.assert_close(denoising_attention(**inputs), expected)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), data=st.data())
def test_padded_equals_reference_and_padding_never_matters(lengths, data):
    places = data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    inputs = task(lengths, places)
    loss = data.draw(st.sampled_from(["normalised_mse", "cosine"]))
    truth = loss_and_gradients(inputs, torch.float64, impl="reference", loss=loss)
    for impl in ("reference", "padded", "auto"):
        found = loss_and_gradients(poisoned(inputs), torch.float64, impl=impl, loss=loss)
        assert max(errors(found, truth)) < 1e-12


def test_an_item_does_not_see_the_others():
    inputs = task([3, 5, 2], [2, 4, 1])
    keep = inputs["item"] == 1
    attend = partial(cross_attention, projections=inputs["projections"], heads=2)
    query = inputs["source"][inputs["source_index"]]
    whole = attend(query, inputs["item"], inputs["tokens"], inputs["lengths"])
    alone = attend(
        query[keep],
        torch.zeros(4, dtype=torch.int64),
        inputs["tokens"][1:2],
        inputs["lengths"][1:2],
    )
    torch.testing.assert_close(whole[keep], alone)


@pytest.mark.parametrize("loss", ["normalised_mse", "cosine"])
@pytest.mark.parametrize("impl", ["reference", "padded"])
def test_gradients(impl, loss):
    inputs, leaves = leaves_of(task([3, 0, 1], [2, 1, 2], d=3, e=2, head_width=1), torch.float64)

    def run(source, position, tokens, *weights):
        changed = {"source": source, "position": position, "tokens": tokens}
        changed["projections"] = Projections(*weights)
        return denoising_attention(**(inputs | changed), impl=impl, loss=loss)

    assert torch.autograd.gradcheck(run, leaves)


def test_target_takes_no_gradient():
    restored, target = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    restoration_loss(restored, target, torch.tensor([0, 1])).backward()
    assert restored.grad is not None
    assert target.grad is None


@pytest.mark.parametrize("impl", ["reference", "padded"])
def test_no_corrupted_place_is_a_loss_of_zero(impl):
    check_zero(task([3, 2], [0, 0]), impl)
    check_zero(task([0, 0], [0, 0]) | {"tokens": torch.zeros(2, 0, 6)}, impl)
    check_zero(empty_batch(), impl)


def test_triton_of_no_corrupted_place(triton_device):
    check_zero(task([3, 2], [0, 0], device=triton_device), "triton", torch.float32)
    check_zero(empty_batch(triton_device), "triton", torch.float32)


def check_zero(inputs, impl, dtype=torch.float64):
    assert all((x == 0).all() for x in loss_and_gradients(inputs, dtype, impl=impl))


def empty_batch(device="cpu"):
    inputs = task([3], [0], device=device)
    return inputs | {name: inputs[name][:0] for name in ("tokens", "lengths")}


@pytest.mark.parametrize("impl", ["reference", "padded", "auto"])
def test_compiles_whole(impl):
    inputs = task([3, 0, 2], [2, 1, 4])
    expected = loss_and_gradients(inputs, torch.float64, impl=impl)
    inputs, leaves = leaves_of(inputs, torch.float64)
    loss = torch.compile(denoising_attention, backend="aot_eager", fullgraph=True)
    loss = loss(**inputs, impl=impl)
    found = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "padded"])
def test_compiled_it_takes_items_in_any_order(impl):
    inputs = task([3, 1, 2], [2, 1, 2])
    expected = denoising_attention(**inputs, impl="reference")
    order = torch.tensor([0, 1, 3, 2, 4])  # items 0, 0, 2, 1, 2
    indices = ("source_index", "place", "item", "target_index")
    inputs |= {name: inputs[name][order] for name in indices}
    run = torch.compile(denoising_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(**inputs, impl=impl), expected)


def test_padded_operator_registration():
    inputs, leaves = leaves_of(task([3, 0, 5], [2, 1, 3]), torch.float64)
    query = F.linear(inputs["source"][inputs["source_index"]], leaves[3]).detach().requires_grad_()
    key_value = F.linear(inputs["tokens"], leaves[4]).detach().requires_grad_()
    arguments = (query, inputs["item"], key_value, inputs["lengths"], 2)
    torch.library.opcheck(torch.ops.cmdlab_kernels.padded_attention_fwd, arguments)
    with torch.no_grad():
        backward = torch.ops.cmdlab_kernels.padded_attention_bwd
        torch.library.opcheck(backward, (query.detach().clone(), *arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_padded_operator_is_as_good_as_torch_in_half_precision(dtype):
    """Its gradients, with a gradient as large as a loss scale makes them."""
    generator = torch.Generator().manual_seed(0)
    item, lengths = torch.arange(3).repeat_interleave(8), torch.tensor([50, 20, 1])
    q, grad = torch.randn(2, 24, 64, generator=generator)
    key_value = 2 * torch.randn(3, 50, 128, generator=generator)
    given = [x.to(dtype) for x in (q, key_value, 2000 * grad)]

    def gradients(function, dtype):
        q, key_value, grad = (x.to(dtype) for x in given)
        leaves = [q.requires_grad_(), key_value.requires_grad_()]
        return torch.autograd.grad(function(q, item, key_value, lengths, 1), leaves, grad)

    expected = gradients(reference_attention, torch.float64)
    eager = gradients(padded_attention, dtype)
    found = gradients(torch.ops.cmdlab_kernels.padded_attention_fwd, dtype)
    for f, e, x in zip(found, eager, expected, strict=True):
        error, its = ((one.double() - x).square().mean().sqrt() for one in (f, e))
        assert error <= 1.5 * its + 1e-3 * x.square().mean().sqrt()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"impl": "fast"}, "impl must be"),
        ({"loss": "l1"}, "loss must be"),
        ({"heads": 3}, "heads must divide"),
        ({"item": torch.tensor([0, 1, 0])}, "never decrease"),
        ({"item": torch.tensor([0, 1, 2])}, r"0 \.\. 1"),
        ({"source_index": torch.tensor([0, 1, -1])}, r"0 \.\. 17"),
        ({"place": torch.tensor([0, 1])}, r"place must be int64 \[3\]"),
        ({"target_index": torch.zeros(3)}, "target_index must be int64"),
        ({"lengths": torch.tensor([1, 5])}, r"lengths must lie in 0 \.\. 4"),
        ({"lengths": torch.tensor([1])}, r"lengths must be int64 \[2\]"),
        ({"position": torch.zeros(9, 7)}, "position"),
        ({"tokens": torch.zeros(2, 4)}, "tokens"),
        ({"target": torch.zeros(2, 7)}, "target"),
        ({"projections": Projections(*torch.zeros(3, 8, 8).double())}, "projections must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        denoising_attention(**(task([4, 2], [1, 2]) | change))


def test_mixed_dtypes_are_refused():
    check_mixed_dtypes_refused("auto", torch.device("cpu"))


def test_triton_refuses_mixed_dtypes(triton_device):
    check_mixed_dtypes_refused("triton", triton_device)


def check_mixed_dtypes_refused(impl, device):
    inputs = task([4, 2], [1, 2], dtype=torch.float32, device=device)
    query, key_value, output = inputs["projections"]
    half = Projections(query, key_value.bfloat16(), output)
    changes = [{name: inputs[name].bfloat16()} for name in ("source", "position", "target")]
    for change in (*changes, {"projections": half, "tokens": inputs["tokens"].bfloat16()}):
        with pytest.raises(ValueError, match="must share a float dtype"):
            denoising_attention(**(inputs | change), impl=impl)


def test_kernels_need_cuda(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="supports CUDA"):
        denoising_attention(**task([4, 2], [1, 2], dtype=torch.float32), impl="triton")


def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


SHAPES = {
    "one": {"lengths": [1], "places": [1], "heads": 1, "head_width": 5, "d": 3, "e": 5},
    "ragged": {"lengths": [0, 1, 65, 33], "places": [3, 9, 0, 7], "head_width": 7},
    "tile edges": {"lengths": [64, 63], "places": [64, 1], "head_width": 16, "steps": 65},
    "wide rows": {"lengths": [2, 3], "places": [5, 4], "d": 300},
    "257 keys": {"lengths": [31, 257], "places": [2, 5], "d": 33, "head_width": 11},
    "257 queries": {"lengths": [3, 7], "places": [257, 1], "heads": 1, "steps": 257},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_is_as_exact_as_torch(triton_device, nan_memory, shape, dtype):
    if dtype == torch.bfloat16 and triton_device.type == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    loss = "cosine" if shape in ("ragged", "257 queries") else "normalised_mse"
    inputs = task(**SHAPES[shape], dtype=dtype, device=triton_device)
    truth = loss_and_gradients(inputs, torch.float64, impl="padded", loss=loss)
    torch_errors = errors(loss_and_gradients(inputs, dtype, impl="padded", loss=loss), truth)
    found = loss_and_gradients(poisoned(inputs), dtype, impl="triton", loss=loss)
    for ours, theirs in zip(errors(found, truth), torch_errors, strict=True):
        assert ours <= theirs + TOLERANCE[dtype]


def test_triton_makes_nan_of_what_is_out_of_range(triton_device):
    from cmdlab_kernels.denoising_attention_triton import corrupted_queries, restoration_losses
    from cmdlab_kernels.ragged_attention_triton import ragged_attention_fwd

    rows = torch.ones(4, 8, device=triton_device)
    index = torch.tensor([0, 4, -1, 3], device=triton_device)
    bad = [False, True, True, False]
    zeros = torch.zeros_like(index)
    query = corrupted_queries(rows, index, rows, zeros)
    losses = restoration_losses(rows, rows, index, False)
    key_value = torch.ones(4, 2, 16, device=triton_device)
    lengths = torch.full_like(index, 2)
    out, _ = ragged_attention_fwd(rows, index, key_value, lengths, 2)
    assert query.isnan().any(1).tolist() == bad
    assert losses.isnan().tolist() == bad
    assert out.isnan().any(1).tolist() == bad
    out, _ = ragged_attention_fwd(rows, zeros, key_value, lengths + 1, 2)
    assert out.isnan().all()


def test_triton_operator_registration(triton_device):
    from cmdlab_kernels import denoising_attention_triton as ends
    from cmdlab_kernels import ragged_attention_triton as attention

    inputs, leaves = leaves_of(
        task([3, 0, 5], [2, 1, 3], dtype=torch.float32, device=triton_device), torch.float32
    )
    source, position, tokens, query_weight, key_value_weight, _ = leaves
    index, place, item = inputs["source_index"], inputs["place"], inputs["item"]
    torch.library.opcheck(ends.corrupted_queries, (source, index, position, place))
    torch.library.opcheck(ends.sum_by_index, (source.detach()[index], index, len(source)))
    restored = position.detach()[place].requires_grad_()
    arguments = (restored, inputs["target"], inputs["target_index"], True)
    torch.library.opcheck(ends.restoration_losses, arguments)
    grad = torch.ones(len(item), device=triton_device)
    arguments = (grad, restored.detach(), *arguments[1:])
    torch.library.opcheck(ends.restoration_losses_bwd, arguments)
    q = F.linear(restored, query_weight).detach().requires_grad_()
    key_value = F.linear(tokens, key_value_weight).detach().requires_grad_()
    arguments = (q, item, key_value, inputs["lengths"], 2)
    torch.library.opcheck(attention.ragged_attention_fwd, arguments)
    with torch.no_grad():
        out, lse = attention.ragged_attention_fwd(*arguments)
        arguments = (out, q, item, key_value, inputs["lengths"], out, lse, 2)
        torch.library.opcheck(attention.ragged_attention_bwd, arguments)


def test_triton_compiles_whole(triton_device):
    inputs = task([3, 0, 5], [2, 1, 3], dtype=torch.float32, device=triton_device)
    backend = "inductor" if triton_device.type == "cuda" else "aot_eager"
    run = torch.compile(denoising_attention, backend=backend, fullgraph=True)
    expected = denoising_attention(**inputs, impl="triton")
    torch.testing.assert_close(run(**inputs, impl="triton"), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's order of work may vary")
def test_triton_repeats_bit_for_bit(triton_device):
    inputs = task([200, 0, 31], [90, 5, 77], d=64, head_width=32, steps=100, device=triton_device)
    first = loss_and_gradients(inputs, torch.bfloat16, impl="triton")
    for _ in range(1000):
        again = loss_and_gradients(inputs, torch.bfloat16, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
