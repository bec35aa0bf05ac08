"""Cross-attention from corrupted places to the other modality, and the restoration loss on them.

Only corrupted places are computed. They come flat, P of them over the whole batch.
"""

import os
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Implementation = Literal["auto", "reference", "padded", "triton"]
Loss = Literal["normalised_mse", "cosine"]
EPSILON = 1e-6
# The widest head that the Triton kernels hold without spilling.
TRITON_WIDEST_HEAD = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


class Projections(NamedTuple):
    """The bias-free weights of one multi-head cross-attention, laid out as in `nn.Linear`.

    W is the width of all heads together.
    """

    query: Tensor  # [W, D]
    key_value: Tensor  # [2W, E], keys first
    output: Tensor  # [D, W]


def denoising_attention(
    source: Tensor,
    source_index: Tensor,
    position: Tensor,
    place: Tensor,
    item: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    projections: Projections,
    heads: int,
    target: Tensor,
    target_index: Tensor,
    *,
    loss: Loss = "normalised_mse",
    impl: Implementation = "auto",
) -> Tensor:
    """Restore P corrupted places from the other modality; return the mean loss, a 0-d tensor.

    The query at corrupted place p is `source[source_index[p]] + position[place[p]]`. Every
    corruption is a table and an index: for a swap or a shuffle the table is the batch's tokens
    [B · T, D] and the index names the donor; for noise the table is [P, D] and the index counts
    up; for a mask token the table has one row. The query passes through `cross_attention`, and
    what comes out is compared with `target[target_index[p]]`, which takes no gradient (see
    `restoration_loss`).

    Args:
        source: [S, D] float; its dtype is that of `position`, `tokens`, `projections`, `target`.
        source_index: [P] int64.
        position: [T, D] positional embedding.
        place: [P] int64, the corrupted place within its item.
        item: [P] int64, the item of each corrupted place, never decreasing.
        tokens: [B, K, E] clean tokens of the other modality, padded.
        lengths: [B] int64 valid tokens of each item, 0 ≤ length ≤ K.
        projections: weights of the attention.
        heads: number of heads; divides W.
        target: [R, D]; the clean tokens [B · T, D], or one pooled feature an item [B, D].
        target_index: [P] int64.
        loss: "normalised_mse" or "cosine".
        impl: as in `cross_attention`.

    With P = 0 the loss is 0. What holds for indices is told in `cross_attention`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an `impl` that cannot run.
    """
    check_dtype(
        "source, position, tokens, target and projections",
        *(source, position, tokens, target, *projections),
    )
    if source.ndim != 2 or position.ndim != 2 or source.shape[1] != position.shape[1]:
        raise ValueError(
            f"source [S, D] and position [T, D] expected, got {list(source.shape)} and "
            f"{list(position.shape)}"
        )
    check_index("source_index", source_index, item.shape[0], source)
    check_index("place", place, item.shape[0], position)
    if use_triton(impl, source):
        from cmdlab_kernels.denoising_attention_triton import corrupted_queries

        query = corrupted_queries(source, source_index, position, place)
    else:
        query = source.index_select(0, source_index) + position.index_select(0, place)
    restored = cross_attention(query, item, tokens, lengths, projections, heads, impl=impl)
    return restoration_loss(restored, target, target_index, loss=loss, impl=impl)


