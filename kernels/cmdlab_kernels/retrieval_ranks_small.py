"""Certified retrieval ranks of few pairs on the CPU: one float32 product and few other calls.

Thresholds too are read off the product, where the best positive is as far from its defined score as
any other pair. Defined scores are computed only for pairs that this leaves in doubt, and for the
positives of their rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmdlab_kernels.retrieval_bounds import accumulation
from cmdlab_kernels.retrieval_scores import Counts, float64_bound, pair_scores, positive_pairs
from cmdlab_kernels.retrieval_tiles_cpu import FP32, plain_float32

PAIRS = 2**20  # the scores and what they are compared into still fit in a processor's caches
DOUBTFUL_LIMIT = 0.01


def count_small(
    speech: Tensor, image: Tensor, speech_image_id: Tensor, image_id: Tensor
) -> Counts | None:
    """The counts, or None where this is not the way: many pairs, or many of them in doubt.

    None too for float64, for rows near float32's limits, and where a positive is lacking. Arguments
    as for `retrieval_ranks`.
    """
    if len(speech) * len(image) > PAIRS or speech.dtype == torch.float64:
        return None
    left, right, dimensions = speech.float(), image.float(), speech.shape[1]
    squares_underflow = dimensions * 2.0**-62
    norms = [torch.linalg.vector_norm(x, dim=1) + squares_underflow for x in (left, right)]
    longest = [float(x.max()) for x in norms]
    if not all(2.0**-20 < x < 2.0**30 for x in longest):  # NaN is not
        return None
    row, column = positive_pairs(speech_image_id, image_id.sort())
    with plain_float32():
        scores = left @ right.T  # [N, M]
    positive = scores[row, column]
    best = [torch.full_like(x, -torch.inf) for x in norms]
    best[0].scatter_reduce_(0, row, positive, "amax")
    best[1].scatter_reduce_(0, column, positive, "amax")
    if any(bool(x.isneginf().any()) for x in best):
        return None
    scores[row, column] = -torch.inf

    # Twice the error of a product, the pair's own and its threshold's, and the ends' rounding; the
    # norms are float32 sums of squares themselves.
    rounding = 2 * (accumulation(torch.float32, dimensions) + float64_bound(dimensions)) + 2.0**-22
    rounding *= 1 + (dimensions + 16) * 2.0**-20
    underflow = dimensions * 2.0**-110
    row_error, column_error = norms[0] * (longest[1] * rounding), norms[1] * (longest[0] * rounding)
    row_low, row_high = best[0] - (row_error + underflow), best[0] + (row_error + underflow)
    column_low, column_high = (
        best[1] - (column_error + underflow),
        best[1] + (column_error + underflow),
    )
    counts = Counts.zeros(speech, image, FP32.name)
    # torch compares several times as fast when the output has the inputs' dtype.
    above = torch.gt(scores, row_high[:, None], out=torch.empty_like(scores))
    counts.speech_greater += above.sum(1).long()
    doubtful = torch.ge(scores, row_low[:, None], out=torch.empty_like(scores)).sub_(above)
    torch.gt(scores, column_high, out=above)
    counts.image_greater += above.sum(0).long()
    doubtful -= above
    doubtful += torch.ge(scores, column_low, out=above)
    i, j = doubtful.nonzero(as_tuple=True)
    if len(i) > DOUBTFUL_LIMIT * scores.numel() + 64:
        return None
    if len(i) > 0:
        in_row, in_column = (x.new_zeros(len(x), dtype=torch.bool) for x in norms)
        in_row[i] = in_column[j] = True
        needed = (in_row[row] | in_column[column]).nonzero()[:, 0]
        row, column = row[needed], column[needed]
        defined = pair_scores(speech, image, torch.cat([row, i]), torch.cat([column, j]))
        positive, wrong = defined.split([len(row), len(i)])
        by_row, by_column = (torch.full_like(x, -torch.inf, dtype=torch.float64) for x in norms)
        by_row = by_row.scatter_reduce_(0, row, positive, "amax")[i]
        by_column = by_column.scatter_reduce_(0, column, positive, "amax")[j]
        # The product's verdict on these pairs is in the counts already: replace it.
        product = scores[i, j]
        was_above, was_above_column = product > row_high[i], product > column_high[j]
        counts.speech_greater.index_add_(0, i, (wrong > by_row).long() - was_above.long())
        counts.speech_equal.index_add_(0, i, (wrong == by_row).long())
        counts.image_greater.index_add_(0, j, (wrong > by_column).long() - was_above_column.long())
        counts.image_equal.index_add_(0, j, (wrong == by_column).long())
    return counts
