"""Triton kernels of InfoNCE: one pass over score tiles serves rows and columns, forward and back.

Embeddings are unit-norm, so scale bounds every logit and one exponential serves the sum of its row
and the sum of its column. Tiles write partial sums that are added in a fixed order, so results
repeat bit for bit. Memory is N² / 64 floats of partial sums and, backward, N × 4096 weights.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

LN_2 = math.log(2)
# Sums are kept as Σ 2^(logit − scale + HEADROOM), logits in bits: up to 2^26 terms of 2^100 stay
# finite. A sum below TRUSTED may have lost terms to underflow, one of longer rows may be infinite:
# either is computed again.
HEADROOM = tl.constexpr(100.0)
TRUSTED = tl.constexpr(2.0**-80)
COLUMNS_AT_ONCE = 4096


def configuration(kernel, dtype: torch.dtype, capability: int) -> dict:
    """Return a kernel's tile sizes and launch options; one for each case, no autotuning."""
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 3}
    # Hopper's wgmma wants the taller tile of sums, and has the registers for it.
    height = 256 if kernel is sums_fwd_kernel and capability // 10 == 9 else 128
    return {"BLOCK_N": height, "BLOCK_M": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def score_tile(
    speech_ptr, image_ptr, rows, columns, N, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return speech[rows] image[columns]ᵀ, [BLOCK_N, BLOCK_M] float32."""
    scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    speech_row = speech_ptr + rows.to(tl.int64)[:, None] * D
    image_row = image_ptr + columns.to(tl.int64)[None, :] * D
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        s = tl.load(
            speech_row + dims[None, :], mask=(rows < N)[:, None] & (dims < D)[None, :], other=0.0
        )
        v = tl.load(
            image_row + dims[:, None], mask=(columns < N)[None, :] & (dims < D)[:, None], other=0.0
        )
        scores = tl.dot(s, v, scores, input_precision="ieee")
    return scores


@triton.jit
def denominators(group_ptr, rows, columns, N):
    """Return which entries belong in the denominators, [BLOCK_N, BLOCK_M] bool."""
    row_group = tl.load(group_ptr + rows, mask=rows < N, other=-1)
    column_group = tl.load(group_ptr + columns, mask=columns < N, other=-1)
    return (row_group[:, None] != column_group[None, :]) | (rows[:, None] == columns[None, :])


@triton.jit(do_not_specialize=["N"])
def sums_fwd_kernel(
    speech_ptr, image_ptr, group_ptr, scale_ptr,
    row_sum_ptr,  # [column blocks, N]
    column_sum_ptr,  # [row blocks, N]
    positive_ptr,  # [N]
    N, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row_block, column_block = tl.program_id(1), tl.program_id(0)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_block * BLOCK_M + tl.arange(0, BLOCK_M)
    scores = score_tile(speech_ptr, image_ptr, rows, columns, N, D, BLOCK_N, BLOCK_M, BLOCK_D)
    bits = tl.load(scale_ptr) * 1.4426950408889634
    terms = tl.exp2((scores - 1.0) * bits + HEADROOM)
    kept = denominators(group_ptr, rows, columns, N)
    kept &= (rows < N)[:, None] & (columns < N)[None, :]
    terms = tl.where(kept, terms, 0.0)
    row_sum = row_sum_ptr + column_block.to(tl.int64) * N + rows
    column_sum = column_sum_ptr + row_block.to(tl.int64) * N + columns
    tl.store(row_sum, tl.sum(terms, 1), mask=rows < N)
    tl.store(column_sum, tl.sum(terms, 0), mask=columns < N)
    first_row, first_column = row_block * BLOCK_N, column_block * BLOCK_M
    if (first_row < first_column + BLOCK_M) & (first_column < first_row + BLOCK_N):
        diagonal = rows[:, None] == columns[None, :]
        positive = tl.sum(tl.where(diagonal, scores, 0.0), 1)
        here = (rows >= first_column) & (rows < first_column + BLOCK_M) & (rows < N)
        tl.store(positive_ptr + rows, positive, mask=here)


@triton.jit(do_not_specialize=["N"])
def untrusted_fwd_kernel(
    speech_ptr, image_ptr, group_ptr, scale_ptr, sum_ptr, lse_ptr, N, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Overwrite `lse` [N] where `sum` is not to be trusted, with a running maximum per row."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.load(sum_ptr + rows, mask=rows < N, other=1.0)
    untrusted = (total < TRUSTED) | (total == float("inf"))
    if tl.max(untrusted.to(tl.int32), 0) > 0:
        bits = tl.load(scale_ptr) * 1.4426950408889634
        maximum = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_M):
            columns = start + tl.arange(0, BLOCK_M)
            scores = score_tile(
                speech_ptr, image_ptr, rows, columns, N, D, BLOCK_N, BLOCK_M, BLOCK_D
            )
            kept = denominators(group_ptr, rows, columns, N) & (columns < N)[None, :]
            logits = tl.where(kept, scores * bits, float("-inf"))
            larger = tl.maximum(maximum, tl.max(logits, 1))
            finite = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp2(maximum - finite)
            total += tl.sum(tl.exp2(logits - finite[:, None]), 1)
            maximum = larger
        lse = (maximum + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + rows, lse, mask=untrusted & (rows < N))


@triton.jit(do_not_specialize=["N", "first_column"])
def weights_bwd_kernel(
    speech_ptr, image_ptr, group_ptr, scale_ptr, row_lse_ptr, column_lse_ptr,
    weight_ptr,  # [N, width], width a multiple of 16 so that rows are stored in words
    first_column, width, N, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the row plus column softmax, less 2 on the diagonal, for columns from first_column."""
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first_column + place
    scores = score_tile(speech_ptr, image_ptr, rows, columns, N, D, BLOCK_N, BLOCK_M, BLOCK_D)
    row_lse = tl.load(row_lse_ptr + rows, mask=rows < N, other=0.0) * 1.4426950408889634
    column_lse = tl.load(column_lse_ptr + columns, mask=columns < N, other=0.0)
    column_lse *= 1.4426950408889634
    logits = scores * (tl.load(scale_ptr) * 1.4426950408889634)
    weight = tl.exp2(logits - row_lse[:, None]) + tl.exp2(logits - column_lse[None, :])
    weight = tl.where(denominators(group_ptr, rows, columns, N), weight, 0.0)
    weight -= tl.where(rows[:, None] == columns[None, :], 2.0, 0.0)
    pointer = weight_ptr + rows.to(tl.int64)[:, None] * width + place[None, :]
    mask = (rows < N)[:, None] & (place < width)[None, :]
    tl.store(pointer, weight.to(weight_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("cmdlab_kernels::info_nce_fwd", mutates_args=())
def info_nce_fwd(
    speech: Tensor, image: Tensor, image_id: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (0-d) and the log-sum-exp of each row and column, [N] float32."""
    speech, image = aligned(speech), aligned(image)
    scale = scale.float()
    n, d = speech.shape
    group = groups(image_id)
    options = configuration(sums_fwd_kernel, speech.dtype, capability(speech))
    row_blocks, column_blocks = (triton.cdiv(n, options[side]) for side in ("BLOCK_N", "BLOCK_M"))
    row_sums = speech.new_empty(column_blocks, n, dtype=torch.float32)
    column_sums = speech.new_empty(row_blocks, n, dtype=torch.float32)
    positive = speech.new_empty(n, dtype=torch.float32)
    with torch.cuda.device_of(speech):
        sums_fwd_kernel[(column_blocks, row_blocks)](
            speech, image, group, scale, row_sums, column_sums, positive, n, d, **options
        )
        options = configuration(untrusted_fwd_kernel, speech.dtype, capability(speech))
        lse = []
        for side, other, sums in ((speech, image, row_sums), (image, speech, column_sums)):
            total = sums.sum(0)
            mantissa, exponent = total.frexp()
            # An int32 less a number would have torch's default dtype.
            lse.append(mantissa.log() + (exponent.float() - HEADROOM.value) * LN_2 + scale)
            untrusted_fwd_kernel[(triton.cdiv(n, options["BLOCK_N"]),)](
                side, other, group, scale, total, lse[-1], n, d, **options
            )
    loss = ((lse[0] + lse[1]) / 2 - scale * positive).mean()
    return loss, lse[0], lse[1]


@torch.library.custom_op("cmdlab_kernels::info_nce_bwd", mutates_args=())
def info_nce_bwd(
    grad: Tensor,
    speech: Tensor,
    image: Tensor,
    image_id: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of speech, image [N, D] and scale (0-d), for the loss's gradient."""
    width, speech, image = speech.shape[1], aligned(speech), aligned(image)
    n, d = speech.shape
    group = groups(image_id)
    options = configuration(weights_bwd_kernel, speech.dtype, capability(speech))
    factor = grad * scale.float() / (2 * n)
    d_speech = torch.zeros_like(speech, dtype=torch.float32)
    d_image = torch.empty_like(image)
    with torch.cuda.device_of(speech):
        for first in range(0, n, COLUMNS_AT_ONCE):
            chunk = image[first : first + COLUMNS_AT_ONCE]
            weight = speech.new_empty(n, triton.cdiv(len(chunk), 16) * 16)
            grid = (
                triton.cdiv(len(chunk), options["BLOCK_M"]),
                triton.cdiv(n, options["BLOCK_N"]),
            )
            weights_bwd_kernel[grid](
                speech, image, group, scale.float(), row_lse, column_lse,
                weight, first, weight.shape[1], n, d, **options,
            )  # fmt: skip
            weight = weight[:, : len(chunk)]
            d_speech += product(weight, chunk)
            d_image[first : first + COLUMNS_AT_ONCE] = product(weight.T, speech) * factor
    d_scale = (d_speech * speech).sum() * (grad / (2 * n))
    d_speech = (d_speech * factor).to(speech.dtype)
    # Clones, since an operator may not return views of a padded gradient.
    d_speech, d_image = (x if d == width else x[:, :width].clone() for x in (d_speech, d_image))
    return d_speech, d_image, d_scale.to(scale.dtype)


def capability(tensor: Tensor) -> int:
    """Return the compute capability of the tensor's GPU, such as 90; 80 in the interpreter."""
    if not tensor.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def aligned(embedding: Tensor) -> Tensor:
    """Return the rows contiguous and 16-byte aligned, D filled with zeros to a multiple of 16."""
    return F.pad(embedding, (0, -embedding.shape[1] % 16)).contiguous()


def groups(image_id: Tensor) -> Tensor:
    """Return an int32 for each row, equal where the image is; half the registers of an id."""
    return torch.searchsorted(image_id.sort().values, image_id, out_int32=True)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32, whatever the dtype of a and b, and inside of autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


@info_nce_fwd.register_fake
def _(speech, image, image_id, scale):
    n = speech.shape[0]
    return (
        speech.new_empty((), dtype=torch.float32),
        speech.new_empty(n, dtype=torch.float32),
        speech.new_empty(n, dtype=torch.float32),
    )


@info_nce_bwd.register_fake
def _(grad, speech, image, image_id, scale, row_lse, column_lse):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(speech, memory_format=contiguous),
        torch.empty_like(image, memory_format=contiguous),
        torch.empty_like(scale),
    )


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])


def backward(ctx, grad, _row_lse, _column_lse):
    d_speech, d_image, d_scale = info_nce_bwd(grad, *ctx.saved_tensors)
    return d_speech, d_image, None, d_scale


info_nce_fwd.register_autograd(backward, setup_context=save_for_backward)
