"""Triton kernels on either side of the attention: corrupted queries before, the loss after.

An index out of range makes NaN for its place and reads nothing outside. No atomics: results repeat
bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON = tl.constexpr(1e-6)
ROW_TILE = {"ROWS": 8, "BLOCK_D": 128, "num_warps": 4}
SUM_TILE = {"ROWS": 32, "BLOCK_D": 64, "num_warps": 4}


@triton.jit
def load_rows(pointer, index, inside, columns, D):
    """Return columns of rows by index, float32; NaN in a row whose index is out of range."""
    offset = index.to(tl.int64)[:, None] * D + columns[None, :]
    rows = tl.load(pointer + offset, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
    return tl.where(inside[:, None], rows.to(tl.float32), float("nan"))


@triton.jit(
    do_not_specialize=["P", "S", "T"],
    do_not_specialize_on_alignment=["source_index_ptr", "place_ptr"],
)
def queries_fwd_kernel(
    source_ptr, source_index_ptr, position_ptr, place_ptr,
    out_ptr,  # [P, D]
    P, S, T, D,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < P
    index = tl.load(source_index_ptr + rows, mask=live, other=0)
    place = tl.load(place_ptr + rows, mask=live, other=0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    query = load_rows(source_ptr, index, live & (index >= 0) & (index < S), columns, D)
    query += load_rows(position_ptr, place, live & (place >= 0) & (place < T), columns, D)
    offset = rows.to(tl.int64)[:, None] * D + columns[None, :]
    query = query.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, query, mask=live[:, None] & (columns < D)[None, :])


@triton.jit
def sum_by_index_kernel(
    grad_ptr,  # [P, D]
    order_ptr,  # [P], the places sorted by index
    first_ptr,  # [S + 1], where each index starts in that order
    out_ptr,  # [S, D]
    D,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(first_ptr + row + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(tl.load(first_ptr + row), end, ROWS):
        live = start + tl.arange(0, ROWS) < end
        place = tl.load(order_ptr + start + tl.arange(0, ROWS), mask=live, other=0)
        mask = live[:, None] & (columns < D)[None, :]
        grad = tl.load(grad_ptr + place[:, None] * D + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(grad.to(tl.float32), 0)
    offset = tl.cast(row, tl.int64) * D + columns
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["P", "R"], do_not_specialize_on_alignment=["target_index_ptr"])
def loss_fwd_kernel(
    restored_ptr, target_ptr, target_index_ptr,
    loss_ptr,  # [P] float32
    P, R, D,
    COSINE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < P
    index = tl.load(target_index_ptr + rows, mask=live, other=-1)
    sound = (index >= 0) & (index < R)
    rr, rt, tt, difference = row_sums(
        restored_ptr, target_ptr, rows, live, index, sound, D, ROWS, BLOCK_D
    )
    if COSINE:
        norms = tl.maximum(tl.sqrt(rr), EPSILON) * tl.maximum(tl.sqrt(tt), EPSILON)
        loss = 1 - rt / norms
    else:
        loss = difference / tl.maximum(tt, EPSILON)
    tl.store(loss_ptr + rows, loss, mask=live)


@triton.jit(do_not_specialize=["P", "R"], do_not_specialize_on_alignment=["target_index_ptr"])
def loss_bwd_kernel(
    grad_ptr,  # [P] float32
    restored_ptr, target_ptr, target_index_ptr,
    grad_restored_ptr,  # [P, D]
    P, R, D,
    COSINE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < P
    index = tl.load(target_index_ptr + rows, mask=live, other=-1)
    sound = (index >= 0) & (index < R)
    grad = tl.load(grad_ptr + rows, mask=live, other=0.0)
    rr, rt, tt, _ = row_sums(restored_ptr, target_ptr, rows, live, index, sound, D, ROWS, BLOCK_D)
    if COSINE:
        norm = tl.sqrt(rr)
        longest = tl.maximum(norm, EPSILON)
        factor = grad / (longest * tl.maximum(tl.sqrt(tt), EPSILON))
        along = tl.where(norm > EPSILON, rt / (longest * longest), 0.0)
    else:
        factor = 2 * grad / tl.maximum(tt, EPSILON)
        along = tl.full((ROWS,), 1.0, tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        r = load_rows(restored_ptr, rows, live, columns, D)
        t = load_rows(target_ptr, index, sound, columns, D)
        grad_restored = factor[:, None] * (along[:, None] * r - t)
        offset = rows.to(tl.int64)[:, None] * D + columns[None, :]
        mask = live[:, None] & (columns < D)[None, :]
        tl.store(
            grad_restored_ptr + offset, grad_restored.to(grad_restored_ptr.dtype.element_ty), mask
        )


@triton.jit
def row_sums(
    restored_ptr, target_ptr, rows, live, index, sound, D,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return r·r, r·t, t·t and ‖r − t‖² of each row, [ROWS] float32."""
    rr = tl.zeros((ROWS,), tl.float32)
    rt = tl.zeros((ROWS,), tl.float32)
    tt = tl.zeros((ROWS,), tl.float32)
    difference = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        r = load_rows(restored_ptr, rows, live, columns, D)
        t = load_rows(target_ptr, index, sound, columns, D)
        rr += tl.sum(r * r, 1)
        rt += tl.sum(r * t, 1)
        tt += tl.sum(t * t, 1)
        difference += tl.sum((r - t) * (r - t), 1)
    return rr, rt, tt, difference


