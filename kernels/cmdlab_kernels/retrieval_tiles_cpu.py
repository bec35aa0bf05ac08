"""Tiles of scores on the CPU: multiplied, cut down to small integers, compared and counted.

Cutting down is monotone, so that a score beyond an end of its interval is never taken for one
inside. What lies in the same step as an end is in doubt. Verdicts have the type of what is
compared, which torch writes several times as fast as bool; eight or four of them are one int64, and
adding such words adds as many counts at once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmdlab_kernels.retrieval_bounds import (
    Rounded,
    doubtful_interval,
    float_ends,
    integer_ends,
    round_rows,
)

HEIGHT = 960  # rows of a tile
WIDTH = 2040  # columns of a tile: at most 255 words of 8 bytes, so that a byte can count a row
COUNTED = {1: 240, 2: HEIGHT}  # rows added at once, by bytes of a count: it holds no more


@dataclass(frozen=True)
class Precision:
    """A way to multiply matrices, and the shares of a caption's pairs in doubt up to which it pays.

    It is tried where up to `doubtful_limit` is expected, and kept where up to `crowded_limit` is
    found.
    """

    name: str
    dtype: torch.dtype
    product_dtype: torch.dtype
    compared_dtype: torch.dtype  # to which the products are cut down
    doubtful_limit: float
    crowded_limit: float

    def round(self, rows: Tensor, *, clip: bool) -> Rounded:
        multiple = 4 if self.dtype == torch.int8 else 1  # torch._int_mm is wrong for D = 1
        return round_rows(rows, self.dtype, multiple=multiple, clip=clip)


INT8 = Precision("cpu-int8", torch.int8, torch.int32, torch.int8, 0.0075, 0.12)
BF16 = Precision("cpu-bf16", torch.bfloat16, torch.bfloat16, torch.int16, 0.015, 0.24)


def fast_dtypes() -> tuple[torch.dtype, ...]:
    """The types of which this processor multiplies matrices no slower than those of float32.

    Without VNNI or AMX an int8 product is slow; without AVX-512 BF16 or AMX so is a bfloat16 one.
    """
    amx, mkldnn = torch.cpu._is_amx_tile_supported(), torch.backends.mkldnn.is_available()
    found = [torch.float32]
    if mkldnn and (amx or torch.cpu._is_avx512_bf16_supported()):
        found.append(torch.bfloat16)
    if mkldnn and (amx or torch.cpu._is_vnni_supported()) and int8_is_exact():
        found.append(torch.int8)
    return tuple(found)


@functools.cache
def int8_is_exact() -> bool:
    """Whether torch's int8 products are.

    They saturate where oneDNN, by ONEDNN_MAX_CPU_ISA, leaves alone the VNNI that torch knows of.
    """
    rows = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(rows, rows.T) == 64 * 127**2).all())


class Tiles:
    """One tile at a time of queries [n, D] × gallery [m, D], all in the same memory."""

    def __init__(self, precision: Precision, queries: Rounded, gallery: Rounded) -> None:
        self.precision = precision
        self.integer = precision.dtype == torch.int8
        self.shift = byte_shift(queries, gallery) if self.integer else 0
        if not self.integer:
            gallery = gallery.times(short_unit(queries, gallery))
        self.queries, self.gallery = queries, gallery
        self.unit = queries.scale * gallery.scale
        self.lowest = torch.iinfo(precision.compared_dtype).min  # below every interval
        height, width = min(HEIGHT, len(queries.values)), min(WIDTH, len(gallery.values))
        size = height * (-(-width // 8) * 8)
        self.memory = torch.empty(size, dtype=precision.product_dtype, device="cpu")
        self.small = torch.empty(5, size, dtype=precision.compared_dtype, device="cpu")

    def ends(self, speech_threshold: Tensor, image_threshold: Tensor) -> tuple[Tensor, Tensor]:
        """The ends [2, n] and [2, m] of the queries' and the gallery's intervals of doubt."""
        return (
            self._ends(doubtful_interval(speech_threshold, self.queries, self.gallery)),
            self._ends(doubtful_interval(image_threshold, self.gallery, self.queries)),
        )

    def _ends(self, ends: Tensor) -> Tensor:
        if not self.integer:  # converting a product cuts off its fraction
            ends = float_ends(ends, self.precision.product_dtype).double().trunc_()
        return integer_ends(ends, self.precision.compared_dtype, self.shift)

    def take(self, columns: slice) -> None:
        """Turn to these rows of the gallery."""
        self.width = columns.stop - columns.start
        self.padding = -self.width % 8  # verdicts are read in words of 8 bytes
        right = self.gallery.values[columns]
        if self.padding:
            right = torch.nn.functional.pad(right, (0, 0, 0, self.padding))
        self.right = right.T

    def multiply(self, rows: slice, positives: tuple[Tensor, Tensor]) -> None:
        """Make the tile of these queries, its positives and padding below every interval."""
        left = self.queries.values[rows]
        self.shape = len(left), self.width + self.padding
        product = self.memory[: math.prod(self.shape)].view(self.shape)
        if self.integer:
            torch._int_mm(left, self.right, out=product)
            product.bitwise_right_shift_(self.shift).clamp_(-127, 127)
        else:
            torch.mm(left, self.right, out=product)
        self.scores = self.small[4, : math.prod(self.shape)].view(self.shape)
        self.scores.copy_(product)
        self.scores[:, self.width :] = self.scores[positives] = self.lowest

    def compare(self, by_row: Tensor, by_column: Tensor) -> Tensor:
        """Positions [P] in the tile, ascending, of the pairs in doubt.

        The ends are [2, h, 1] and [2, 1, w].
        """
        self.verdicts = self.small[:4, : math.prod(self.shape)].view(4, *self.shape)
        at_least_row, above_row, at_least_column, above_column = self.verdicts
        torch.ge(self.scores, by_row[0], out=at_least_row)
        torch.gt(self.scores, by_row[1], out=above_row)
        torch.ge(self.scores, by_column[0], out=at_least_column)
        torch.gt(self.scores, by_column[1], out=above_column)
        words = self.verdicts.view(torch.int64)
        in_row, in_column = words[0].bitwise_xor_(words[1]), words[2].bitwise_xor_(words[3])
        words = in_row.bitwise_or_(in_column).flatten()
        place = words.nonzero()[:, 0]
        word, lane = self._lanes(words[place]).nonzero(as_tuple=True)
        return place[word] * (8 // self.scores.itemsize) + lane

    def drop(self, rows: Tensor) -> None:
        """Put some rows, int64, below every interval; compare again after that."""
        self.scores[rows] = self.lowest

    def sums(self) -> tuple[Tensor, Tensor]:
        """How many pairs of each row [h] and of each column [w] are above the intervals."""
        words = self.verdicts.view(torch.int64)
        by_row = self._lanes(words[1].sum(1)).sum(1)
        blocks = [
            self._lanes(block.sum(0)).flatten()
            for block in words[3].split(COUNTED[self.scores.itemsize])
        ]
        return by_row, torch.stack(blocks).sum(0)[: self.width]

    def above(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """The verdicts int8 or int16 [P] on the pairs: above the row's, the column's interval."""
        return self.verdicts[1].flatten()[pairs], self.verdicts[3].flatten()[pairs]

    def _lanes(self, words: Tensor) -> Tensor:
        """The counts [n, 8 or 4] that words int64 [n] hold, as int64."""
        lane = torch.uint8 if self.scores.itemsize == 1 else torch.int16
        return words.view(lane).view(-1, 8 // self.scores.itemsize).long()


def byte_shift(queries: Rounded, gallery: Rounded) -> int:
    """By how many bits int8 products are shifted for a byte to hold a quarter of their range.

    Scores rarely go further, and those that do are clipped, which only leaves them in doubt.
    """
    return max(0, math.ceil(math.log2(float(queries.reach * gallery.reach) / 127)) - 2)


def short_unit(queries: Rounded, gallery: Rounded) -> float:
    """The power of two by which the gallery is multiplied for int16 to hold every product."""
    return 2.0 ** math.floor(math.log2(32000 / float(queries.reach * gallery.reach)))
