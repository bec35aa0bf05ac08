"""The score that defines a retrieval rank, and exact counting with it.

The score of a pair is its float64 dot product with the products added in the order of the
dimensions. Elementwise operations alone compute it, so its bits depend on the two rows and on
nothing else: not on the tile, the device, or the number of threads. (A library's matrix product
gives other low bits for other tile shapes, and then equal vectors no longer tie.) Products of two
float32 numbers are exact in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PATHS = (  # each device's fastest first
    *("cpu-int8", "cpu-bf16", "cpu-fp32"),
    *("triton-int8", "triton-fp16", "triton-bf16", "triton-fp32"),
    *("exact", "reference"),
)
PAIRS_AT_ONCE = 65536
PAIRS_IN_CACHE = 256
TILE = 512  # rows and columns of an exact tile: 2 MB of float64


def positive_pairs(
    speech_image_id: Tensor, sorted_image_id: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The pairs of equal id: indices int64 [P] into ids int64 [N] and [M], caption by caption.

    sorted_image_id: what `image_id.sort()` gives, since many blocks of captions may share it.
    """
    ids, order = sorted_image_id
    first = torch.searchsorted(ids, speech_image_id)
    end = torch.searchsorted(ids, speech_image_id, right=True)
    row = torch.arange(len(first), device=ids.device)
    if torch.equal(end, first + 1):
        return row, order.index_select(0, first)
    copies = end - first
    row = row.repeat_interleave(copies)
    begin = first - (copies.cumsum(0) - copies)  # of a caption's pairs in ids, less that in row
    return row, order[begin[row] + torch.arange(len(row), device=ids.device)]


def pair_scores(speech: Tensor, image: Tensor, speech_index: Tensor, image_index: Tensor) -> Tensor:
    """The defined score float64 [P] of the pairs (speech_index [P], image_index [P])."""
    at_once = PAIRS_AT_ONCE if speech.is_cuda else PAIRS_IN_CACHE
    if len(speech_index) > at_once:
        parts = zip(speech_index.split(at_once), image_index.split(at_once), strict=True)
        return torch.cat([pair_scores(speech, image, *part) for part in parts])
    products = speech.index_select(0, speech_index).double()
    products *= image.index_select(0, image_index).double()
    if speech.is_cpu:  # where cumsum adds in order; elsewhere it is a scan
        return products.cumsum(1)[:, -1].clone()  # a view would keep all the other sums
    scores = torch.zeros_like(products[:, 0])
    for product in products.T.contiguous():  # one dimension of all pairs
        scores += product
    return scores


def tile_scores(speech: Tensor, image: Tensor) -> Tensor:
    """The defined score float64 [n, m] of every pair of speech [n, D] and image [m, D]."""
    scores = torch.zeros(len(speech), len(image), dtype=torch.float64, device=speech.device)
    product = torch.empty_like(scores)
    image = image.double().T.contiguous()  # [D, m]
    for dimension, column in enumerate(speech.double().T.contiguous()):
        scores += torch.mul(column[:, None], image[dimension], out=product)
    return scores


def float64_bound(dimensions: int) -> float:
    """Times the two norms, how far any float64 dot product can be from the defined score.

    Each of the two is within D u / (1 - D u) of the exact value, u = 2^-53, in any order of the
    sum (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); doubled once more
    for the rounding of the norms.
    """
    return 4 * (dimensions + 1) * 2.0**-53


@dataclass(frozen=True)
class Tile:
    rows: slice
    columns: slice


def tiles(n: int, m: int, height: int = TILE, width: int = TILE) -> Iterator[Tile]:
    """The tiles of an n × m matrix, row by row."""
    for top in range(0, n, height):
        for left in range(0, m, width):
            yield Tile(slice(top, min(top + height, n)), slice(left, min(left + width, m)))


