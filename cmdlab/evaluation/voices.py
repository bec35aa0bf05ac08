"""Whose voice each caption of a gallery has, and whether training heard that voice."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmdlab.errors import InputError
from cmdlab.evaluation.npz import read_npz, write_npz


@dataclass(frozen=True, eq=False)
class Voices:
    """N captions, S voices.

    names [S]: text, each once. heard [S]: bool, whether any caption of the training split has it.
    of_caption [N]: int64, the voice of each caption, 0 to S - 1, in the order of the queries.

    Raises InputError for arrays that no gallery can have given.
    """

    names: np.ndarray
    heard: np.ndarray
    of_caption: np.ndarray

    def __post_init__(self) -> None:
        voices = self.names.size
        for name, kind in {"names": "U", "heard": "b", "of_caption": "i"}.items():
            array = getattr(self, name)
            if array.dtype.kind != kind or array.ndim != 1 or not array.size:
                raise InputError(f"{name} is {array.dtype} {list(array.shape)}; run the cell again")
        if self.heard.size != voices or len(set(self.names.tolist())) != voices:
            raise InputError("heard or names does not have each voice once; run the cell again")
        if self.of_caption.min() < 0 or self.of_caption.max() >= voices:
            raise InputError("of_caption holds a voice that has no name; run the cell again")

    @classmethod
    def of(cls, speakers: Sequence[str], heard: Collection[str]) -> "Voices":
        """speakers: of each caption of the gallery; heard: those of the training split."""
        names, of_caption = np.unique(np.array(speakers), return_inverse=True)
        return cls(names, np.isin(names, list(heard)), of_caption.astype(np.int64))

    def same_as(self, other: "Voices") -> bool:
        return all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("names", "heard", "of_caption")
        )

    def captions_of(self, *, heard: bool) -> np.ndarray:
        """Which captions have a voice that training heard, or did not; bool [N]."""
        return self.heard[self.of_caption] == heard

    def save(self, path: Path) -> None:
        """Write an npz file, whole or not at all."""
        write_npz(path, {"names": self.names, "heard": self.heard, "of_caption": self.of_caption})

    @classmethod
    def load(cls, path: Path) -> "Voices":
        """Read what `save` wrote, checked. Raises InputError that names the file."""
        arrays = read_npz(path, ["names", "heard", "of_caption"])
        try:
            return cls(**arrays)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
