"""Certified retrieval ranks on the CPU: low-precision scores, a rigorous bound, few recomputed.

Each caption takes the fastest of int8, bfloat16 and float32 that is expected to leave few of its
scores in doubt. A tile of scores is made by a matrix product; row by row and column by column it is
compared with the two ends of the interval in which the rounding could decide, and what lies between
them is scored again. The proof of the bound is in `kernels/README.md`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
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
from cmdlab_kernels.retrieval_scores import (
    Counts,
    count_exact,
    float64_bound,
    pair_scores,
    positive_pairs,
)

SAMPLED = 64  # images from which the spread of a caption's scores is estimated
HEIGHT = 960  # rows of a tile
COUNTED = 240  # rows counted at once: at most 255, so that a byte can count a column
WIDTH = 2040  # columns of a tile: at most 255 words of 8 bytes, so that a byte can count a row


@dataclass(frozen=True)
class Precision:
    """A way to multiply matrices, and the share of doubtful pairs up to which it pays."""

    name: str
    dtype: torch.dtype
    product_dtype: torch.dtype
    doubtful_limit: float

    def round(self, rows: Tensor, *, clip: bool) -> Rounded:
        multiple = 4 if self.dtype == torch.int8 else 1  # torch._int_mm is wrong for D = 1
        return round_rows(rows, self.dtype, multiple=multiple, clip=clip)

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        if self.dtype == torch.int8:
            torch._int_mm(left, right, out=out)
        else:
            torch.mm(left, right, out=out)


INT8 = Precision("cpu-int8", torch.int8, torch.int32, 0.0075)
BF16 = Precision("cpu-bf16", torch.bfloat16, torch.bfloat16, 0.015)
FP32 = Precision("cpu-fp32", torch.float32, torch.float32, 0.05)


def precisions(dimensions: int) -> list[Precision]:
    """What this processor multiplies fast, fastest first; int8 only where no sum can overflow.

    Without VNNI or AMX an int8 product is slow and may saturate; without AVX-512 BF16 or AMX a
    bfloat16 product is slower than a float32 one.
    """
    found = [FP32]
    if torch.backends.mkldnn.is_available():
        amx = torch.cpu._is_amx_tile_supported()
        if amx or torch.cpu._is_avx512_bf16_supported():
            found.insert(0, BF16)
        if (amx or torch.cpu._is_vnni_supported()) and int8_fits(dimensions):
            found.insert(0, INT8)
    return found


def count_certified(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    speech_threshold: Tensor,
    image_threshold: Tensor,
) -> Counts:
    """The counts, each row by the first precision that leaves few pairs in doubt, or else exactly.

    Arguments as for `count_reference`: speech [N, D], image [M, D], ids int64 [N] and [M],
    thresholds float64 [N] and [M]. The path is that of the most exact arithmetic used.
    """
    if not ordinary(speech, image):
        ids = speech_image_id, image_id
        return count_exact(speech, image, *ids, speech_threshold, image_threshold)
    counts = Counts.zeros(speech, image, "exact")
    rows = torch.arange(len(speech))  # those that no precision has taken yet
    with _plain_float32():
        expected = _expectation(speech, image)
        for precision in precisions(speech.shape[1]):
            left = speech if len(rows) == len(speech) else speech[rows]
            low_speech = precision.round(left, clip=True)
            low_image = precision.round(image, clip=False)
            ends = doubtful_interval(speech_threshold[rows], low_speech, low_image)
            doubt = expected.share_within(rows, ends * (low_speech.scale * low_image.scale))
            cheap = (doubt <= precision.doubtful_limit).nonzero()[:, 0]
            if len(cheap) * 8 < len(rows):  # a pass for so few is not worth its beginning
                continue
            chosen = rows[cheap]
            rounded = low_speech, low_image
            ids = speech_image_id[chosen], image_id
            thresholds = speech_threshold[chosen], image_threshold
            part = _count(precision, left, image, cheap, *rounded, *ids, *thresholds)
            if part is not None:
                counts.add_rows(chosen, part)
                rows = rows[doubt > precision.doubtful_limit]
            if len(rows) == 0:
                return counts
    ids, thresholds = (speech_image_id[rows], image_id), (speech_threshold[rows], image_threshold)
    counts.add_rows(rows, count_exact(speech[rows], image, *ids, *thresholds))
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
        torch.std_mean(rows.float() @ sample, 1, correction=0) for rows in speech.split(4 * HEIGHT)
    ]
    spread, mean = (torch.cat(values).double() for values in zip(*parts, strict=True))
    return _Expectation(mean, spread)


@contextmanager
def _plain_float32() -> Iterator[None]:
    """Float32 products in float32, whatever torch.set_float32_matmul_precision says."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
            yield
    finally:
        matmul.fp32_precision = before


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
) -> Counts | None:
    """The counts of the rows `chosen` [n] of speech, or None as soon as too many are in doubt.

    speech_image_id [n], speech_threshold [n] and the counts are of the chosen rows.
    """
    shift = byte_shift(low_speech, low_image)
    ends = (
        doubtful_interval(speech_threshold, low_speech[chosen], low_image),
        doubtful_interval(image_threshold, low_image, low_speech),
    )
    speech_ends, image_ends = (
        integer_ends(one, torch.int8, shift)
        if precision.dtype == torch.int8
        else float_ends(one, precision.dtype)
        for one in ends
    )
    rounding = rescoring_bound(speech)
    speech_error = low_speech.norm[chosen] * (low_speech.scale * rounding)
    image_error = low_image.norm * low_image.scale
    counts = Counts.zeros(chosen, image, precision.name)
    tile_memory = _TileMemory(precision, shift)
    lowest = -128 if precision.dtype == torch.int8 else -torch.inf  # below every interval
    seen = doubtful = 0
    for columns in _chunks(len(image)):
        width = columns.stop - columns.start
        padding = -width % 8  # verdicts are read in words of 8 bytes
        right = torch.nn.functional.pad(low_image.values[columns], (0, 0, 0, padding)).T
        ends_of_columns = torch.nn.functional.pad(image_ends[:, None, columns], (0, padding))
        images, by_image = image[columns], image_threshold[columns]
        ids = image_id[columns].sort()
        for rows in _spread(len(chosen)):
            scores = tile_memory.scores(low_speech.values.index_select(0, chosen[rows]), right)
            scores[:, width:] = scores[positive_pairs(speech_image_id[rows], ids)] = lowest
            verdicts = tile_memory.compare(scores, speech_ends[:, rows, None], ends_of_columns)
            words = verdicts.view(torch.int64)
            counts.speech_greater[rows] += _bytes(words[1].sum(1)).sum(1)
            for block in words[3].split(COUNTED):
                counts.image_greater[columns] += _bytes(block.sum(0)).flatten()[:width]

            in_row, in_column = words[0].bitwise_xor_(words[1]), words[2].bitwise_xor_(words[3])
            pairs = _nonzero_bytes(in_row.bitwise_or_(in_column))
            seen += scores.numel()
            doubtful += len(pairs)
            late = seen * 8 > len(chosen) * len(image)  # too late to give up for a little more
            if doubtful > precision.doubtful_limit * seen * (4 if late else 1):
                return None
            if len(pairs) == 0:
                continue
            row, column = pairs // scores.shape[1], pairs % scores.shape[1]
            by_row, by_column = speech_threshold[rows][row], by_image[column]
            error = speech_error[rows][row] * image_error[columns][column]
            queries = speech.index_select(0, chosen[rows])
            exact = _rescore(queries, images, row, column, by_row, by_column, error)
            # The product's verdict on these pairs is in the counts already: replace it.
            greater_row = (exact > by_row).long() - verdicts[1].flatten()[pairs]
            greater_column = (exact > by_column).long() - verdicts[3].flatten()[pairs]
            counts.speech_greater[rows].index_add_(0, row, greater_row)
            counts.speech_equal[rows].index_add_(0, row, (exact == by_row).long())
            counts.image_greater[columns].index_add_(0, column, greater_column)
            counts.image_equal[columns].index_add_(0, column, (exact == by_column).long())
    return counts


