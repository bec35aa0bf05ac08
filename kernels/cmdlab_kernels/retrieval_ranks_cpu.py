"""Certified retrieval ranks on the CPU: low-precision scores, a rigorous bound, few recomputed.

Each caption takes the fastest of int8, bfloat16 and float32 that is expected to leave few of its
scores in doubt; `retrieval_float32_cpu.py` has float32. A tile of int8 or bfloat16 scores is made
by a matrix product; row by row and column by column it is compared with the two ends of the
interval in which the rounding could decide, and what lies between them is scored again. The proof
of the bound is in `kernels/README.md`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cmdlab_kernels import retrieval_tiles_cpu
from cmdlab_kernels.retrieval_bounds import (
    Rounded,
    accumulation,
    doubtful_interval,
    int8_fits,
    ordinary,
)
from cmdlab_kernels.retrieval_float32_cpu import count_float32, plain_float32
from cmdlab_kernels.retrieval_scores import (
    Counts,
    count_exact,
    float64_bound,
    pair_scores,
    positive_pairs,
)
from cmdlab_kernels.retrieval_tiles_cpu import BF16, INT8, Precision, Tiles

SAMPLED = 64  # images from which the spread of a caption's scores is estimated
SURPRISE = 4  # times the share expected at most, on the average of all captions, is too much


def precisions(dimensions: int) -> list[Precision]:
    """What this processor multiplies faster than float32, fastest first.

    int8 only where no sum can overflow.
    """
    fast = retrieval_tiles_cpu.fast_dtypes()
    return [
        precision
        for precision in (INT8, BF16)
        if precision.dtype in fast and (precision != INT8 or int8_fits(dimensions))
    ]


def count_certified(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    speech_threshold: Tensor,
    image_threshold: Tensor,
) -> Counts:
    """The counts, each row by the fastest precision that is expected to leave few pairs in doubt.

    Arguments as for `count_reference`: speech [N, D], image [M, D], ids int64 [N] and [M],
    thresholds float64 [N] and [M].
    """
    if not ordinary(speech, image):
        ids = speech_image_id, image_id
        return count_exact(speech, image, *ids, speech_threshold, image_threshold)
    counts = Counts.zeros(speech, image, "exact")
    rows = torch.arange(len(speech), device="cpu")  # those that no precision has taken yet
    with plain_float32():
        tried = precisions(speech.shape[1])
        if tried:
            expected = _expectation(speech, image)
        for precision in tried:
            left = speech if len(rows) == len(speech) else speech[rows]
            low_speech = precision.round(left, clip=True)
            low_image = precision.round(image, clip=False)
            ends = doubtful_interval(speech_threshold[rows], low_speech, low_image)
            doubt = expected.share_within(rows, ends * (low_speech.scale * low_image.scale))
            cheap = doubt <= precision.doubtful_limit
            if int(cheap.sum()) * 8 < len(rows):  # a pass for so few is not worth its beginning
                continue
            low_speech, chosen = low_speech[cheap], rows[cheap]
            ids = speech_image_id[chosen], image_id
            thresholds = speech_threshold[chosen], image_threshold
            part, handed_on = _count(
                precision, speech, image, chosen, low_speech, low_image, *ids, *thresholds
            )
            counts.add_part(part, chosen)
            left_over = ~cheap
            left_over[cheap] = handed_on
            rows = rows[left_over]
            if len(rows) == 0:
                return counts
    left = speech if len(rows) == len(speech) else speech[rows]
    ids, thresholds = (speech_image_id[rows], image_id), (speech_threshold[rows], image_threshold)
    counts.add_part(count_float32(left, image, *ids, *thresholds), rows)
    return counts


@dataclass(frozen=True)
class _Expectation:
    """Mean and spread of each caption's scores, from a sample of the gallery."""

    mean: Tensor  # [N]
    spread: Tensor  # [N]

    def share_within(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The share [n] of a row's scores between ends [2, n] if they were normal.

        It decides what is tried first, never what is counted.
        """
        lower, upper = torch.special.ndtr((ends - self.mean[rows]) / self.spread[rows])
        return (upper - lower).nan_to_num(0.0)


def _expectation(speech: Tensor, image: Tensor) -> _Expectation:
    sample = image[:: max(1, len(image) // SAMPLED)].float().T.contiguous()
    parts = [
        torch.std_mean(rows.float() @ sample, 1, correction=0)
        for rows in speech.split(4 * retrieval_tiles_cpu.HEIGHT)
    ]
    spread, mean = (torch.cat(values).double() for values in zip(*parts, strict=True))
    return _Expectation(mean, spread)


def _count(
    precision: Precision,
    speech: Tensor,
    image: Tensor,
    chosen: Tensor,
    low_speech: Rounded,
    low_image: Rounded,
    speech_image_id: Tensor,
    image_id: Tensor,
    speech_threshold: Tensor,
    image_threshold: Tensor,
) -> tuple[Counts, Tensor]:
    """The counts of the rows `chosen` [n] of speech, and which were handed on uncounted, bool [n].

    low_speech, speech_image_id, speech_threshold [n] and the counts are of the chosen rows. A row
    of which too much is in doubt in the first chunk of columns is handed on; where that is most
    rows, or the others' average is too much, all are. Later such a row of a tile is counted
    exactly.
    """
    n = len(chosen)
    tiles = Tiles(precision, low_speech, low_image)
    speech_ends, image_ends = tiles.ends(speech_threshold, image_threshold)
    rounding = rescoring_bound(speech)
    speech_error = low_speech.norm * (low_speech.scale * rounding)
    image_error = low_image.norm * low_image.scale
    counts = Counts.zeros(chosen, image, precision.name)
    handed_on = torch.zeros_like(chosen, dtype=torch.bool)
    seen = doubtful = 0
    for columns in _chunks(len(image)):
        tiles.take(columns)
        ends_of_columns = torch.nn.functional.pad(image_ends[:, None, columns], (0, tiles.padding))
        images, by_image = image[columns], image_threshold[columns]
        ids = image_id[columns].sort()
        for rows in _spread(n):
            ends = speech_ends[:, rows, None], ends_of_columns
            tiles.multiply(rows, positive_pairs(speech_image_id[rows], ids))
            tiles.drop(handed_on[rows].nonzero()[:, 0])
            pairs = tiles.compare(*ends)
            in_doubt = torch.bincount(pairs // tiles.shape[1], minlength=tiles.shape[0])
            crowded = (in_doubt > precision.crowded_limit * tiles.shape[1]).nonzero()[:, 0]
            may_hand_on = columns.start == 0
            if len(crowded) > 0:
                place = rows.start + crowded
                if may_hand_on:
                    handed_on[place] = True
                else:
                    part = count_exact(
                        *(speech[chosen[place]], images, speech_image_id[place], image_id[columns]),
                        *(speech_threshold[place], by_image),
                    )
                    counts.add_part(part, place, columns)
                tiles.drop(crowded)
                pairs = tiles.compare(*ends)
            if may_hand_on:
                seen += tiles.shape[0]
                doubtful += len(pairs)
                most = SURPRISE * precision.doubtful_limit * seen * tiles.shape[1]
                if doubtful > most or int(handed_on.sum()) * 2 > seen:
                    nothing = Counts.zeros(chosen, image, precision.name)
                    return nothing, torch.ones_like(handed_on)
            above_row, above_column = tiles.sums()
            counts.speech_greater[rows] += above_row
            counts.image_greater[columns] += above_column
            if len(pairs) == 0:
                continue
            row, column = pairs // tiles.shape[1], pairs % tiles.shape[1]
            by_row, by_column = speech_threshold[rows][row], by_image[column]
            error = speech_error[rows][row] * image_error[columns][column]
            scores = _sampled_products(speech.index_select(0, chosen[rows]), images, row, column)
            error += speech.shape[1] * 2.0**-110 * max(1.0, tiles.unit)  # underflow
            near = (scores - by_row).abs() <= error
            near |= (scores - by_column).abs() <= error
            close = near.nonzero()[:, 0]
            scores[close] = pair_scores(speech, images, chosen[rows][row[close]], column[close])
            # The product's verdict on these pairs is in the counts already: replace it.
            was_above_row, was_above_column = tiles.above(pairs)
            counts.speech_greater[rows].index_add_(0, row, (scores > by_row).long() - was_above_row)
            counts.speech_equal[rows].index_add_(0, row, (scores == by_row).long())
            counts.image_greater[columns].index_add_(
                0, column, (scores > by_column).long() - was_above_column
            )
            counts.image_equal[columns].index_add_(0, column, (scores == by_column).long())
    return counts, handed_on


def _chunks(m: int) -> Iterator[slice]:
    """Chunks of columns, equally wide but for the last."""
    count = -(-m // retrieval_tiles_cpu.WIDTH)
    width = -(-m // (8 * count)) * 8
    for start in range(0, m, width):
        yield slice(start, min(start + width, m))


def _spread(n: int) -> list[slice]:
    """Blocks of rows in an order whose beginning is a fair sample: by the golden ratio."""
    order = sorted(
        range(0, n, retrieval_tiles_cpu.HEIGHT),
        key=lambda start: start // retrieval_tiles_cpu.HEIGHT * 0.618034 % 1,
    )
    return [slice(start, min(start + retrieval_tiles_cpu.HEIGHT, n)) for start in order]


def rescoring_bound(speech: Tensor) -> float:
    """Times the two norms, how far a float32 or sampled product can be from the defined score."""
    dimensions = speech.shape[1]
    if speech.dtype == torch.float64:
        return float64_bound(dimensions)
    return float64_bound(dimensions) + accumulation(torch.float32, dimensions)


def _sampled_products(speech: Tensor, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Scores float64 [P] of pairs that come row by row, from products in float32 or float64."""
    wide = torch.promote_types(speech.dtype, torch.float32)
    ends = torch.bincount(row, minlength=len(speech)).cumsum(0)
    begin = torch.nn.functional.pad(ends, (1, 0))
    zeros, shape = row.new_zeros(len(row), dtype=wide), (len(speech), len(image))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
        pairs = torch.sparse_csr_tensor(begin, column, zeros, shape, device="cpu")
    sampled = torch.sparse.sampled_addmm(pairs, speech.to(wide), image.to(wide).T, beta=0.0)
    return sampled.values().double()
