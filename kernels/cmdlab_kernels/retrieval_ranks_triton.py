"""Certified retrieval ranks on a GPU: one pass over the scores counts both directions.

`ranks_fwd_kernel` multiplies in int8, float16, bfloat16 or float32, counts what is certainly above
the thresholds and lists the pairs in doubt; `recheck_fwd_kernel` gives each of those its defined
float64 score, as `pairs_fwd_kernel` does for the positives. Counts are added by integer atomics, so
they do not depend on the order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdlab_kernels.retrieval_bounds import (
    Rounded,
    doubtful_interval,
    float_ends,
    int8_fits,
    integer_ends,
    ordinary,
    round_rows,
)
from cmdlab_kernels.retrieval_scores import PATHS, Counts, count_exact

PAIRS_AT_ONCE = 2**30  # of one launch; its list of doubtful pairs is emptied before the next
PILOT_ROWS = 2048
PAIRS = {"BLOCK_P": 64, "num_warps": 2}  # configuration of the kernels that score pairs one by one
DEPTH = {torch.int8: 128, torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}  # of a tile


@dataclass(frozen=True)
class Precision:
    """A way to multiply matrices, and the share of doubtful pairs up to which it pays."""

    name: str
    dtype: torch.dtype
    doubtful_limit: float


INT8 = Precision("triton-int8", torch.int8, 2.0**-11)
FP16 = Precision("triton-fp16", torch.float16, 2.0**-7)
BF16 = Precision("triton-bf16", torch.bfloat16, 2.0**-7)
FP32 = Precision("triton-fp32", torch.float32, 2.0**-6)


def precisions(dtype: torch.dtype, dimensions: int) -> tuple[Precision, ...]:
    """What is tried for inputs of `dtype`, fastest first.

    bfloat16 only where it rounds nothing, int8 only where no sum can overflow.
    """
    if dtype == torch.bfloat16:
        return BF16, FP32
    return (INT8, FP16, FP32) if int8_fits(dimensions) else (FP16, FP32)


def configuration(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options: one for each dtype, frozen, so that nothing is autotuned."""
    depth = DEPTH[dtype]
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": depth, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_D": depth, "num_warps": 8, "num_stages": 3}