def cross_attention(
    query: Tensor,
    item: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    projections: Projections,
    heads: int,
    *,
    impl: Implementation = "auto",
) -> Tensor:
    """Return query + output(softmax(q kᵀ / √d) v) [P, D], each query over its item's tokens.

    Args:
        query: [P, D] float, flat over the batch; its dtype is that of `tokens` and `projections`.
        item: [P] int64, the item of each query, never decreasing.
        tokens: [B, K, E], padded; what the padding holds never matters.
        lengths: [B] int64 valid tokens of each item. With none, the query comes back unchanged.
        projections: weights of the attention.
        heads: number of heads; divides W.
        impl: "reference" (any device, gathers the keys once for each query), "padded" (any
            device, queries padded within their item, torch's fused attention), "triton" (CUDA;
            float16 or bfloat16 with heads up to 128 wide, float32 up to 64), or "auto": "triton"
            where it runs, else "padded".

    Products are of the inputs' dtype, in autocast too. (A backward pass that itself runs in
    autocast, against torch's advice, has torch's own products in autocast's.) On the CPU outside
    torch.compile an index out of range or order raises. Elsewhere, where looking
    would wait for the device or break the graph, "triton" makes NaN for its place; the others give
    the right answer for any order of `item`, and leave an index out of range to torch.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an `impl` that cannot run.
    """
    check_dtype("query, tokens and projections", query, tokens, *projections)
    check_attention(query, item, tokens, lengths, projections, heads)
    with torch.autocast(query.device.type, enabled=False):
        q = F.linear(query, projections.query)  # [P, W]
        key_value = project_valid(tokens, lengths, projections.key_value)  # [B, K, 2W]
        if use_triton(impl, q, q.shape[1] // heads):
            from cmdlab_kernels.ragged_attention_triton import ragged_attention_fwd

            attended = ragged_attention_fwd(q, item, key_value, lengths, heads)[0]
        elif impl == "reference":
            attended = reference_attention(q, item, key_value, lengths, heads)
        elif torch.compiler.is_compiling():
            attended = padded_attention_fwd(q, item, key_value, lengths, heads)
        else:
            attended = padded_attention(q, item, key_value, lengths, heads)
        return torch.addmm(query, attended, projections.output.T)


def restoration_loss(
    restored: Tensor,
    target: Tensor,
    target_index: Tensor,
    *,
    loss: Loss = "normalised_mse",
    impl: Implementation = "auto",
) -> Tensor:
    """Return the mean over places of the distance between r = restored and its target t.

    "normalised_mse" is ‖r − t‖² / max(‖t‖², ε), the squared error relative to the target's
    energy; "cosine" is 1 − r·t / (max(‖r‖, ε) max(‖t‖, ε)). ε is 1e-6.

    Args:
        restored: [P, D] float.
        target: [R, D] float; takes no gradient.
        target_index: [P] int64, the target's row for each place.
        loss: which of the two.
        impl: as in `cross_attention`.

    With P = 0 the loss is 0. The loss is float64 for float64 tokens, else float32.
    """
    if loss not in ("normalised_mse", "cosine"):
        raise ValueError(f"loss must be 'normalised_mse' or 'cosine', not {loss!r}")
    if restored.ndim != 2 or target.ndim != 2 or restored.shape[1] != target.shape[1]:
        raise ValueError(
            f"restored [P, D] and target [R, D] expected, got {list(restored.shape)} and "
            f"{list(target.shape)}"
        )
    check_index("target_index", target_index, restored.shape[0], target)
    if use_triton(impl, restored):
        from cmdlab_kernels.denoising_attention_triton import restoration_losses

        losses = restoration_losses(restored, target.detach(), target_index, loss == "cosine")
    else:
        wide = torch.promote_types(restored.dtype, torch.float32)
        r, t = restored.to(wide), target.detach().index_select(0, target_index).to(wide)
        if loss == "cosine":
            losses = 1 - F.cosine_similarity(r, t, dim=-1, eps=EPSILON)
        else:
            losses = (r - t).square().sum(-1) / t.square().sum(-1).clamp(min=EPSILON)
    return losses.sum() / max(losses.shape[0], 1)


def project_valid(tokens: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    """Return tokens [B, K, E] times weight [2W, E], zero where there is padding."""
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # [B, K]
    if not readable(tokens):
        return F.linear(tokens.where(valid[..., None], 0), weight)
    place = valid.flatten().nonzero()[:, 0]  # padding, often half of a batch, is not multiplied
    projected = F.linear(tokens.flatten(0, 1).index_select(0, place), weight)
    key_value = projected.new_zeros(valid.numel(), len(weight))
    return key_value.index_copy(0, place, projected).unflatten(0, valid.shape)


def reference_attention(
    q: Tensor, item: Tensor, key_value: Tensor, lengths: Tensor, heads: int
) -> Tensor:
    """Attend with every query [P, W] over the keys and values of its item [B, K, 2W]."""
    k, v = key_value[item].unflatten(-1, (2, heads, -1)).unbind(2)  # [P, K, H, d]
    q = q.unflatten(-1, (heads, -1))  # [P, H, d]
    scores = torch.einsum("phd,pkhd->phk", q, k) / q.shape[-1] ** 0.5
    outside = torch.arange(k.shape[1], device=q.device) >= lengths[item, None]  # [P, K]
    weights = scores.masked_fill(outside[:, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill(outside[:, None], 0)  # an item without keys has NaN weights
    return torch.einsum("phk,pkhd->phd", weights, v).flatten(1)


def padded_attention(
    q: Tensor, item: Tensor, key_value: Tensor, lengths: Tensor, heads: int
) -> Tensor:
    """Do as `reference_attention`, with the queries of each item padded to the longest run."""
    (b, k, _), (row, longest) = key_value.shape, padded_rows(item, key_value.shape[0])
    padded = padded_heads(q, row, (b, longest, heads))
    keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in key_value.chunk(2, -1))
    valid = torch.arange(k, device=q.device) < lengths[:, None]  # [B, K]
    out = F.scaled_dot_product_attention(padded, keys, values, attn_mask=valid[:, None, None])
    return out.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, row)


def padded_rows(item: Tensor, b: int) -> tuple[Tensor, int]:
    """Return each query's row when all items have as many as the longest, and that number."""
    queries = torch.bincount(item, minlength=b)
    longest = int(queries.max()) if b > 0 else 0
    spare = longest * torch.arange(b, device=item.device) - (queries.cumsum(0) - queries)
    order = item.argsort(stable=True)  # `item` may be in any order
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(item), device=item.device))
    return rank + spare[item], longest