@dataclass
class Counts:
    """Counts of both directions, and the arithmetic that each caption took, int64."""

    speech_greater: Tensor  # [N]
    speech_equal: Tensor  # [N]
    image_greater: Tensor  # [M]
    image_equal: Tensor  # [M]
    arithmetic: Tensor  # [N], index in PATHS

    @classmethod
    def zeros(cls, speech: Tensor, image: Tensor, path: str) -> Counts:
        def zeros(rows: Tensor) -> Tensor:
            return torch.zeros(len(rows), dtype=torch.int64, device=rows.device)

        arithmetic = zeros(speech) + PATHS.index(path)
        return cls(zeros(speech), zeros(speech), zeros(image), zeros(image), arithmetic)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The counts and the arithmetic, in the order of the fields."""
        speech, image = (
            (self.speech_greater, self.speech_equal),
            (self.image_greater, self.image_equal),
        )
        return *speech, *image, self.arithmetic

    def add_tile(
        self,
        tile: Tile,
        scores: Tensor,
        speech_image_id: Tensor,
        image_id: Tensor,
        speech_threshold: Tensor,
        image_threshold: Tensor,
    ) -> None:
        """Count a tile of scores, float64 [n, m]; its positives are overwritten."""
        rows, columns = tile.rows, tile.columns
        scores[positive_pairs(speech_image_id[rows], image_id[columns].sort())] = -torch.inf
        by_row, by_column = speech_threshold[rows, None], image_threshold[columns]
        self.speech_greater[rows] += (scores > by_row).sum(1)
        self.speech_equal[rows] += (scores == by_row).sum(1)
        self.image_greater[columns] += (scores > by_column).sum(0)
        self.image_equal[columns] += (scores == by_column).sum(0)

    def add_part(self, part: Counts, rows: Tensor, columns: slice = slice(None)) -> None:
        """Add what was counted for the captions `rows` [n] and the images `columns`."""
        self.arithmetic[rows] = part.arithmetic
        self.speech_greater[rows] += part.speech_greater
        self.speech_equal[rows] += part.speech_equal
        self.image_greater[columns] += part.image_greater
        self.image_equal[columns] += part.image_equal


def count_exact(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    speech_threshold: Tensor,
    image_threshold: Tensor,
    pair_scores: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = pair_scores,
) -> Counts:
    """Float64 matrix products, with the defined score wherever their rounding could decide."""
    counts = Counts.zeros(speech, image, "exact")
    speech_norm, image_norm = row_norms(speech), row_norms(image)
    bound = float64_bound(speech.shape[1])
    for tile in tiles(len(speech), len(image)):
        rows, columns = tile.rows, tile.columns
        scores = speech[rows].double() @ image[columns].double().T
        # The norms first: their product is at most that of the largest entries times D, which is
        # finite. Where one overflowed all the same, the error is infinite or NaN, and all in doubt.
        error = speech_norm[rows, None] * image_norm[columns] * bound + 2.0**-1000
        clear = (scores - speech_threshold[rows, None]).abs_() > error
        clear &= (scores - image_threshold[columns]).abs_() > error
        row, column = clear.logical_not_().nonzero(as_tuple=True)
        if len(row) > clear.numel() // 16:
            scores = tile_scores(speech[rows], image[columns])
        else:
            scores[row, column] = pair_scores(speech[rows], image[columns], row, column)
        counts.add_tile(tile, scores, speech_image_id, image_id, speech_threshold, image_threshold)
    return counts


def largest_entry(x: Tensor) -> Tensor:
    """The largest absolute value of x, float64 []; NaN if x holds one, 0 if x is empty."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    return torch.stack(x.aminmax()).abs().amax().double()


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms float64 [N] of rows [N, D], a block of rows at a time.

    Each row is divided by its largest entry first, so that no square overflows or underflows.
    """

    def norms(x: Tensor) -> Tensor:
        largest = x.abs().amax(1, keepdim=True).clamp_(min=2.0**-1074)
        return torch.linalg.vector_norm(x / largest, dim=1) * largest[:, 0]

    return torch.cat([norms(x.double()) for x in rows.split(1024)])
