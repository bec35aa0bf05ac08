"""Finds pictures that belong into one split: nearly the same ones, and those of one recording."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# In standard deviations. Measured on 80 scenes, 60 line drawings and discs of seven colours: a
# picture saved again as JPEG of quality 60, half as large or 10 % brighter is within 0.20 of
# itself, and no two of them within 0.34. (A dHash of 64 bits cannot tell these apart.)
NEAR = 0.25
PLAIN = 2.0  # levels of 255: a deviation below this is a codec's noise in what is one colour
STEPS = 32  # of the hash to a standard deviation


def perceptual_hash(picture: Image.Image) -> bytes:
    """The means of 8 × 8 areas of an RGB picture, standardised, in steps of 1/32: 192 bytes.

    Standardised over areas and colours together, so that brightness and contrast do not count, and
    a red and a green apple are two pictures.
    """
    means = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), np.float64)
    means -= means.mean()
    steps = means / max(means.std(), PLAIN) * STEPS
    return np.clip(steps.round(), -127, 127).astype(np.int8).tobytes()


def group_near_duplicates(hashes: Sequence[bytes]) -> NDArray[np.int64]:
    """The group of each picture, 0 to G - 1: int64 [N]; two within NEAR are of one group.

    Their distance is the root of the mean squared difference of their hashes, over STEPS.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    unique, which = np.unique(
        np.frombuffer(b"".join(hashes), np.int8).reshape(len(hashes), -1),
        axis=0,
        return_inverse=True,
    )
    points = unique.astype(np.float32)  # sums of 192 products are whole and below 2**24: exact
    half = np.square(points).sum(axis=1) / 2 - (NEAR * STEPS) ** 2 * points.shape[1] / 4
    rows, columns = [], []
    step = max(1, (1 << 24) // len(points))  # 64 MiB at a time
    for start in range(0, len(points), step):
        products = points[start : start + step] @ points[start:].T
        row, column = np.nonzero(products >= half[start : start + step, None] + half[start:])
        rows.append(row + start)
        columns.append(column + start)
    row, column = np.concatenate(rows), np.concatenate(columns)
    near = coo_array((np.ones(len(row), bool), (row, column)), shape=(len(points),) * 2)
    return connected_components(near, directed=False)[1][which].astype(np.int64)


def join_groups(groups: NDArray[np.int64], shared: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Groups [N] as they are once the pictures of each `shared` list (their indices) are of one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = [(groups[one], groups[other]) for one, *others in shared for other in others]
    row, column = np.array(links, np.int64).reshape(-1, 2).T
    size = int(groups.max()) + 1
    joined = coo_array((np.ones(len(row), bool), (row, column)), shape=(size, size))
    return connected_components(joined, directed=False)[1][groups].astype(np.int64)