def padded_heads(x: Tensor, row: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Return x [P, W] as [B, H, longest, d], zero between the items, for (B, longest, H)."""
    b, longest, heads = sizes
    padded = x.new_zeros(b * longest, x.shape[1]).index_copy(0, row, x)
    return padded.view(b, longest, heads, x.shape[1] // heads).transpose(1, 2)


@torch.library.custom_op("cmdlab_kernels::padded_attention_fwd", mutates_args=())
def padded_attention_fwd(
    q: Tensor, item: Tensor, key_value: Tensor, lengths: Tensor, heads: int
) -> Tensor:
    """`padded_attention` as one operator: the size of its padding would break a graph."""
    return padded_attention(q, item, key_value, lengths, heads)


@torch.library.custom_op("cmdlab_kernels::padded_attention_bwd", mutates_args=())
def padded_attention_bwd(
    grad: Tensor, q: Tensor, item: Tensor, key_value: Tensor, lengths: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q [P, W] and key_value [B, K, 2W]; computes the weights again."""
    (b, k, _), (row, longest) = key_value.shape, padded_rows(item, key_value.shape[0])
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)  # half overflows on the way
    key_value = key_value.to(wide)
    q, grad = (padded_heads(x.to(wide), row, (b, longest, heads)) for x in (q, grad))
    keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in key_value.chunk(2, -1))
    outside = (torch.arange(k, device=q.device) >= lengths[:, None])[:, None, None]
    scale = q.shape[-1] ** -0.5
    with torch.autocast(q.device.type, enabled=False):
        weights = (scale * q @ keys.mT).masked_fill(outside, -torch.inf).softmax(-1)
        weights = weights.masked_fill(outside, 0)  # [B, H, longest, K]
        grad_weights = grad @ values.mT
        along = (weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = weights * (grad_weights - along) * scale
        grad_q = (grad_scores @ keys).transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, row)
        grad_key_value = torch.cat([grad_scores.mT @ q, weights.mT @ grad], 1)  # [B, 2H, K, d]
    return grad_q.to(dtype), grad_key_value.transpose(1, 2).flatten(2).contiguous().to(dtype)


