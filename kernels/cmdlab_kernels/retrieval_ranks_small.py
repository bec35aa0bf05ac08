"""Certified retrieval ranks of few pairs on the CPU: one float32 product and few other calls.

Thresholds too are read off the product, where the best positive is as far from its defined score as
any other pair. Defined scores are computed only for pairs that this leaves in doubt, and for the
positives that may be the best of their rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmdlab_kernels import retrieval_ranks_cpu
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
COMPARED = 2**17  # scores at once: they and twice as many verdicts fit in a processor's caches
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
    line = torch.cat([row, column + n])
    place = row * m + column
    positive = scores.view(-1).index_select(0, place).repeat(2)
    scores.view(-1).index_fill_(0, place, -torch.inf)
    best = scores.new_full((n + m,), -torch.inf).scatter_reduce_(0, line, positive, "amax")
    if float(best.min()) == -torch.inf:
        return None

    # Twice the error of a product, the pair's own and its threshold's, and the ends' rounding; the
    # norms are float32 sums of squares themselves. A processor rounds to nearest.
    rounding = 2 * ((dimensions + 16) * 2.0**-24 + float64_bound(dimensions)) + 2.0**-22
    rounding *= 1 + (dimensions + 16) * 2.0**-20
    error = torch.cat([norms[0] * (longest[1] * rounding), norms[1] * (longest[0] * rounding)])
    error += dimensions * 2.0**-110  # underflow
    ends = torch.stack([best + error, best - error])
    greater, above_low = _count_above(scores, ends)
    equal = torch.zeros_like(greater)
    in_doubt = above_low > greater
    doubtful = int((above_low - greater).sum())
    if doubtful > DOUBTFUL_LIMIT * scores.numel() + 64:
        return None
    if doubtful > 0:
        wrong_line, wrong_row, wrong_column = _between(scores, ends, in_doubt)
        # Only a positive within its line's interval may have the line's best defined score.
        needed = (in_doubt[line] & (positive > ends[1][line])).nonzero()[:, 0]
        pair = needed % len(row)
        rows, columns = torch.cat([row[pair], wrong_row]), torch.cat([column[pair], wrong_column])
        defined = pair_scores(speech, image, rows, columns)
        right_score, wrong = defined.split([len(needed), doubtful])
        threshold = torch.full_like(best, -torch.inf, dtype=torch.float64)
        threshold = threshold.scatter_reduce_(0, line[needed], right_score, "amax")[wrong_line]
        greater.index_add_(0, wrong_line, (wrong > threshold).long())
        equal.index_add_(0, wrong_line, (wrong == threshold).long())
    speech_greater, image_greater = (x.clone() for x in greater.split([n, m]))
    speech_equal, image_equal = (x.clone() for x in equal.split([n, m]))
    arithmetic = torch.full_like(speech_image_id, PATHS.index(FP32.name))
    return Counts(speech_greater, speech_equal, image_greater, image_equal, arithmetic)


def _few(pairs: int) -> bool:
    if pairs <= PAIRS:
        return True
    only_float32 = retrieval_ranks_cpu.fast_dtypes() == (torch.float32,)
    return only_float32 and pairs <= PAIRS * ONLY_FLOAT32


def _count_above(scores: Tensor, ends: Tensor) -> Tensor:
    """How many scores of each line are above its ends, which are high and low: int64 [2, N + M].

    A few rows of scores [N, M] at a time are compared with the ends of both directions. The
    verdicts are in the scores' dtype: torch compares several times as fast when the output has the
    inputs' dtype, and the sums are exact.
    """
    n, m = scores.shape
    height = max(1, COMPARED // m)
    memory = scores.new_empty(2, min(n, height), m)
    by_row, by_column = scores.new_empty(2, n), scores.new_zeros(2, m)
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        tile, verdicts = scores[rows], memory[:, : min(height, n - start)]
        torch.sum(torch.gt(tile, ends[:, rows, None], out=verdicts), 2, out=by_row[:, rows])
        by_column += torch.gt(tile, ends[:, None, n:], out=verdicts).sum(1)
    return torch.cat([by_row, by_column], 1).long()


def _between(scores: Tensor, ends: Tensor, in_doubt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Line, row and column, int64 [P], of what lies between the ends of the lines in doubt."""
    found = []
    n = len(scores)
    for first, lines in ((0, scores), (n, scores.T)):
        chosen = in_doubt[first : first + len(lines)].nonzero()[:, 0]
        high, low = ends[:, chosen + first, None]
        some = lines[chosen]
        line, place = ((some > low) & (some <= high)).nonzero(as_tuple=True)
        found.append((chosen[line], place))
    (row, column), (column_of_image, row_of_image) = found
    return (
        torch.cat([row, column_of_image + n]),
        torch.cat([row, row_of_image]),
        torch.cat([column, column_of_image]),
    )
