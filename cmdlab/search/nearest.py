"""The nearest of a million vectors to one, exactly: bytes are scanned, and doubts are scored again.

Each vector is kept twice, as float32 and as int8. A scan of the int8 rows, a quarter of the bytes,
gives every score within a bound that is proven for each row; the few rows that may be among the
first k are then scored from float32. So the answer is that of the plain product, which reads all.

The bound. With x = s c + r, where s c is what the int8 row stands for, and q = p + e, where p is
the query rounded to bfloat16, q·x = p·(s c) + e·(s c) + q·r. By Cauchy–Schwarz the last two are
within ‖e‖ ‖s c‖ + ‖q‖ ‖r‖; ‖r‖ is stored with the row. The first is what the scan gives, but for
the rounding of its sum and of its result to bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMPLS = ("auto", "scan", "faiss", "reference")
MULTIPLE = 64  # of entries in a code: torch reads whole registers, past the end of a shorter row
COLUMNS = 1024  # maxima from which the scan takes its threshold
BLOCK = 1024  # rows in float64 at a time, which a processor keeps in its cache
LONGEST = 1.001  # norm of a row: 1, and rounding
ROUNDED_RESULT = 2.0**-7  # of a score: to bfloat16, perhaps twice; half of it were enough for once
WIDEST = 4096  # dimensions for which ROUNDED_SUM holds
ROUNDED_SUM = 2.0**-11  # of the norms: twice WIDEST roundings of a float32 sum, in any order
SMALLEST = 1e-30  # of a row's unit, so that nothing of it underflows


@dataclass(frozen=True)
class Gallery:
    """Vectors to search in, as `quantise` gives them.

    All arrays may be memory-mapped: copy-on-write, since torch warns of what is read-only.
    """

    vectors: NDArray[np.float32]  # [N, D], of norm 1 at most
    codes: NDArray[np.int8]  # [N, D and zeros up to a multiple of MULTIPLE]
    units: NDArray[np.float32]  # [N], exact in bfloat16
    residuals: NDArray[np.float32]  # [N], at least the norm of vector − unit × code

    @classmethod
    def of(cls, vectors: NDArray[np.float32]) -> Gallery:
        """The gallery of vectors that are in memory."""
        return cls(vectors, *quantise(vectors))

    def nearest(
        self, query: NDArray[np.float32], k: int, *, impl: str = "auto"
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The scores float64 [k] and rows int64 [k] of the k vectors nearest to a query [D].

        From the highest score down, equal scores by lower row; all N where there are fewer than k.
        A score is the dot product, added up in float64: a row's bits depend on nothing but the two
        vectors, so that equal vectors tie. impl: "scan" is the one above, which "auto" takes;
        "faiss" lets faiss find the candidates from float32; "reference" scores every row. All give
        the same. Raises ValueError for a query of another size or that is not finite, for k
        below 1, and for another impl; ImportError where faiss was asked for and is not installed.
        """
        query = np.array(query, np.float32)
        if query.shape != self.vectors.shape[1:] or not np.isfinite(query).all():
            raise ValueError(f"the query must be {self.vectors.shape[1]} finite numbers")
        if k < 1 or impl not in IMPLS:
            raise ValueError(f"k must be at least 1 and impl one of {', '.join(IMPLS)}")
        k = min(k, len(self.vectors))
        if k == 0:
            return np.zeros(0), np.zeros(0, np.int64)
        if impl == "reference":
            candidates = np.arange(len(self.vectors))
        elif impl == "faiss":
            candidates = self._by_faiss(query, k)
        else:
            candidates = self.candidates(query, k)
        scores = _scores(self.vectors, candidates, query)
        order = np.lexsort((candidates, -scores))[:k]
        return scores[order], candidates[order]

    def candidates(self, query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """Rows, ascending, among which the k ≤ N nearest to a query float32 [D] are for certain."""
        import torch

        rounded = torch.from_numpy(query).bfloat16()
        moved = float(np.linalg.norm(query.astype(np.float64) - rounded.double().numpy()))
        norm = float(np.linalg.norm(query.astype(np.float64)))
        codes, units = torch.from_numpy(self.codes), torch.from_numpy(self.units).bfloat16()
        padded = torch.nn.functional.pad(rounded, (0, codes.shape[1] - len(rounded)))
        scores = torch._weight_int8pack_mm(padded[None], codes, units)[0].float()
        reach = LONGEST + float(self.residuals.max())  # ‖s c‖ at most
        bound = torch.from_numpy(self.residuals) * (norm * (1 + 2.0**-20))
        bound += reach * (moved + ROUNDED_SUM * (norm + moved)) + 1e-30
        bound.addcmul_(scores.abs(), torch.tensor(ROUNDED_RESULT))
        # k rows are at least as high as the k-th highest of any maxima. A maximum is taken over
        # rows that lie apart, since those side by side are often much alike.
        columns = min(len(scores), max(COLUMNS, 8 * k))
        lowest = scores - bound
        maxima = lowest[: len(lowest) // columns * columns].view(-1, columns).amax(0)
        threshold = maxima.topk(k).values[-1]
        return np.flatnonzero((scores.add_(bound) >= threshold).numpy())

    def _by_faiss(self, query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """The same by float32 products: as many rows as rounding could have brought among the k."""
        import faiss

        total = len(self.vectors)
        error = ROUNDED_SUM * LONGEST * float(np.linalg.norm(query.astype(np.float64)))
        asked = min(total, k + 16)
        while True:
            found, rows = faiss.knn(
                query[None], self.vectors, asked, metric=faiss.METRIC_INNER_PRODUCT
            )
            if asked == total or found[0, -1] < found[0, k - 1] - 2 * error:
                return np.sort(rows[0])
            asked = min(total, 4 * asked)


def quantise(
    vectors: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """Codes int8 [N, D padded], units float32 [N], residuals float32 [N] of vectors float32 [N, D].

    A row's unit makes its largest entry 127, rounded up to bfloat16.
    Raises ValueError for a vector that is not finite or longer than 1, and for D over WIDEST.
    """
    dimensions = vectors.shape[1]
    if dimensions > WIDEST:
        raise ValueError(f"vectors have {dimensions} dimensions, over the limit of {WIDEST}")
    codes = np.zeros((len(vectors), padded(dimensions)), np.int8)
    units, residuals = np.empty((2, len(vectors)), np.float32)
    for start in range(0, len(vectors), BLOCK):
        rows = slice(start, start + BLOCK)
        exact = vectors[rows].astype(np.float64)
        if not (np.linalg.norm(exact, axis=1) <= LONGEST).all():  # NaN is not either
            raise ValueError("a vector is not finite, or longer than 1")
        unit = _up_to_bfloat16(np.abs(exact).max(axis=1, initial=0) / 127)
        code = np.rint(exact / unit[:, None])
        codes[rows, :dimensions] = code
        units[rows] = unit
        residual = np.linalg.norm(exact - unit[:, None].astype(np.float64) * code, axis=1)
        residuals[rows] = residual * (1 + 2.0**-20)
    return codes, units, residuals


def padded(dimensions: int) -> int:
    """How many entries a code has, zeros at its end among them."""
    return -(-dimensions // MULTIPLE) * MULTIPLE


def _up_to_bfloat16(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The least bfloat16 numbers that are no smaller, or SMALLEST, as float32 [n]."""
    bits = np.maximum(values, SMALLEST).astype(np.float32).view(np.uint32)
    return ((bits & 0xFFFF0000) + np.uint32(0x10000)).view(np.float32)


def _scores(
    vectors: NDArray[np.float32], rows: NDArray[np.int64], query: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The defined scores [n] of some rows: each is a sum of its own, whatever stands beside it."""
    exact = query.astype(np.float64)
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    return np.concatenate([(vectors[block] * exact).sum(axis=1) for block in blocks])
