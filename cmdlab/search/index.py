"""An index of a folder of pictures: their vectors, paths and contents, memory-mapped to search.

An index is a folder. `index.json` says which model made it, where the pictures are, and which
generation of the arrays counts; it is renamed into place last, so that a reader finds the old ones
or the new ones, whole. Row i of every array is the i-th picture, by the bytes of its path.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmdlab.errors import InputError
from cmdlab.search.nearest import Gallery

FORMAT = "cmdlab index 1"
MANIFEST = "index.json"
ARRAYS = {  # of N pictures; D dimensions; B bytes, all paths one after the other
    "vectors": (np.float32, 2),  # [N, D], of norm 1
    "codes": (np.int8, 2),  # [N, D padded], units and residuals: see nearest.py
    "units": (np.float32, 1),
    "residuals": (np.float32, 1),
    "hashes": (np.uint8, 2),  # [N, 32], SHA-256 of the file
    "times": (np.int64, 2),  # [N, 2]: size in bytes, time of change in ns
    "paths": (np.uint8, 1),  # [B]
    "ends": (np.int64, 1),  # [N], of each path in them
}


@dataclass(frozen=True)
class Unreadable:
    """A picture that could not be embedded; it is tried again once it has changed."""

    path: str
    size: int
    changed: int  # ctime in ns: mended rights count as a change too
    reason: str


@dataclass(frozen=True)
class Match:
    """A picture that was found. `score` is the dot product of the two vectors."""

    rank: int  # from 1
    score: float
    row: int
    path: str  # below the folder of pictures


class Index:
    """An index that lies in `folder`. Raises InputError where there is none, or a damaged one.

    Paths are text as the system gives it: bytes that are no UTF-8 are surrogates in it, and
    `os.fsencode` gives them back.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            with (self.folder / MANIFEST).open(encoding="utf-8") as file:
                manifest = json.load(file)
            if manifest["format"] != FORMAT:
                raise ValueError(f"it is of format {manifest['format']!r}, not {FORMAT!r}")
            self.model, self.identity = str(manifest["model"]), str(manifest["identity"])
            self.dimension = int(manifest["dimension"])
            pictures = os.path.join(os.path.realpath(self.folder), str(manifest["pictures"]))
            self.pictures = Path(os.path.normpath(pictures))
            self.unreadable = [Unreadable(**one) for one in manifest["unreadable"]]
            self.generation = str(manifest["generation"])
            if not self.generation.isalnum():
                raise ValueError("its generation is no name")
            self._arrays = {
                name: _load(self.folder / self.generation / f"{name}.npy", dtype, dimensions)
                for name, (dtype, dimensions) in ARRAYS.items()
            }
            self._check_shapes()
        except FileNotFoundError as error:
            raise InputError(
                f"{self.folder}: holds no index, or not all of it; make it by `cmdlab index`"
            ) from error
        except (OSError, ValueError, TypeError, KeyError, EOFError, RecursionError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(
                f"{self.folder}: is no index, or a damaged one ({reason}); remove it and make it "
                "again by `cmdlab index`"
            ) from error
        self.gallery = Gallery(
            *(self._arrays[name] for name in ("vectors", "codes", "units", "residuals"))
        )

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """[N, D], of unit norm."""
        return self._arrays["vectors"]

    @property
    def hashes(self) -> NDArray[np.uint8]:
        """[N, 32], the SHA-256 of each file."""
        return self._arrays["hashes"]

    @property
    def times(self) -> NDArray[np.int64]:
        """[N, 2], each file's size in bytes and time of change in ns."""
        return self._arrays["times"]

    def path(self, row: int) -> str:
        """A picture's path below the folder of pictures. Raises InputError where it leaves that."""
        ends = self._arrays["ends"]
        start = int(ends[row - 1]) if row else 0
        path = os.fsdecode(self._arrays["paths"][start : int(ends[row])].tobytes())
        if not path or path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise InputError(
                f"{self.folder}: the path {path!r} leaves the folder of pictures; remove the index "
                "and make it again"
            )
        return path

    def nearest(self, vector: NDArray[np.float32], k: int) -> list[Match]:
        """The k pictures nearest to a vector [D], from the first rank on; equal scores by path."""
        scores, rows = self.gallery.nearest(vector, k)
        return [
            Match(rank, float(score), int(row), self.path(int(row)))
            for rank, (score, row) in enumerate(zip(scores, rows, strict=True), 1)
        ]

    def _check_shapes(self) -> None:
        arrays = self._arrays
        n = len(arrays["vectors"])
        ends = arrays["ends"]
        lengths = {len(array) for name, array in arrays.items() if name != "paths"}
        if (
            lengths != {n}
            or arrays["vectors"].shape[1] != self.dimension
            or arrays["codes"].shape[1] < self.dimension
            or (arrays["hashes"].shape[1], arrays["times"].shape[1]) != (32, 2)
            or (np.diff(ends, prepend=0) <= 0).any()
            or len(arrays["paths"]) != (ends[-1] if n else 0)
        ):
            raise ValueError("its arrays do not fit each other")


def _load(path: Path, dtype: Any, dimensions: int) -> NDArray[Any]:
    array = np.load(path, mmap_mode="c", allow_pickle=False)  # torch warns of read-only arrays
    if array.dtype != dtype or array.ndim != dimensions or not array.flags.c_contiguous:
        raise ValueError(f"{path.name} is of another kind")
    return array