@torch.library.custom_op("cmdlab_kernels::corrupted_queries", mutates_args=())
def corrupted_queries(
    source: Tensor, source_index: Tensor, position: Tensor, place: Tensor
) -> Tensor:
    """Return source[source_index] + position[place], [P, D]."""
    (p,), d = source_index.shape, source.shape[1]
    out = source.new_empty(p, d)
    if p > 0:
        grid = triton.cdiv(p, ROW_TILE["ROWS"]), triton.cdiv(d, ROW_TILE["BLOCK_D"])
        with torch.cuda.device_of(source):
            queries_fwd_kernel[grid](
                source.contiguous(), source_index.contiguous(),
                position.contiguous(), place.contiguous(),
                out, p, source.shape[0], position.shape[0], d, **ROW_TILE,
            )  # fmt: skip
    return out


@torch.library.custom_op("cmdlab_kernels::sum_by_index", mutates_args=())
def sum_by_index(grad: Tensor, index: Tensor, size: int) -> Tensor:
    """Return [size, D]: row s is the sum of the rows of `grad` [P, D] whose index is s."""
    d = grad.shape[1]
    out = grad.new_empty(size, d)
    ordered, order = index.sort(stable=True)
    first = torch.searchsorted(ordered, torch.arange(size + 1, device=index.device), out_int32=True)
    with torch.cuda.device_of(grad):
        sum_by_index_kernel[(size, triton.cdiv(d, SUM_TILE["BLOCK_D"]))](
            grad.contiguous(), order, first, out, d, **SUM_TILE
        )
    return out


@torch.library.custom_op("cmdlab_kernels::restoration_losses", mutates_args=())
def restoration_losses(
    restored: Tensor, target: Tensor, target_index: Tensor, cosine: bool
) -> Tensor:
    """Return the loss of each place, [P] float32; no gradient flows to `target`."""
    p, d = restored.shape
    loss = restored.new_empty(p, dtype=torch.float32)
    if p > 0:
        with torch.cuda.device_of(restored):
            loss_fwd_kernel[(triton.cdiv(p, ROW_TILE["ROWS"]),)](
                restored.contiguous(), target.contiguous(), target_index.contiguous(),
                loss, p, target.shape[0], d, COSINE=cosine, **ROW_TILE,
            )  # fmt: skip
    return loss


@torch.library.custom_op("cmdlab_kernels::restoration_losses_bwd", mutates_args=())
def restoration_losses_bwd(
    grad: Tensor, restored: Tensor, target: Tensor, target_index: Tensor, cosine: bool
) -> Tensor:
    """Return the gradient of `restored` [P, D] for the gradient of each place's loss [P]."""
    p, d = restored.shape
    grad_restored = restored.new_empty(p, d)
    if p > 0:
        with torch.cuda.device_of(restored):
            loss_bwd_kernel[(triton.cdiv(p, ROW_TILE["ROWS"]),)](
                grad.contiguous(), restored.contiguous(), target.contiguous(),
                target_index.contiguous(), grad_restored,
                p, target.shape[0], d, COSINE=cosine, **ROW_TILE,
            )  # fmt: skip
    return grad_restored


@corrupted_queries.register_fake
def _(source, source_index, position, place):
    return source.new_empty(source_index.shape[0], source.shape[1])


@sum_by_index.register_fake
def _(grad, index, size):
    return grad.new_empty(size, grad.shape[1])


@restoration_losses.register_fake
def _(restored, target, target_index, cosine):
    return restored.new_empty(restored.shape[0], dtype=torch.float32)


@restoration_losses_bwd.register_fake
def _(grad, restored, target, target_index, cosine):
    return restored.new_empty(restored.shape)


def save_queries(ctx, inputs, output):
    source, source_index, position, place = inputs
    ctx.save_for_backward(source_index, place)
    ctx.sizes = source.shape[0], position.shape[0]


def backward_queries(ctx, grad):
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    tables = [
        sum_by_index(grad, index, size) if need else None
        for need, index, size in zip(needed, ctx.saved_tensors, ctx.sizes, strict=True)
    ]
    return tables[0], None, tables[1], None


def save_restored(ctx, inputs, output):
    *tensors, ctx.cosine = inputs
    ctx.save_for_backward(*tensors)


def backward_restored(ctx, grad):
    return restoration_losses_bwd(grad, *ctx.saved_tensors, ctx.cosine), None, None, None


corrupted_queries.register_autograd(backward_queries, setup_context=save_queries)
restoration_losses.register_autograd(backward_restored, setup_context=save_restored)
