"""What frozen networks see: encoders by name, and the stores of their features."""

from cmdlab.encoders.encoder import Description, Encoded, Hearing
from cmdlab.encoders.encoding import (
    IMAGE,
    SPEECH,
    TEXT,
    Encoder,
    compute,
    encode,
    encoders_for,
    fingerprint,
    untrained,
    weights_of,
)
from cmdlab.encoders.features import Features
from cmdlab.encoders.online import OnlineSpeech
from cmdlab.encoders.store import FeatureStore, open_stores
from cmdlab.encoders.weight_files import weights_sha256

__all__ = [
    "IMAGE",
    "SPEECH",
    "TEXT",
    "Description",
    "Encoded",
    "Encoder",
    "FeatureStore",
    "Features",
    "Hearing",
    "OnlineSpeech",
    "compute",
    "encode",
    "encoders_for",
    "fingerprint",
    "open_stores",
    "untrained",
    "weights_of",
    "weights_sha256",
]
