"""Contextual tokens of a split, a chunk at a time, for what ranks by more than embeddings."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from cmdlab.encoders import Features
from cmdlab.retrieval.model import RetrievalModel

CHUNK = 250  # captions or images


def caption_tokens(
    model: RetrievalModel, features: Features, captions: Sequence[int], device: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens [n, T, width], their lengths int64 [n] and embeddings [n, D], on the device."""
    for first in range(0, len(captions), CHUNK):
        states, lengths = features.speech.tokens(captions[first : first + CHUNK])
        lengths = lengths.to(device)
        tokens, embeddings = model.speech_head(states.to(device), lengths)
        yield tokens, lengths, embeddings


def image_tokens(
    model: RetrievalModel, features: Features, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [n, P, width] of every image and embeddings [n, D], on the device."""
    images = range(len(features.image))
    for first in range(0, len(images), CHUNK):
        rows = images[first : first + CHUNK]
        patches = features.image.patches(rows).to(device)
        frozen = features.image.embeddings[rows.start : rows.stop].to(device)
        yield model.image_head(patches, frozen)
