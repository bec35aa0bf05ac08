"""Range scans as tokens."""

import numpy as np
import pytest
import torch

from cmdlab.corpora import RAY, RAYS, load_corpus, make_variant
from cmdlab.encoders import Encoder, Hearing
from cmdlab.encoders.encoding import encode
from cmdlab.encoders.scans import ScanEncoder
from cmdlab.errors import InputError


def test_a_token_is_of_its_ray_alone_and_tells_how_far_the_echo_came():
    quiet = torch.zeros(1, RAYS, RAY)
    echo = quiet.clone()
    echo[0, 7, 40:44] = 0.5
    later = quiet.clone()
    later[0, 7, 80:84] = 0.5
    encoder, lengths = ScanEncoder(), torch.tensor([RAYS * RAY])
    states = [encoder(one.flatten(1), lengths)[0][0, 0] for one in (quiet, echo, later)]
    changed = (states[1] != states[0]).any(1)
    assert changed.nonzero().flatten().tolist() == [7]
    assert not torch.allclose(states[1][7], states[2][7])
    assert len(torch.unique(states[0], dim=0)) == RAYS  # each tells its direction


def test_scans_are_encoded_as_they_are_and_speech_is_refused(smoke_corpus, tmp_path):
    make_variant(smoke_corpus, tmp_path / "scans", "scans")
    captions = load_corpus(tmp_path / "scans", "val").captions[:3]
    encoder = Encoder("tiny-scan")
    clean, noisy = (
        encode(encoder, captions, hearing) for hearing in (Hearing(None, False), Hearing())
    )
    for one, other in zip(clean, noisy, strict=True):
        assert one.tokens.shape == (RAYS, 1, 128)
        assert np.array_equal(one.tokens, other.tokens)
    with pytest.raises(InputError, match=r"flac: tiny-scan takes range scans .*; tiny-speech, "):
        encode(encoder, load_corpus(smoke_corpus, "val").captions[:1], Hearing())
    with pytest.raises(InputError, match="tiny-scan has no weights"):
        Encoder("tiny-scan", "mine.safetensors").open()