def byte_shift(queries: Rounded, gallery: Rounded) -> int:
    """By how many bits int8 products are shifted for a byte to hold a quarter of their range.

    Scores rarely go further, and those that do are clipped, which only leaves them in doubt.
    """
    return max(0, math.ceil(math.log2(float(queries.reach * gallery.reach) / 127)) - 2)


def _chunks(m: int) -> Iterator[slice]:
    """Chunks of columns, equally wide but for the last."""
    count = -(-m // WIDTH)
    width = -(-m // (8 * count)) * 8
    for start in range(0, m, width):
        yield slice(start, min(start + width, m))


def _spread(n: int) -> list[slice]:
    """Blocks of rows in an order whose beginning is a fair sample: by the golden ratio."""
    order = sorted(range(0, n, HEIGHT), key=lambda start: start // HEIGHT * 0.618034 % 1)
    return [slice(start, min(start + HEIGHT, n)) for start in order]


class _TileMemory:
    """The memory of one tile, used for all: a product's output and its four verdicts."""

    def __init__(self, precision: Precision, shift: int) -> None:
        self.precision = precision
        self.shift = shift
        self.product = torch.empty(HEIGHT * WIDTH, dtype=precision.product_dtype)
        self.answer = torch.empty_like(self.product)
        self.bytes = torch.empty(5, HEIGHT * WIDTH, dtype=torch.int8)

    def scores(self, left: Tensor, right: Tensor) -> Tensor:
        """left [h, D] × right [D, w]; the sums of an int8 product are cut down to int8 [h, w]."""
        shape = left.shape[0], right.shape[1]
        product = self.product[: math.prod(shape)].view(shape)
        self.precision.multiply(left, right, product)
        if product.dtype != torch.int32:
            return product
        narrow = self.bytes[4, : math.prod(shape)].view(shape)
        return narrow.copy_(product.bitwise_right_shift_(self.shift).clamp_(-127, 127))

    def compare(self, scores: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
        """Verdicts int8 [4, h, w], 1 for yes; by_row [2, h, 1], by_column [2, 1, w].

        At or above the lower end of the row's interval, above its upper end, and the same for the
        column's. torch compares ten times as fast when the output has the type of the inputs,
        hence no bool here.
        """
        verdicts = self.bytes[:4, : scores.numel()].view(4, *scores.shape)
        questions = (
            (torch.ge, by_row[0]),
            (torch.gt, by_row[1]),
            (torch.ge, by_column[0]),
            (torch.gt, by_column[1]),
        )
        for verdict, (question, end) in zip(verdicts, questions, strict=True):
            if scores.dtype == torch.int8:
                question(scores, end, out=verdict)
            else:
                answer = self.answer[: scores.numel()].view(scores.shape)
                verdict.copy_(question(scores, end, out=answer))
        return verdicts


def _bytes(words: Tensor) -> Tensor:
    """The bytes [n, 8] of words int64 [n], as int64."""
    return words.view(torch.uint8).view(-1, 8).long()


def _nonzero_bytes(words: Tensor) -> Tensor:
    """Positions [P], ascending, of the bytes of `words` that are not zero."""
    words = words.flatten()
    place = words.nonzero()[:, 0]
    word, byte = words[place].view(torch.uint8).view(-1, 8).nonzero(as_tuple=True)
    return place[word] * 8 + byte


def rescoring_bound(speech: Tensor) -> float:
    """Times the two norms, how far a sampled product can be from the defined score."""
    dimensions = speech.shape[1]
    in_float32 = speech.dtype != torch.float64
    return float64_bound(dimensions) + ((dimensions + 16) * 2.0**-22 if in_float32 else 0.0)


def _rescore(
    speech: Tensor,
    image: Tensor,
    row: Tensor,
    column: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    error: Tensor,
) -> Tensor:
    """Scores float64 [P] that compare with both thresholds as the defined scores do.

    Pairs (row, column) come row by row. A sampled product in float32 (float64 for float64 inputs)
    serves all but those within `error` [P] of a threshold, where its rounding could decide.
    """
    wide = torch.promote_types(speech.dtype, torch.float32)
    ends = torch.bincount(row, minlength=len(speech)).cumsum(0)
    begin = torch.nn.functional.pad(ends, (1, 0))
    zeros, shape = torch.zeros(len(row), dtype=wide), (len(speech), len(image))
    pairs = torch.sparse_csr_tensor(begin, column, zeros, shape)
    sampled = torch.sparse.sampled_addmm(pairs, speech.to(wide), image.to(wide).T, beta=0.0)
    scores = sampled.values().double()
    error = error + speech.shape[1] * 2.0**-120  # underflow
    near = (scores - by_row).abs() <= error
    near |= (scores - by_column).abs() <= error
    close = near.nonzero()[:, 0]
    scores[close] = pair_scores(speech, image, row[close], column[close])
    return scores
