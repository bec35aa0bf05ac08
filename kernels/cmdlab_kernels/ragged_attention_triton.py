"""Triton kernels of multi-head attention from flat queries to the padded keys of their items.

A tile of queries is any run of neighbours in the flat list and may span several items: it goes
through the keys of each of its items in turn. So queries need no padding and no table of tiles.
An `item` out of range or order, or a length out of range, makes NaN for its queries and reads
nothing outside. No atomics: results repeat bit for bit.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


def configuration(kernel, dtype: torch.dtype, head_width: int) -> dict:
    """Return a kernel's tile sizes and launch options; one for each case, no autotuning."""
    width = triton.next_power_of_2(head_width)
    if dtype == torch.float32:  # multiplied outside the tensor cores, from registers
        sizes = {"BLOCK_Q": 16, "BLOCK_K": 16, "BLOCK_D": max(32, width)}
        return sizes | {"num_stages": 1, "num_warps": 8}
    queries = 32 if kernel is key_value_bwd_kernel else 64
    keys = 32 if kernel is query_bwd_kernel else 64
    sizes = {"BLOCK_Q": queries, "BLOCK_K": keys, "BLOCK_D": max(16, width)}
    return sizes | {"num_stages": 2, "num_warps": 4}


@triton.jit
def head_tile(pointer, start, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return pointers to BLOCK rows of one head, with 32-bit offsets inside the tile."""
    offset = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return pointer + tl.cast(start, tl.int64) * stride + offset


@triton.jit
def load_head(
    pointer, start, live, stride, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return rows from `start` on, [BLOCK, BLOCK_D], zero where not live."""
    mask = live[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(head_tile(pointer, start, stride, BLOCK, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def store_head(
    pointer, value, start, live, stride, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    mask = live[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    value = value.to(pointer.dtype.element_ty)
    tl.store(head_tile(pointer, start, stride, BLOCK, BLOCK_D), value, mask=mask)


@triton.jit
def load_items(item_ptr, lengths_ptr, rows, P, B, K):
    """Return each query's item (−1 past the end) and whether item and length make sense."""
    live = rows < P
    item = tl.load(item_ptr + rows, mask=live, other=-1)
    before = tl.load(item_ptr + rows - 1, mask=live & (rows > 0), other=0)
    inside = (item >= before) & (item >= 0) & (item < B)
    length = tl.load(lengths_ptr + item, mask=live & inside, other=-1)
    sound = inside & (length >= 0) & (length <= K)
    return tl.where(sound, item, -1).to(tl.int32), sound


@triton.jit(
    do_not_specialize=["P", "B", "K", "H"],
    do_not_specialize_on_alignment=["item_ptr", "lengths_ptr"],
)
def attention_fwd_kernel(
    q_ptr,  # [P, W]
    key_value_ptr,  # [B, K, 2W]
    item_ptr, lengths_ptr,
    out_ptr,  # [P, W]
    lse_ptr,  # [H, P], in bits
    P, B, K, H, D, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    W = H * D
    first = tl.program_id(0) * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    live = rows < P
    item, sound = load_items(item_ptr, lengths_ptr, rows, P, B, K)
    q = load_head(q_ptr + head * D, first, live, W, D, BLOCK_Q, BLOCK_D)
    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for b in range(tl.min(tl.where(sound, item, B)), tl.max(item) + 1):
        mine = item == b
        length = tl.load(lengths_ptr + b) * tl.max(mine.to(tl.int32))
        k_ptr = key_value_ptr + tl.cast(b, tl.int64) * K * 2 * W + head * D
        for start in range(0, tl.cast(length, tl.int32), BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            inside = keys < length
            k = load_head(k_ptr, start, inside, 2 * W, D, BLOCK_K, BLOCK_D)
            v = load_head(k_ptr + W, start, inside, 2 * W, D, BLOCK_K, BLOCK_D)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
            logits = tl.where(mine[:, None] & inside[None, :], logits, float("-inf"))
            larger = tl.maximum(maximum, tl.max(logits, 1))
            finite = tl.where(larger == float("-inf"), 0.0, larger)
            weight = tl.exp2(logits - finite[:, None])
            shrink = tl.exp2(maximum - finite)
            total = total * shrink + tl.sum(weight, 1)
            out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            maximum = larger
    out = tl.where(sound[:, None], out / tl.where(total > 0, total, 1.0)[:, None], float("nan"))
    store_head(out_ptr + head * D, out, first, live, W, D, BLOCK_Q, BLOCK_D)
    lse = tl.where(total > 0, maximum + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)
    tl.store(lse_ptr + head.to(tl.int64) * P + rows, lse, mask=live)


@triton.jit(
    do_not_specialize=["P", "B", "K", "H"],
    do_not_specialize_on_alignment=["item_ptr", "lengths_ptr"],
)
def query_bwd_kernel(
    grad_ptr, q_ptr, key_value_ptr, item_ptr, lengths_ptr, out_ptr, lse_ptr,
    delta_ptr,  # [H, P], written here for `key_value_bwd_kernel`
    grad_q_ptr,  # [P, W]
    P, B, K, H, D, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    W = H * D
    first = tl.program_id(0) * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    live = rows < P
    item, sound = load_items(item_ptr, lengths_ptr, rows, P, B, K)
    q = load_head(q_ptr + head * D, first, live, W, D, BLOCK_Q, BLOCK_D)
    grad = load_head(grad_ptr + head * D, first, live, W, D, BLOCK_Q, BLOCK_D)
    out = load_head(out_ptr + head * D, first, live, W, D, BLOCK_Q, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * P + rows, delta, mask=live)
    lse = tl.load(lse_ptr + head.to(tl.int64) * P + rows, mask=live, other=0.0)
    grad_q = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for b in range(tl.min(tl.where(sound, item, B)), tl.max(item) + 1):
        mine = item == b
        length = tl.load(lengths_ptr + b) * tl.max(mine.to(tl.int32))
        k_ptr = key_value_ptr + tl.cast(b, tl.int64) * K * 2 * W + head * D
        for start in range(0, tl.cast(length, tl.int32), BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            inside = keys < length
            k = load_head(k_ptr, start, inside, 2 * W, D, BLOCK_K, BLOCK_D)
            v = load_head(k_ptr + W, start, inside, 2 * W, D, BLOCK_K, BLOCK_D)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
            logits = tl.where(mine[:, None] & inside[None, :], logits, float("-inf"))
            weight = tl.exp2(logits - lse[:, None])
            grad_weight = tl.dot(grad, tl.trans(v), input_precision="ieee")
            grad_logits = (weight * (grad_weight - delta[:, None])).to(k.dtype)
            grad_q = tl.dot(grad_logits, k, grad_q, input_precision="ieee")
    grad_q = tl.where(sound[:, None], grad_q * scale, float("nan"))
    store_head(grad_q_ptr + head * D, grad_q, first, live, W, D, BLOCK_Q, BLOCK_D)


@triton.jit(do_not_specialize=["P", "K", "H"], do_not_specialize_on_alignment=["lengths_ptr"])
def key_value_bwd_kernel(
    grad_ptr, q_ptr, key_value_ptr, lengths_ptr, lse_ptr, delta_ptr,
    first_query_ptr,  # [B + 1], where each item's queries start
    grad_key_value_ptr,  # [B, K, 2W]
    P, K, H, D, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, BLOCK_K)
    b, head = tl.program_id(0) // blocks, tl.program_id(1)
    W = H * D
    first = tl.program_id(0) % blocks * BLOCK_K
    keys = first + tl.arange(0, BLOCK_K)
    inside = keys < tl.load(lengths_ptr + b)
    base = tl.cast(b, tl.int64) * K * 2 * W + head * D
    k = load_head(key_value_ptr + base, first, inside, 2 * W, D, BLOCK_K, BLOCK_D)
    v = load_head(key_value_ptr + base + W, first, inside, 2 * W, D, BLOCK_K, BLOCK_D)
    grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    end = tl.load(first_query_ptr + b + 1)
    end = tl.where(tl.max(inside.to(tl.int32)) > 0, end, 0)  # a block of padding takes no query
    for start in range(tl.load(first_query_ptr + b), end, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        live = rows < end
        q = load_head(q_ptr + head * D, start, live, W, D, BLOCK_Q, BLOCK_D)
        grad = load_head(grad_ptr + head * D, start, live, W, D, BLOCK_Q, BLOCK_D)
        lse = tl.load(lse_ptr + head.to(tl.int64) * P + rows, mask=live, other=0.0)
        delta = tl.load(delta_ptr + head.to(tl.int64) * P + rows, mask=live, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2_E)
        logits = tl.where(inside[:, None] & live[None, :], logits, float("-inf"))
        weight = tl.exp2(logits - lse[None, :])  # [BLOCK_K, BLOCK_Q]
        grad_v = tl.dot(weight.to(grad.dtype), grad, grad_v, input_precision="ieee")
        grad_weight = tl.dot(v, tl.trans(grad), input_precision="ieee")
        grad_logits = (weight * (grad_weight - delta[None, :])).to(q.dtype)
        grad_k = tl.dot(grad_logits, q, grad_k, input_precision="ieee")
    store = grad_key_value_ptr + base
    store_head(store, grad_k * scale, first, keys < K, 2 * W, D, BLOCK_K, BLOCK_D)
    store_head(store + W, grad_v, first, keys < K, 2 * W, D, BLOCK_K, BLOCK_D)


@torch.library.custom_op("cmdlab_kernels::ragged_attention_fwd", mutates_args=())
def ragged_attention_fwd(
    q: Tensor, item: Tensor, key_value: Tensor, lengths: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Return what each query attends to [P, W], and its log-sum-exp in bits, [H, P] float32."""
    head_width = q.shape[1] // heads
    q, key_value = padded_heads(q, head_width), padded_heads(key_value, head_width)
    (p, w), (b, k, _) = q.shape, key_value.shape
    out, lse = torch.empty_like(q), q.new_empty(heads, p, dtype=torch.float32)
    options = configuration(attention_fwd_kernel, q.dtype, w // heads)
    if p > 0:
        with torch.cuda.device_of(q):
            attention_fwd_kernel[(triton.cdiv(p, options["BLOCK_Q"]), heads)](
                q, key_value, item.contiguous(), lengths.contiguous(), out, lse,
                p, b, k, heads, w // heads, head_width**-0.5, **options,
            )  # fmt: skip
    return narrow_heads(out, heads, head_width), lse


@torch.library.custom_op("cmdlab_kernels::ragged_attention_bwd", mutates_args=())
def ragged_attention_bwd(
    grad: Tensor,
    q: Tensor,
    item: Tensor,
    key_value: Tensor,
    lengths: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q [P, W] and key_value [B, K, 2W], zero where keys are padding."""
    head_width = q.shape[1] // heads
    grad, q, key_value, out = (padded_heads(x, head_width) for x in (grad, q, key_value, out))
    item, lengths = item.contiguous(), lengths.contiguous()
    (p, w), (b, k, _) = q.shape, key_value.shape
    grad_q, grad_key_value, delta = map(torch.empty_like, (q, key_value, lse))
    first_query = torch.searchsorted(item, torch.arange(b + 1, device=q.device), out_int32=True)
    sizes = (k, heads, w // heads, head_width**-0.5)
    with torch.cuda.device_of(q):
        if p > 0:
            options = configuration(query_bwd_kernel, q.dtype, w // heads)
            query_bwd_kernel[(triton.cdiv(p, options["BLOCK_Q"]), heads)](
                grad, q, key_value, item, lengths, out, lse, delta, grad_q, p, b, *sizes, **options
            )
        if b * k > 0:
            options = configuration(key_value_bwd_kernel, q.dtype, w // heads)
            key_value_bwd_kernel[(b * triton.cdiv(k, options["BLOCK_K"]), heads)](
                grad, q, key_value, lengths, lse, delta, first_query, grad_key_value,
                p, *sizes, **options,
            )  # fmt: skip
    return (
        narrow_heads(grad_q, heads, head_width),
        narrow_heads(grad_key_value, 2 * heads, head_width),
    )


def padded_heads(x: Tensor, head_width: int) -> Tensor:
    """Return x contiguous, each head [.., d] filled with zeros to a multiple of 16.

    Other widths need more registers for their addresses than there are.
    """
    if head_width % 16 == 0:
        return x.contiguous()
    return F.pad(x.unflatten(-1, (-1, head_width)), (0, -head_width % 16)).flatten(-2)


def narrow_heads(x: Tensor, heads: int, head_width: int) -> Tensor:
    """Undo `padded_heads`."""
    x = x.unflatten(-1, (heads, -1))
    return x[..., :head_width].flatten(-2).contiguous()


@ragged_attention_fwd.register_fake
def _(q, item, key_value, lengths, heads):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(heads, q.shape[0], dtype=torch.float32)


@ragged_attention_bwd.register_fake
def _(grad, q, item, key_value, lengths, out, lse, heads):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(q, memory_format=contiguous),
        torch.empty_like(key_value, memory_format=contiguous),
    )


def save_attention(ctx, inputs, output):
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output)


def backward_attention(ctx, grad, _lse):
    grad_q, grad_key_value = ragged_attention_bwd(grad, *ctx.saved_tensors, ctx.heads)
    return grad_q, None, grad_key_value, None, None


ragged_attention_fwd.register_autograd(backward_attention, setup_context=save_attention)
