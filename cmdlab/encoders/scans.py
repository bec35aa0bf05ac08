"""A range finder's scan as tokens, in the place of speech: a sensor for the same heads."""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from cmdlab.corpora import RAY, RAYS
from cmdlab.encoders.encoder import Description
from cmdlab.encoders.tiny import LICENCE, WIDTH
from cmdlab.errors import InputError

BINS = 40  # of a ray's echo
RANGE_SCANS = f"range scans of {RAYS} rays"  # what it takes


class ScanEncoder(nn.Module):
    """A ray a token: its echo's loudness by delay, projected at random, and its direction.

    The direction is told by sinusoids of 1 to 8 turns around the circle. Nothing was trained.
    """

    description = Description("tiny-scan", "speech", 1, WIDTH, 0, RANGE_SCANS, LICENCE)
    projection: Tensor
    directions: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("projection", torch.randn(BINS, WIDTH, generator=generator))
        angle = 2 * torch.pi * torch.arange(RAYS)[:, None] / RAYS * torch.arange(1, 9)
        turns = torch.cat((angle.sin(), angle.cos()), 1)
        mixing = torch.randn(turns.shape[1], WIDTH, generator=generator)
        self.register_buffer("directions", layer_norm(turns @ mixing, (WIDTH,)))

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """waveform: float32 [batch, 96 · 160]; lengths: int64 [batch], all the same.

        Returns states [batch, 1, 96, 128] and the number of tokens, int64 [batch].
        """
        echoes = waveform.unflatten(1, (RAYS, BINS, RAY // BINS)).abs().amax(3)
        heard = 2 * (echoes - 0.02).clamp(min=0) @ self.projection  # 0.02 is above the noise
        return (heard + self.directions)[:, None], torch.full_like(lengths, RAYS)


def open_scans(name: str, weights: str) -> nn.Module:
    """The encoder. Raises InputError for weights, of which it has none."""
    if weights:
        raise InputError(f"{weights}: {name} has no weights; leave speech_weights empty")
    return ScanEncoder()


def untrained(name: str) -> nn.Module:
    """The same: it was never trained."""
    return ScanEncoder()
