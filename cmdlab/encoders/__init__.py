"""What frozen networks see: encoders by name, and the stores of their features."""

from cmdlab.encoders.encoder import Description, Hearing
from cmdlab.encoders.encoding import (
    IMAGE,
    SPEECH,
    TEXT,
    Encoder,
    encode,
    encoders_for,
    fingerprint,
    untrained,
    weights_of,
)
from cmdlab.encoders.features import Features
from cmdlab.encoders.online import OnlineSpeech
from cmdlab.encoders.store import FeatureStore, open_stores

__all__ = [
    "IMAGE",
    "SPEECH",
    "TEXT",
    "Description",
    "Encoder",
    "FeatureStore",
    "Features",
    "Hearing",
    "OnlineSpeech",
    "encode",
    "encoders_for",
    "fingerprint",
    "open_stores",
    "untrained",
    "weights_of",
]
