"""Spoken-image corpora: one Corpus type, generated, released or made of own pairs."""

from cmdlab.corpora.audio import SAMPLE_RATE, caption_seed, degrade, read_audio, read_speech
from cmdlab.corpora.check import check_corpus, leave_out_unreadable, load_usable
from cmdlab.corpora.content_hash import content_hash
from cmdlab.corpora.corpus import SPLITS, Caption, Corpus, Image
from cmdlab.corpora.foreign_media import (
    decode_picture,
    decode_sound,
    to_picture,
    to_speech,
    without_silence,
)
from cmdlab.corpora.ground_truth import (
    GroundTruth,
    TimedWord,
    corpus_ceiling,
    read_foils,
    read_ground_truth,
)
from cmdlab.corpora.images import read_image
from cmdlab.corpora.importing import import_corpus
from cmdlab.corpora.loading import load_corpus, read_identity
from cmdlab.corpora.pairs import bytes_of, read_pairs_csv
from cmdlab.corpora.rendering import IMAGE_SIZE, render
from cmdlab.corpora.scenes import COLOURS, SHAPES, sample_captions, sample_scene, vocabulary
from cmdlab.corpora.speaking import PRETRAINING_VOICES, Utterance, speak
from cmdlab.corpora.spoken_scenes import make_corpus
from cmdlab.corpora.untrusted import BadEntry, Problem, UntrustedFolder
from cmdlab.corpora.variants import RAY, RAYS, make_variant
from cmdlab.corpora.workers import worker_pool

__all__ = [
    "COLOURS",
    "IMAGE_SIZE",
    "PRETRAINING_VOICES",
    "RAY",
    "RAYS",
    "SAMPLE_RATE",
    "SHAPES",
    "SPLITS",
    "BadEntry",
    "Caption",
    "Corpus",
    "GroundTruth",
    "Image",
    "Problem",
    "TimedWord",
    "UntrustedFolder",
    "Utterance",
    "bytes_of",
    "caption_seed",
    "check_corpus",
    "content_hash",
    "corpus_ceiling",
    "decode_picture",
    "decode_sound",
    "degrade",
    "import_corpus",
    "leave_out_unreadable",
    "load_corpus",
    "load_usable",
    "make_corpus",
    "make_variant",
    "read_audio",
    "read_foils",
    "read_ground_truth",
    "read_identity",
    "read_image",
    "read_pairs_csv",
    "read_speech",
    "render",
    "sample_captions",
    "sample_scene",
    "speak",
    "to_picture",
    "to_speech",
    "vocabulary",
    "without_silence",
    "worker_pool",
]
