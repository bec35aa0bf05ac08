"""Speech that is encoded when it is asked for: the same as what a store holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cmdlab.corpora import Corpus, load_corpus
from cmdlab.encoders import SPEECH, Hearing, OnlineSpeech, online, open_stores
from cmdlab.errors import InputError

HEARING = Hearing()


@pytest.fixture(scope="module")
def corpus(smoke_corpus: Path) -> Corpus:
    whole = load_corpus(smoke_corpus, "val")
    return replace(whole, captions=whole.captions[:9])


def test_it_gives_what_a_store_gives(corpus, tmp_path, monkeypatch):
    (stored,) = open_stores([(corpus, SPEECH)], tmp_path, hearing=HEARING, workers=1)
    monkeypatch.setattr(online, "SAMPLES", 200_000)  # a few captions at once
    speech = OnlineSpeech(corpus, SPEECH, HEARING, "cpu")
    assert (len(speech), speech.layers, speech.width) == (9, stored.layers, stored.width)
    speech.read_ahead([7, 2, 3, 5, 1])
    states, lengths = speech.tokens([7, 2, 3, 5, 1])
    expected, expected_lengths = stored.tokens([7, 2, 3, 5, 1])
    assert torch.equal(lengths, expected_lengths)
    assert torch.allclose(states, expected, atol=2e-3)  # the store keeps float16
    assert (speech.lengths - stored.lengths).abs().max() <= 1
    heard = sum(len(speech._read(i, 0)) for i in (7, 2, 3, 5, 1))
    assert heard == speech.samples <= speech.padded_samples < 1.5 * heard


def test_chosen_layers_alone_are_given(corpus):
    every = OnlineSpeech(corpus, SPEECH, HEARING, "cpu")
    two = OnlineSpeech(corpus, replace(SPEECH, layers=(2, 0)), HEARING, "cpu")
    assert two.layers == 2
    assert torch.equal(two.tokens([4])[0], every.tokens([4])[0][[2, 0]])
    assert two.name != every.name


def test_a_crop_depends_on_the_caption_and_the_seed_alone(corpus):
    speech, again = (OnlineSpeech(corpus, SPEECH, HEARING, "cpu", crop=16_000) for _ in range(2))
    states, lengths = speech.tokens([0, 1], 5)
    assert lengths.tolist() == [13, 13]  # one second
    again.read_ahead([1], 6)  # of the next step
    again.read_ahead([1], 5)
    assert torch.allclose(again.tokens([1], 5)[0], states[:, 13:], atol=1e-4)  # in no company
    assert not torch.allclose(again.tokens([1], 6)[0], states[:, 13:], atol=1e-2)
    assert not again._ahead
    short = replace(corpus, captions=corpus.captions[:1])
    whole = OnlineSpeech(short, SPEECH, HEARING, "cpu", crop=10**9)
    assert torch.equal(
        whole.tokens([0])[0], OnlineSpeech(short, SPEECH, HEARING, "cpu").tokens([0])[0]
    )


def test_a_recording_that_cannot_be_read_is_named_when_it_is_asked_for(corpus, tmp_path):
    (tmp_path / "bad.flac").write_bytes(b"no sound")
    bad = replace(corpus.captions[1], audio=tmp_path / "bad.flac")
    speech = OnlineSpeech(
        replace(corpus, captions=(corpus.captions[0], bad)), SPEECH, HEARING, "cpu"
    )
    speech.tokens([0])
    with pytest.raises(InputError, match=r"bad\.flac"):
        speech.tokens([0, 1])
