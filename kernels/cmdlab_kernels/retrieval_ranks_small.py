"""Certified retrieval ranks of few pairs on the CPU: one float32 product and few other calls.

Thresholds too are read off the product, where the best positive is as far from its defined score as
any other pair. Defined scores are computed only for pairs that this leaves in doubt, and for the
positives that may be the best of their rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmdlab_kernels import retrieval_ranks_cpu
from cmdlab_kernels.retrieval_bounds import accumulation
from cmdlab_kernels.retrieval_scores import (
    PATHS,
    Counts,
    float64_bound,
    pair_scores,
    positive_pairs,
)
from cmdlab_kernels.retrieval_tiles_cpu import FP32, plain_float32

PAIRS = 2**20  # up to which one float32 product is the fastest way
ONLY_FLOAT32 = 8  # times as many where the processor multiplies nothing faster than float32
COMPARED = 2**18  # scores at once: they and what they are compared into fit in a processor's caches
DOUBTFUL_LIMIT = 0.01


def count_small(
    speech: Tensor, image: Tensor, speech_image_id: Tensor, image_id: Tensor
) -> Counts | None:
    """The counts, or None where this is not the way: many pairs, or many of them in doubt.

    None too for float64, for rows near float32's limits, and where a positive is lacking. Arguments
    as for `retrieval_ranks`.
    """
    n, m, dimensions = len(speech), len(image), speech.shape[1]
    if speech.dtype == torch.float64 or not _few(n * m):
        return None
    left, right = speech.float(), image.float()
    squares_underflow = dimensions * 2.0**-62
    norms = [torch.linalg.vector_norm(x, dim=1) + squares_underflow for x in (left, right)]
    longest = [float(x.max()) for x in norms]
    if not all(2.0**-20 < x < 2.0**30 for x in longest):  # NaN is not
        return None
    with plain_float32():
        scores = left @ right.T  # [N, M]

    # A line is a row of scores or a column: N captions, then M images. Each positive is in two.
    row, column = positive_pairs(speech_image_id, image_id.sort())
    place = row * m + column
    positive = scores.view(-1).index_select(0, place).repeat(2)
    scores.view(-1).index_fill_(0, place, -torch.inf)
    positives = torch.stack([torch.cat([row, column + n]), row.repeat(2), column.repeat(2)])
    best = scores.new_full((n + m,), -torch.inf)
    best.scatter_reduce_(0, positives[0], positive, "amax")
    if float(best.min()) == -torch.inf:
        return None

    # Twice the error of a product, the pair's own and its threshold's, and the ends' rounding; the
    # norms are float32 sums of squares themselves.
    rounding = 2 * (accumulation(torch.float32, dimensions) + float64_bound(dimensions)) + 2.0**-22
    rounding *= 1 + (dimensions + 16) * 2.0**-20
    error = torch.cat([norms[0] * (longest[1] * rounding), norms[1] * (longest[0] * rounding)])
    error += dimensions * 2.0**-110  # underflow
    ends = torch.stack([best + error, best - error])
    greater, doubtful = _compare(scores, ends)
    if doubtful.shape[1] > DOUBTFUL_LIMIT * scores.numel() + 64:
        return None
    equal = torch.zeros_like(greater)
    if doubtful.shape[1] > 0:
        line = doubtful[0]
        in_doubt = torch.zeros_like(best, dtype=torch.bool)
        in_doubt[line] = True
        perhaps_best = in_doubt[positives[0]] & (positive > ends[1][positives[0]])
        needed = positives[:, perhaps_best]
        _, row, column = torch.cat([needed, doubtful], 1)
        defined = pair_scores(speech, image, row, column)
        right_score, wrong = defined.split([needed.shape[1], len(line)])
        threshold = torch.full_like(best, -torch.inf, dtype=torch.float64)
        threshold = threshold.scatter_reduce_(0, needed[0], right_score, "amax")[line]
        greater.index_add_(0, line, (wrong > threshold).long())
        equal.index_add_(0, line, (wrong == threshold).long())
    by_direction = [x.clone() for counts in (greater, equal) for x in counts.split([n, m])]
    speech_greater, image_greater, speech_equal, image_equal = by_direction
    arithmetic = torch.full_like(speech_image_id, PATHS.index(FP32.name))
    return Counts(speech_greater, speech_equal, image_greater, image_equal, arithmetic)


def _few(pairs: int) -> bool:
    if pairs <= PAIRS:
        return True
    only_float32 = retrieval_ranks_cpu.fast_dtypes() == (torch.float32,)
    return only_float32 and pairs <= PAIRS * ONLY_FLOAT32


def _compare(scores: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """How many scores of each line are above its interval, int64 [N + M], and which are within.

    The latter as line, row and column, int64 [3, P]. The ends are high and low [2, N + M]. A few
    rows of scores [N, M] at a time are compared with both directions' ends.
    """
    n, m = scores.shape
    height = max(1, COMPARED // m)
    memory = scores.new_empty(2, min(n, height), m)
    above_rows, above_columns, doubtful = [], scores.new_zeros(m), []
    for start in range(0, n, height):
        tile = scores[start : start + height]
        verdicts = memory[:, : len(tile)]
        above, (row, column) = _against(tile, ends[:, start : start + len(tile)], verdicts)
        above_rows.append(above)
        doubtful.append(torch.stack([row + start, row + start, column]))
        above, (column, row) = _against(tile.T, ends[:, n:], verdicts.mT)
        above_columns += above
        doubtful.append(torch.stack([column + n, row + start, column]))
    return torch.cat([*above_rows, above_columns]).long(), torch.cat(doubtful, 1)


def _against(scores: Tensor, ends: Tensor, verdicts: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each line's scores [L, K] are above its ends [2, L], and which between them.

    The former are [L] in the scores' dtype, which holds them exactly, the latter line and place,
    int64 [2, P]. So are `verdicts` [2, L, K], since torch compares several times as fast when the
    output has the inputs' dtype.
    """
    above_high, above_low = torch.gt(scores, ends[:, :, None], out=verdicts).sum(2)
    lines = (above_low > above_high).nonzero()[:, 0]
    high, low = verdicts[:, lines]
    line, place = (low > high).nonzero(as_tuple=True)
    return above_high, torch.stack([lines[line], place])
