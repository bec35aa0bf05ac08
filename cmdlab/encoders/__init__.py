"""What frozen networks see: encoders by name, and the stores of their features."""

from cmdlab.encoders.encoding import (
    IMAGE,
    SPEECH,
    TEXT,
    Hearing,
    encode,
    encoders_for,
    fingerprint,
    tiny_encoder,
)
from cmdlab.encoders.store import Features, FeatureStore, open_stores
from cmdlab.encoders.tiny import IMAGE_GRID, TOKENS_PER_SECOND

__all__ = [
    "IMAGE",
    "IMAGE_GRID",
    "SPEECH",
    "TEXT",
    "TOKENS_PER_SECOND",
    "FeatureStore",
    "Features",
    "Hearing",
    "encode",
    "encoders_for",
    "fingerprint",
    "open_stores",
    "tiny_encoder",
]
