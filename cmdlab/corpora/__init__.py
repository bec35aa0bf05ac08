"""Spoken-image corpora: one Corpus type, whether generated, SpokenCOCO or Flickr8k Audio."""

from cmdlab.corpora.audio import SAMPLE_RATE, degrade, read_audio, read_speech
from cmdlab.corpora.corpus import Caption, Corpus, Image, content_hash, load_corpus
from cmdlab.corpora.images import read_image
from cmdlab.corpora.untrusted import Problem

__all__ = [
    "SAMPLE_RATE",
    "Caption",
    "Corpus",
    "Image",
    "Problem",
    "content_hash",
    "degrade",
    "load_corpus",
    "read_audio",
    "read_image",
    "read_speech",
]
