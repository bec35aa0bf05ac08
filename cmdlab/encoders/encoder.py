"""What a frozen encoder says of itself, and what it makes of one item."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["images", "speech", "text"]


@dataclass(frozen=True)
class Description:
    """What others may know of an encoder, whichever it is.

    A speech encoder gives `tokens_per_second` and, in samples, the `shortest` clip that it takes;
    an image encoder the rows and columns of its patches (`grid`), which lie over the middle square
    of a picture, and where it takes squares of one size alone, their `side`.
    """

    name: str
    kind: Kind
    layers: int  # states of each token
    width: int  # of a token
    embedding: int  # dimension of the space that images and text share; 0 where it has none
    takes: str  # in words
    licence: str  # of the weights
    tokens_per_second: float | None = None
    shortest: int = 0
    grid: tuple[int, int] | None = None
    side: int | None = None  # pixels

    def patch_centres(self, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """The x of each column [columns] and the y of each row [rows] of patches, in pixels of a
        picture of that size."""
        assert self.grid is not None, f"{self.name} has no patches"
        rows, columns = self.grid
        side = min(width, height)
        x = (width - side) / 2 + (np.arange(columns) + 0.5) * side / columns
        y = (height - side) / 2 + (np.arange(rows) + 0.5) * side / rows
        return x, y


@dataclass(frozen=True)
class Encoded:
    """One item: tokens float16 [tokens, layers, width] and a unit-norm embedding float32 [D].

    An encoder without tokens or without an embedding gives an array with no elements.
    """

    tokens: np.ndarray
    embedding: np.ndarray


@dataclass(frozen=True)
class Hearing:
    """How speech is degraded before it is encoded: an SNR drawn from a range (dB), and a room."""

    snr_db: tuple[float, float] | None = (10.0, 30.0)
    reverberation: bool = True
    seed: int = 0
