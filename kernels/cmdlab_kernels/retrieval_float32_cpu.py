"""Certified retrieval ranks on the CPU by float32 products, which are compared as they are.

A line is a row of a block of scores or a column of it, and has an interval in which rounding could
decide. What lies above its low end and above its high end is counted; where the two counts differ
the line has a pair in doubt, and only such lines are searched. Few pairs are one block, off which
the thresholds too are read.

What there is one of for each line or each pair in doubt is numpy's: beside a small product each
call counts, and numpy's cost less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

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
BLOCK = 2**23  # scores of one product, 32 MiB
PAIRS = BLOCK  # up to which one product serves, even where others are faster
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
        ends = torch.cat([speech_ends[:, rows], image_ends[:, columns]], 1).numpy()
        greater, above_low = _count_above(scores, ends)
        crowded = torch.from_numpy(((above_low - greater)[:h] > CROWDED_LIMIT * w).nonzero()[0])
        if len(crowded) > 0:
            place = rows.start + crowded
            some = captions[crowded], images, caption_ids[crowded], image_ids
            part = count_exact(*some, speech_threshold[place], image_threshold[columns])
            counts.add_part(part, place, columns)
            scores[crowded] = -torch.inf
            greater, above_low = _count_above(scores, ends)
        equal = np.zeros_like(greater)
        lines = (above_low > greater).nonzero()[0]
        if len(lines) > 0:
            line, row, column = _between(scores.numpy(), ends, lines)
            defined = pair_scores(captions, images, *map(torch.from_numpy, (row, column))).numpy()
            threshold = torch.cat([speech_threshold[rows], image_threshold[columns]]).numpy()[line]
            greater += np.bincount(line[defined > threshold], minlength=h + w)
            equal += np.bincount(line[defined == threshold], minlength=h + w)
        above, same = map(torch.from_numpy, (greater, equal))
        counts.speech_greater[rows] += above[:h]
        counts.speech_equal[rows] += same[:h]
        counts.image_greater[columns] += above[h:]
        counts.image_equal[columns] += same[h:]
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
    if speech.dtype == torch.float64 or n * m > PAIRS:
        return None
    left, right = speech.float(), image.float()
    norms = [torch.linalg.vector_norm(x, dim=1).numpy() for x in (left, right)]
    squares_underflow = dimensions * 2.0**-62
    longest = [float(x.max()) + squares_underflow for x in norms]
    if not all(2.0**-20 < x < 2.0**30 for x in longest):  # NaN is not
        return None
    with plain_float32():
        product = left @ right.T
    scores = product.numpy()  # [N, M], the same memory

    # A line is a row of scores or a column: N captions, then M images. Each positive is in two.
    caption_id, id_of_image = speech_image_id.numpy(), image_id.numpy()
    own = _own_pairs(caption_id, id_of_image)
    positive = scores[own]
    scores[own] = -np.inf
    best = np.full(n + m, -np.inf, np.float32)
    np.maximum.at(best[:n], own[0], positive)
    np.maximum.at(best[n:], own[1], positive)
    if best.min() == -np.inf:
        return None

    # Twice the error of a product, the pair's own and its threshold's, and the ends' rounding; the
    # norms are float32 sums of squares themselves. A processor rounds to nearest.
    rounding = 2 * ((dimensions + 16) * 2.0**-24 + float64_bound(dimensions)) + 2.0**-22
    rounding *= 1 + (dimensions + 16) * 2.0**-20
    underflow = max(longest) * squares_underflow * rounding + dimensions * 2.0**-110
    error = np.concatenate([norms[0] * (longest[1] * rounding), norms[1] * (longest[0] * rounding)])
    error += np.float32(underflow)
    ends = np.stack([best + error, best - error])
    greater, above_low = _count_above(product, ends)
    equal = np.zeros_like(greater)
    between = above_low - greater
    doubtful = int(between.sum())
    if doubtful > DOUBTFUL_LIMIT * scores.size + 64:
        return None
    if doubtful > 0:
        scores[own] = positive  # those between the ends too may be their line's best
        line, row, column = _between(scores, ends, between.nonzero()[0])
        defined = pair_scores(speech, image, *map(torch.from_numpy, (row, column))).numpy()
        wrong = caption_id[row] != id_of_image[column]
        threshold = np.full(n + m, -np.inf)
        np.maximum.at(threshold, line[~wrong], defined[~wrong])
        threshold = threshold[line]
        greater += np.bincount(line[wrong & (defined > threshold)], minlength=n + m)
        equal += np.bincount(line[wrong & (defined == threshold)], minlength=n + m)
    arithmetic = np.full(n, PATHS.index(PATH))
    found = greater[:n], equal[:n], greater[n:], equal[n:], arithmetic
    return Counts(*map(torch.from_numpy, found))


def _own_pairs(speech_image_id: np.ndarray, image_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`positive_pairs`, in cheaper calls where no two images have one id."""
    order = image_id.argsort()
    ids = image_id[order]
    column = order.take(ids.searchsorted(speech_image_id), mode="clip")
    if (image_id[column] == speech_image_id).all() and (ids[1:] != ids[:-1]).all():
        return np.arange(len(column)), column
    captions, images = map(torch.from_numpy, (speech_image_id, image_id))
    row, several = positive_pairs(captions, images.sort())
    return row.numpy(), several.numpy()


def _count_above(scores: Tensor, ends: np.ndarray) -> np.ndarray:
    """How many scores of each line are above its ends, which are high and low: int64 [2, N + M].

    A few rows of scores [N, M] at a time are compared with the ends of both directions. The
    verdicts are in the scores' dtype: torch compares several times as fast when the output has the
    inputs' dtype, and the sums are exact.
    """
    n, m = scores.shape
    height = min(n, max(1, COMPARED // m))
    of_rows, of_columns = map(torch.from_numpy, (ends[:, :n, None], ends[:, None, n:]))
    memory = scores.new_empty(2, height, m)
    above = np.zeros((2, n + m), np.int64)
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        tile, verdicts = scores[rows], memory[:, : rows.stop - start]
        above[:, rows] = torch.gt(tile, of_rows[:, rows], out=verdicts).sum(2).numpy()
        above[:, n:] += torch.gt(tile, of_columns, out=verdicts).sum(1).numpy().astype(np.int64)
    return above


def _between(
    scores: np.ndarray, ends: np.ndarray, lines: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Line, row and column, int64 [P], of what lies between the ends of some lines, ascending."""
    n = len(scores)
    of_rows = int(lines.searchsorted(n))
    first, second = lines[:of_rows], lines[of_rows:] - n
    high, low = ends[:, lines, None]

    def inside(some: np.ndarray, lines: slice) -> tuple[np.ndarray, np.ndarray]:
        found = some > low[lines]
        found &= some <= high[lines]
        return np.divmod(found.ravel().nonzero()[0], some.shape[1])

    by_row, column = inside(scores[first], slice(of_rows))
    by_column, row = inside(scores.T[second], slice(of_rows, None))
    line = lines[np.concatenate([by_row, by_column + of_rows])]
    return line, np.concatenate([first[by_row], row]), np.concatenate([column, second[by_column]])


@contextmanager
def plain_float32() -> Iterator[None]:
    """Float32 products in float32, whatever torch.set_float32_matmul_precision says."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if before in ("none", "ieee"):  # as torch has it, unless told otherwise
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