@padded_attention_fwd.register_fake
def _(q, item, key_value, lengths, heads):
    return q.new_empty(q.shape)


@padded_attention_bwd.register_fake
def _(grad, q, item, key_value, lengths, heads):
    return q.new_empty(q.shape), key_value.new_empty(key_value.shape)


def save_padded(ctx, inputs, output):
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def backward_padded(ctx, grad):
    grad_q, grad_key_value = padded_attention_bwd(grad, *ctx.saved_tensors, ctx.heads)
    return grad_q, None, grad_key_value, None, None


padded_attention_fwd.register_autograd(backward_padded, setup_context=save_padded)


def use_triton(impl: str, tensor: Tensor, head_width: int = 0) -> bool:
    """Return whether `impl` means the Triton kernels here; raise if they cannot do as asked."""
    if impl not in ("auto", "reference", "padded", "triton"):
        raise ValueError(f"impl must be 'auto', 'reference', 'padded' or 'triton', not {impl!r}")
    device = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    runs = device and head_width <= TRITON_WIDEST_HEAD.get(tensor.dtype, -1)
    if impl == "triton" and not runs:
        raise ValueError(
            'impl="triton" supports CUDA, and float16 or bfloat16 with heads up to 128 wide or '
            f"float32 up to 64; got {tensor.dtype} {list(tensor.shape)} on {tensor.device.type}"
        )
    return impl == "triton" or (impl == "auto" and tensor.is_cuda and runs)


def check_dtype(names: str, *tensors: Tensor) -> None:
    dtypes = [tensor.dtype for tensor in tensors]
    if any(dtype != dtypes[0] or not dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"{names} must share a float dtype, got {dtypes}")


def check_index(name: str, index: Tensor, count: int, table: Tensor) -> None:
    if index.dtype != torch.int64 or index.shape != (count,):
        raise ValueError(f"{name} must be int64 [{count}], not {index.dtype} {list(index.shape)}")
    if index.device != table.device:
        raise ValueError(f"{name} is on {index.device}, its table on {table.device}")
    if readable(index) and count > 0 and not 0 <= int(index.min()) <= int(index.max()) < len(table):
        raise ValueError(f"{name} must lie in 0 .. {len(table) - 1}")


def check_attention(
    query: Tensor,
    item: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    projections: Projections,
    heads: int,
) -> None:
    if query.ndim != 2 or tokens.ndim != 3:
        raise ValueError(
            f"query [P, D] and tokens [B, K, E] expected, got {list(query.shape)} and "
            f"{list(tokens.shape)}"
        )
    (_, d), (b, k, e), w = query.shape, tokens.shape, projections.query.shape[0]
    shapes = [list(weight.shape) for weight in projections]
    if shapes != [[w, d], [2 * w, e], [d, w]]:
        raise ValueError(f"projections must be [W, {d}], [2W, {e}] and [{d}, W], got {shapes}")
    if heads < 1 or w % heads != 0:
        raise ValueError(f"heads must divide W = {w}, got {heads}")
    check_index("item", item, query.shape[0], tokens)
    if lengths.dtype != torch.int64 or lengths.shape != (b,):
        raise ValueError(f"lengths must be int64 [{b}], not {lengths.dtype} {list(lengths.shape)}")
    if readable(lengths):
        if bool((item[1:] < item[:-1]).any()):
            raise ValueError("item must never decrease: take places from mask.nonzero()")
        if bool(((lengths < 0) | (lengths > k)).any()):
            raise ValueError(f"lengths must lie in 0 .. {k}")


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device or breaking a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
