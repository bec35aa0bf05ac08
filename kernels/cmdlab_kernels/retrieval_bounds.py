"""How far low-precision scores can be from the scores that define a retrieval rank.

The proof is in `kernels/README.md`. It holds for any sum of products in any order whose additions
err by at most `ADDITION` of the sum of the absolute terms, which covers processors that round to
nearest or towards zero, flush underflow to zero, or (in the 16-bit types) align a few terms before
they add them, as tensor cores do, and for integer sums, which are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmdlab_kernels.retrieval_scores import float64_bound, largest_entry

BLOCK = 4096  # rows rounded at a time on a GPU; a few hundred stay in a processor's cache
ADDITION = {torch.int8: 0.0, torch.float16: 2.0**-22, torch.bfloat16: 2.0**-22}
ADDITION[torch.float32] = 2.0**-23


@dataclass(frozen=True)
class Rounded:
    """Rows in units of `scale`, rounded to a low precision, and how far that moved them."""

    values: Tensor  # [n, D] in the low precision
    scale: float
    norm: Tensor  # [n] float64, at least the norm of row / scale
    residual: Tensor  # [n] float64, at least the norm of row / scale − values

    def __getitem__(self, rows: Tensor) -> Rounded:
        """Some of the rows, int64 [m]."""
        return Rounded(self.values[rows], self.scale, self.norm[rows], self.residual[rows])

    def times(self, power: float) -> Rounded:
        """The same rows in units of scale / power, a power of two."""
        return Rounded(
            self.values * power, self.scale / power, self.norm * power, self.residual * power
        )

    @property
    def reach(self) -> Tensor:
        """At least the norm of any row of `values`, float64 []."""
        return (self.norm + self.residual).max()


def ordinary(speech: Tensor, image: Tensor) -> bool:
    """Whether the largest entries are so far from float32's limits that no sum can overflow."""
    return all(2.0**-30 < float(largest_entry(x)) < 2.0**30 for x in (speech, image))


def int8_fits(dimensions: int) -> bool:
    """Whether no sum of `dimensions` products of int8 rows can overflow an int32."""
    return 127 * 127 * dimensions < 2**31


def round_rows(
    rows: Tensor, dtype: torch.dtype, *, multiple: int = 1, clip: bool = False
) -> Rounded:
    """Round rows [n, D] to `dtype`, with zeros up to a multiple of `multiple` dimensions.

    The unit of int8 makes the largest entry 127. With `clip` it is chosen for the least mean
    residual instead, and entries beyond are clipped: good for queries, each of which bears its own
    residual, and bad for a gallery, whose worst residual every query bears. The unit of float16
    brings the largest entry to between 1 and 2; bfloat16 and float32 need none.
    """
    n, dimensions = rows.shape
    integer = dtype == torch.int8
    scale = 1.0
    if integer:
        scale = _clipping_scale(rows) if clip else float(largest_entry(rows)) / 127
    elif dtype == torch.float16:
        scale = 2.0 ** (math.frexp(float(largest_entry(rows)))[1] - 1)
    padding = -dimensions % multiple
    same = rows.dtype == dtype and scale == 1.0 and padding == 0
    values = rows.contiguous() if same else rows.new_zeros(n, dimensions + padding, dtype=dtype)
    norm, residual = rows.new_zeros(2, n, dtype=torch.float32)
    height = BLOCK if rows.is_cuda else 240
    for start in range(0, n, height):
        block = slice(start, start + height)
        exact = rows[block].float()
        if scale != 1.0:
            exact = exact / scale
        norm[block] = torch.linalg.vector_norm(exact, dim=1)
        if not same:
            low = exact.round().clamp_(-127, 127).to(dtype) if integer else exact.to(dtype)
            values[block, :dimensions] = low
            residual[block] = torch.linalg.vector_norm(exact - low.float(), dim=1)
    # Roundings of float32: one norm, at most D + 2 of them; one entry, at most 3; and underflow.
    slack, tiny = 1 + (dimensions + 3) * 2.0**-23, dimensions * 2.0**-62
    at_least = norm.double() * slack + tiny
    return Rounded(values, scale, at_least, residual.double() * slack + at_least * 2.0**-22)


def doubtful_interval(threshold: Tensor, queries: Rounded, gallery: Rounded) -> Tensor:
    """The ends [2, n] float64, in units of both scales, of the interval of doubt of each query.

    A product above the upper end belongs to a pair above `threshold` float64 [n], one below the
    lower end to a pair below it.
    """
    dimensions = queries.values.shape[1]
    rounding = accumulation(queries.values.dtype, dimensions) + float64_bound(dimensions)
    error = (
        queries.residual * gallery.reach
        + queries.norm * gallery.residual.max()
        + (queries.norm + queries.residual) * gallery.reach * rounding
        + dimensions * 2.0**-110  # underflow
    )
    centre = threshold / queries.scale / gallery.scale
    error = error * (1 + 2.0**-20) + centre.abs() * 2.0**-48
    return torch.stack([centre - error, centre + error])


def accumulation(dtype: torch.dtype, dimensions: int) -> float:
    """Times two norms, how far a sum of products of `dtype` can be from the sum's exact value."""
    return (dimensions + 16) * ADDITION[dtype]


def float_ends(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """The ends [2, n] rounded outwards to the dtype of the product, and finite below.

    Rounding a sum to that dtype is monotone and leaves its own numbers where they are, so the
    output's rounding moves no sum across an end and needs no term in the bound.
    """
    lower, upper = ends
    return torch.stack([-_round_up(-lower, dtype), _round_up(upper, dtype)])


def integer_ends(ends: Tensor, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """The ends [2, n] for integer sums that are shifted right by `shift` bits, also monotone."""
    largest = torch.iinfo(dtype).max
    return (ends / 2.0**shift).floor().clamp(-largest, largest).to(dtype)


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = x.clamp(min=torch.finfo(dtype).min).to(dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.double() < x, above, rounded)


def _clipping_scale(rows: Tensor) -> float:
    """The unit of int8 that leaves the least residual in a sample of rows."""
    sample = rows[:: max(1, len(rows) // 64)].float()
    shares = sample.new_tensor([1, 0.85, 0.7, 0.6, 0.5, 0.4])
    scales = shares * (largest_entry(rows) / 127).float()
    residuals = [
        (sample / scale).round_().clamp_(-127, 127).mul_(scale).sub_(sample).norm()
        for scale in scales
    ]
    return float(scales[torch.stack(residuals).argmin()])