@triton.jit
def ranks_fwd_kernel(
    speech_ptr, image_ptr,  # [N, D] and [M, D] in the low precision, D a multiple of BLOCK_D
    speech_ends_ptr, image_ends_ptr,  # [2, N] and [2, M], float32 or int32
    speech_id_ptr, image_id_ptr,  # [N] and [M] int32, equal for positives; no id is negative
    speech_greater_ptr, image_greater_ptr,  # [N] and [M] int32, added to
    doubtful_ptr, found_ptr, capacity,  # [capacity] int64 (row × M + column) × 4 + directions; []
    N, M, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Tiles run down GROUP row blocks before the next column block, so that both sides stay in L2.
    column_blocks = tl.cdiv(M, BLOCK_M)
    row_blocks = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first = tile // (GROUP * column_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = tile % (GROUP * column_blocks)
    rows = (first + within % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = within // height * BLOCK_M + tl.arange(0, BLOCK_M)

    INTEGER: tl.constexpr = speech_ptr.dtype.element_ty == tl.int8
    ACCUMULATOR: tl.constexpr = tl.int32 if INTEGER else tl.float32
    scores = tl.zeros((BLOCK_N, BLOCK_M), ACCUMULATOR)
    dims = tl.arange(0, BLOCK_D)
    s_ptr = speech_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * D + dims[None, :]
    v_ptr = image_ptr + tl.minimum(columns, M - 1).to(tl.int64)[None, :] * D + dims[:, None]
    for start in range(0, D, BLOCK_D):
        s = tl.load(s_ptr + start)
        v = tl.load(v_ptr + start)
        if UPCAST:  # the interpreter's bfloat16 products are wrong
            s, v = s.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(s, v, scores, input_precision="ieee", out_dtype=ACCUMULATOR)

    in_rows, in_columns = rows < N, columns < M
    row_id = tl.load(speech_id_ptr + rows, mask=in_rows, other=-1)
    column_id = tl.load(image_id_ptr + columns, mask=in_columns, other=-1)
    counted = in_rows[:, None] & in_columns[None, :] & (row_id[:, None] != column_id[None, :])
    # Below every interval: such pairs are neither above nor in doubt.
    scores = tl.where(counted, scores, -2147483648 if INTEGER else -float("inf"))

    row_low = tl.load(speech_ends_ptr + rows, mask=in_rows, other=0)
    row_high = tl.load(speech_ends_ptr + N + rows, mask=in_rows, other=0)
    column_low = tl.load(image_ends_ptr + columns, mask=in_columns, other=0)
    column_high = tl.load(image_ends_ptr + M + columns, mask=in_columns, other=0)
    above_row = scores > row_high[:, None]
    above_column = scores > column_high[None, :]
    row_count = tl.sum(above_row.to(tl.int32), 1)
    column_count = tl.sum(above_column.to(tl.int32), 0)
    tl.atomic_add(speech_greater_ptr + rows, row_count, mask=row_count > 0, sem="relaxed")
    tl.atomic_add(image_greater_ptr + columns, column_count, mask=column_count > 0, sem="relaxed")

    row_doubt = (scores >= row_low[:, None]) & (scores <= row_high[:, None])
    column_doubt = (scores >= column_low[None, :]) & (scores <= column_high[None, :])
    directions = row_doubt.to(tl.int32) + 2 * column_doubt.to(tl.int32)
    if tl.max(directions) > 0:  # over both axes at once: Triton 3.6 fails on nested ones on 10.0
        doubtful = directions > 0
        slot = tl.atomic_add(found_ptr + tl.zeros_like(directions), 1, mask=doubtful, sem="relaxed")
        pair = rows.to(tl.int64)[:, None] * M + columns[None, :]
        tl.store(doubtful_ptr + slot, pair * 4 + directions, mask=doubtful & (slot < capacity))


@triton.jit
def defined_scores(speech_ptr, image_ptr, row, column, D, BLOCK_P: tl.constexpr):
    """The defined score float64 [BLOCK_P] of the pairs (row, column), int64 [BLOCK_P] each."""
    # Products of two float32 are exact in float64, so a fused multiply-add rounds as the defined
    # score does: once a dimension, in the order of the dimensions.
    score = tl.zeros((BLOCK_P,), tl.float64)
    for dimension in range(D):
        s = tl.load(speech_ptr + row * D + dimension).to(tl.float32).to(tl.float64)
        v = tl.load(image_ptr + column * D + dimension).to(tl.float32).to(tl.float64)
        score += s * v
    return score


@triton.jit
def pairs_fwd_kernel(
    speech_ptr, image_ptr,  # [N, D] and [M, D] as given
    row_ptr, column_ptr, score_ptr,  # [P] int64, int64 and float64
    P, D,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    listed = places < P
    row = tl.load(row_ptr + places, mask=listed, other=0)
    column = tl.load(column_ptr + places, mask=listed, other=0)
    score = defined_scores(speech_ptr, image_ptr, row, column, D, BLOCK_P)
    tl.store(score_ptr + places, score, mask=listed)


@triton.jit
def recheck_fwd_kernel(
    speech_ptr, image_ptr,  # [N, D] and [M, D] as given
    speech_threshold_ptr, image_threshold_ptr,  # [N] and [M] float64
    speech_greater_ptr, speech_equal_ptr, image_greater_ptr, image_equal_ptr,  # int32, added to
    doubtful_ptr, found_ptr, capacity,
    M, D,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    found = tl.minimum(tl.load(found_ptr), capacity)
    for start in range(tl.program_id(0) * BLOCK_P, found, tl.num_programs(0) * BLOCK_P):
        places = start + tl.arange(0, BLOCK_P)
        listed = places < found
        code = tl.load(doubtful_ptr + places, mask=listed, other=0)
        row, column = (code >> 2) // M, (code >> 2) % M
        score = defined_scores(speech_ptr, image_ptr, row, column, D, BLOCK_P)
        by_row = tl.load(speech_threshold_ptr + row)
        by_column = tl.load(image_threshold_ptr + column)
        in_row, in_column = listed & (code & 1 != 0), listed & (code & 2 != 0)
        one = tl.full((BLOCK_P,), 1, tl.int32)
        tl.atomic_add(speech_greater_ptr + row, one, in_row & (score > by_row), "relaxed")
        tl.atomic_add(speech_equal_ptr + row, one, in_row & (score == by_row), "relaxed")
        tl.atomic_add(image_greater_ptr + column, one, in_column & (score > by_column), "relaxed")
        tl.atomic_add(image_equal_ptr + column, one, in_column & (score == by_column), "relaxed")


def pair_scores(speech: Tensor, image: Tensor, speech_index: Tensor, image_index: Tensor) -> Tensor:
    """The defined score float64 [P] of the pairs (speech_index [P], image_index [P])."""
    scores = torch.empty(len(speech_index), dtype=torch.float64, device=speech.device)
    index = speech_index.contiguous(), image_index.contiguous()
    if len(scores) > 0:
        with torch.cuda.device_of(speech):
            pairs_fwd_kernel[(triton.cdiv(len(scores), PAIRS["BLOCK_P"]),)](
                *(speech.contiguous(), image.contiguous(), *index, scores),
                *(len(scores), speech.shape[1]),
                **PAIRS,
            )
    return scores


def count_certified(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    speech_threshold: Tensor,
    image_threshold: Tensor,
) -> Counts:
    """The counts, by the first precision that leaves few pairs in doubt, or else exactly.

    Arguments as for `count_reference`, of float16, bfloat16 or float32.
    """
    speech, image = speech.contiguous(), image.contiguous()
    # int64 ids to the places among the gallery's, int32 [M], and -1 for none, int32 [N]
    ids, image_place = image_id.unique(return_inverse=True)
    place = torch.searchsorted(ids, speech_image_id).clamp_(max=len(ids) - 1)
    speech_place = torch.where(ids[place] == speech_image_id, place, -1)
    places = speech_place.int(), image_place.int()
    arguments = speech, image, *places, speech_threshold, image_threshold
    tried = precisions(speech.dtype, speech.shape[1]) if ordinary(speech, image) else ()
    for precision in tried:
        with torch.cuda.device_of(speech):
            counts = _count(precision, *arguments)
        if counts is not None:
            return counts
    return count_exact(*arguments, pair_scores)


def _count(
    precision: Precision,
    speech: Tensor,
    image: Tensor,
    speech_id: Tensor,
    image_id: Tensor,
    speech_threshold: Tensor,
    image_threshold: Tensor,
) -> Counts | None:
    """The counts, or None where more pairs are in doubt than the precision is worth."""
    n, m = len(speech), len(image)
    low_speech = round_rows(speech, precision.dtype, multiple=DEPTH[precision.dtype], clip=True)
    low_image = round_rows(image, precision.dtype, multiple=DEPTH[precision.dtype])
    speech_ends = _ends(speech_threshold, low_speech, low_image)
    image_ends = _ends(image_threshold, low_image, low_speech)
    width = min(m, max(1, PAIRS_AT_ONCE // n))
    capacity = max(2**16, int(precision.doubtful_limit * n * width))
    doubtful = torch.empty(capacity, dtype=torch.int64, device=speech.device)
    found = speech_id.new_zeros(-(-m // width))  # of each launch
    speech_counts, image_counts = speech_id.new_zeros(2, n), image_id.new_zeros(2, m)

    if n > 4 * PILOT_ROWS:  # a fair sample first: a pass that is given up costs as much as another
        sample = slice(None, None, n // PILOT_ROWS)
        columns = slice(0, width)
        _launch_ranks(
            low_speech.values[sample].contiguous(),
            low_image.values[columns],
            speech_ends[:, sample].contiguous(),
            image_ends[:, columns].contiguous(),
            speech_id[sample].contiguous(),
            image_id[columns],
            torch.zeros_like(speech_counts[0, sample]),
            torch.zeros_like(image_counts[0, columns]),
            doubtful,
            found[:1],
        )
        if int(found[0]) > precision.doubtful_limit * len(speech_id[sample]) * width:
            return None
        found.zero_()
    for launch, left in enumerate(range(0, m, width)):
        columns = slice(left, min(left + width, m))
        _launch_ranks(
            low_speech.values,
            low_image.values[columns],
            speech_ends,
            image_ends[:, columns].contiguous(),
            speech_id,
            image_id[columns],
            speech_counts[0],
            image_counts[0, columns],
            doubtful,
            found[launch:],
        )
        recheck_fwd_kernel[(min(1024, triton.cdiv(n * (columns.stop - left), 4096)),)](
            *(speech, image[columns], speech_threshold, image_threshold[columns]),
            *(*speech_counts, *image_counts[:, columns]),
            *(doubtful, found[launch:], capacity, columns.stop - left, speech.shape[1]),
            **PAIRS,
        )
    if int(found.max()) > capacity:
        return None
    return Counts(
        speech_counts[0].long(),
        speech_counts[1].long(),
        image_counts[0].long(),
        image_counts[1].long(),
        torch.full((n,), PATHS.index(precision.name), device=speech.device),
    )


def _launch_ranks(
    speech: Tensor,
    image: Tensor,
    speech_ends: Tensor,
    image_ends: Tensor,
    speech_id: Tensor,
    image_id: Tensor,
    speech_greater: Tensor,
    image_greater: Tensor,
    doubtful: Tensor,
    found: Tensor,
) -> None:
    (n, dimensions), m = speech.shape, len(image)
    options = configuration(speech.dtype)
    grid = (triton.cdiv(n, options["BLOCK_N"]) * triton.cdiv(m, options["BLOCK_M"]),)
    ranks_fwd_kernel[grid](
        *(speech, image, speech_ends, image_ends, speech_id, image_id),
        *(speech_greater, image_greater),
        *(doubtful, found, len(doubtful), n, m, dimensions),
        GROUP=8,
        UPCAST=os.environ.get("TRITON_INTERPRET") == "1" and speech.dtype == torch.bfloat16,
        **options,
    )


def _ends(threshold: Tensor, queries: Rounded, gallery: Rounded) -> Tensor:
    ends = doubtful_interval(threshold, queries, gallery)
    if queries.values.dtype == torch.int8:
        return integer_ends(ends, torch.int32)
    return float_ends(ends, torch.float32)
