"""Certified retrieval ranks on the CPU by float32 products, which are compared as they are.

A line is a row of a block of scores or a column of it, and has an interval in which rounding could
decide. What lies above its low end and above its high end is counted; where the two counts differ
the line has a pair in doubt, and only such lines are searched. Few pairs are one block, off which
the thresholds too are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cmdlab_kernels import retrieval_tiles_cpu
from cmdlab_kernels.retrieval_bounds import Rounded, doubtful_interval, float_ends, round_rows
from cmdlab_kernels.retrieval_scores import (
    PATHS,
    Counts,
    count_exact,
    float64_bound,
    pair_scores,
    positive_pairs,
    tiles,
)

PATH = "cpu-fp32"
PAIRS = 2**20  # up to which one product serves even where others are faster
BLOCK = 2**23  # scores of one product, 32 MiB
WIDTH = 2**13  # columns of it at most, so that it has rows enough to be a fast one
COMPARED = 2**19  # scores at once: they and twice as many verdicts stay near the processor
DOUBTFUL_LIMIT = 0.01  # of few pairs
CROWDED_LIMIT = 0.03  # of a row of a block, beyond which a float64 product is the faster


def count_float32(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    speech_threshold: Tensor,
    image_threshold: Tensor,
) -> Counts:
    """The counts, block by block; a row of a block with much in doubt is counted by `count_exact`.

    Arguments as for `count_reference`, of ordinary size (`retrieval_bounds.ordinary`).
    """
    counts = Counts.zeros(speech, image, PATH)
    left, right = (round_rows(x, torch.float32) for x in (speech, image))
    speech_ends = _ends(speech_threshold, left, right)
    image_ends = _ends(image_threshold, right, left)
    n, m = len(speech), len(image)
    width = min(m, WIDTH)
    height = min(n, max(1, BLOCK // width))
    memory = left.values.new_empty(height * width)
    for block in tiles(n, m, height, width):
        rows, columns = block.rows, block.columns
        captions, caption_ids = speech[rows], speech_image_id[rows]
        images, image_ids = image[columns], image_id[columns]
        h, w = len(captions), len(images)
        scores = memory[: h * w].view(h, w)
        with plain_float32():
            torch.mm(left.values[rows], right.values[columns].T, out=scores)
        scores[positive_pairs(caption_ids, image_ids.sort())] = -torch.inf
        ends = torch.cat([speech_ends[:, rows], image_ends[:, columns]], 1)
        greater, above_low = _count_above(scores, ends)
        crowded = ((above_low - greater)[:h] > CROWDED_LIMIT * w).nonzero()[:, 0]
        if len(crowded) > 0:
            place = rows.start + crowded
            some = captions[crowded], images, caption_ids[crowded], image_ids
            part = count_exact(*some, speech_threshold[place], image_threshold[columns])
            counts.add_part(part, place, columns)
            scores[crowded] = -torch.inf
            greater, above_low = _count_above(scores, ends)
        equal = torch.zeros_like(greater)
        lines = (above_low > greater).nonzero()[:, 0]
        if len(lines) > 0:
            line, row, column = _between(scores, ends, lines)
            defined = pair_scores(captions, images, row, column)
            threshold = torch.cat([speech_threshold[rows], image_threshold[columns]])[line]
            greater.index_add_(0, line, (defined > threshold).long())
            equal.index_add_(0, line, (defined == threshold).long())
        counts.speech_greater[rows] += greater[:h]
        counts.speech_equal[rows] += equal[:h]
        counts.image_greater[columns] += greater[h:]
        counts.image_equal[columns] += equal[h:]
    return counts


def _ends(threshold: Tensor, queries: Rounded, gallery: Rounded) -> Tensor:
    """High and low float32 [2, n]: in doubt is what is above the low end and not above the high."""
    low, high = float_ends(doubtful_interval(threshold, queries, gallery), torch.float32)
    return torch.stack([high, torch.nextafter(low, torch.full_like(low, -torch.inf))])


def count_small(
    speech: Tensor, image: Tensor, speech_image_id: Tensor, image_id: Tensor
) -> Counts | None:
    """The counts by one product and few other calls, or None where this is not the way.

    It is not for many pairs or many in doubt, for float64, for rows near float32's limits, and
    where a positive is lacking. Defined scores are computed only for pairs in doubt, and for the
    positives that may be the best of their lines. Arguments as for `retrieval_ranks`.
    """
    n, m, dimensions = len(speech), len(image), speech.shape[1]
    if speech.dtype == torch.float64 or not _few(n * m):
        return None
    left, right = speech.float(), image.float()
    norms = [torch.linalg.vector_norm(x, dim=1) for x in (left, right)]
    squares_underflow = dimensions * 2.0**-62
    longest = [float(x.max()) + squares_underflow for x in norms]
    if not all(2.0**-20 < x < 2.0**30 for x in longest):  # NaN is not
        return None
    with plain_float32():
        scores = left @ right.T  # [N, M]

    # A line is a row of scores or a column: N captions, then M images. Each positive is in two.
    row, column = positive_pairs(speech_image_id, image_id.sort())
    flat, place = scores.view(-1), row * m + column
    positive = flat.index_select(0, place)
    flat.index_fill_(0, place, -torch.inf)
    lines = torch.cat([row, column + n]), torch.cat([positive, positive])
    best = scores.new_full((n + m,), -torch.inf).scatter_reduce_(0, *lines, "amax")
    if float(best.min()) == -torch.inf:
        return None

    # Twice the error of a product, the pair's own and its threshold's, and the ends' rounding; the
    # norms are float32 sums of squares themselves. A processor rounds to nearest.
    rounding = 2 * ((dimensions + 16) * 2.0**-24 + float64_bound(dimensions)) + 2.0**-22
    rounding *= 1 + (dimensions + 16) * 2.0**-20
    error = torch.cat([norms[0] * (longest[1] * rounding), norms[1] * (longest[0] * rounding)])
    error += max(longest) * squares_underflow * rounding + dimensions * 2.0**-110  # underflow
    ends = torch.stack([best + error, best - error])
    greater, above_low = _count_above(scores, ends)
    equal = torch.zeros_like(greater)
    between = above_low - greater
    doubtful = int(between.sum())
    if doubtful > DOUBTFUL_LIMIT * scores.numel() + 64:
        return None
    if doubtful > 0:
        flat.index_copy_(0, place, positive)  # those between the ends too may be their line's best
        line, row, column = _between(scores, ends, between.nonzero()[:, 0])
        defined = pair_scores(speech, image, row, column)
        wrong = speech_image_id[row] != image_id[column]
        threshold = torch.full_like(best, -torch.inf, dtype=torch.float64)
        threshold.scatter_reduce_(0, line, defined.masked_fill(wrong, -torch.inf), "amax")
        threshold = threshold[line]
        greater.index_add_(0, line, (wrong & (defined > threshold)).long())
        equal.index_add_(0, line, (wrong & (defined == threshold)).long())
    arithmetic = torch.full_like(speech_image_id, PATHS.index(PATH))
    return Counts(greater[:n], equal[:n], greater[n:], equal[n:], arithmetic)


def _few(pairs: int) -> bool:
    if pairs <= PAIRS:
        return True
    only_float32 = retrieval_tiles_cpu.fast_dtypes() == (torch.float32,)
    return only_float32 and pairs <= BLOCK


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


def _between(scores: Tensor, ends: Tensor, lines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Line, row and column, int64 [P], of what lies between the ends of some lines, ascending."""
    n = len(scores)
    high, low = ends.index_select(1, lines).unsqueeze(2)
    of_rows = int((lines < n).sum())
    first, second = lines[:of_rows], lines[of_rows:] - n
    some = scores.index_select(0, first)
    by_row, column = ((some > low[:of_rows]) & (some <= high[:of_rows])).nonzero(as_tuple=True)
    some = scores.T[second]
    by_column, row = ((some > low[of_rows:]) & (some <= high[of_rows:])).nonzero(as_tuple=True)
    line = lines[torch.cat([by_row, by_column + of_rows])]
    return line, torch.cat([first[by_row], row]), torch.cat([column, second[by_column]])


@contextmanager
def plain_float32() -> Iterator[None]:
    """Float32 products in float32, whatever torch.set_float32_matmul_precision says."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
