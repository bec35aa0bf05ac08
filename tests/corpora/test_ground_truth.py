"""The ground truth beside a corpus: in the corpus' order, absent where absent, damaged refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cmdlab.corpora.ceiling import ceiling
from cmdlab.corpora.corpus import Corpus, load_corpus
from cmdlab.corpora.ground_truth import (
    corpus_ceiling,
    read_foils,
    read_ground_truth,
)
from cmdlab.corpora.scenes import COLOURS, caption_is_true
from cmdlab.errors import InputError


@pytest.fixture(scope="module")
def corpus(smoke_corpus: Path) -> Corpus:
    return load_corpus(smoke_corpus, "test")


@pytest.fixture
def edited(corpus: Corpus, tmp_path: Path) -> Callable[..., Corpus]:
    """The corpus with a ground truth of its own, whose first line is changed by `edit`."""

    def make(file: str, edit: Callable[[dict], object]) -> Corpus:
        shutil.copytree(corpus.root / "ground_truth", tmp_path / "ground_truth")
        (tmp_path / "wavs").symlink_to(corpus.root / "wavs")
        path = tmp_path / "ground_truth" / file
        first, *others = path.read_text().splitlines()
        entry = json.loads(first)
        result = edit(entry)
        first = result if isinstance(result, str) else json.dumps(entry)
        path.write_text("\n".join([first, *others]) + "\n")
        return replace(corpus, root=tmp_path)

    return make


def test_it_is_in_the_order_of_the_corpus_whatever_that_is(corpus):
    truth = read_ground_truth(corpus)
    turned = replace(corpus, images=corpus.images[::-1], captions=corpus.captions[3:1:-1])
    other = read_ground_truth(turned)
    assert other.scenes == truth.scenes[::-1]
    assert all((a == b).all() for a, b in zip(other.boxes, truth.boxes[::-1], strict=True))
    assert other.facts == truth.facts[3:1:-1]
    assert other.words == truth.words[3:1:-1]


def test_it_fits_the_captions(corpus):
    truth = read_ground_truth(corpus)
    row = {image.id: i for i, image in enumerate(corpus.images)}
    for caption, facts, words in zip(corpus.captions, truth.facts, truth.words, strict=True):
        scene = truth.scenes[row[caption.image_id]]
        assert caption_is_true(facts, scene)
        assert " ".join(word.word for word in words) == caption.text
        assert len(truth.boxes[row[caption.image_id]]) == len(scene.objects)


def test_its_ceiling_is_that_of_its_facts(corpus):
    truth = read_ground_truth(corpus)
    owner = [
        next(i for i, m in enumerate(corpus.images) if m.id == c.image_id) for c in corpus.captions
    ]
    found = corpus_ceiling(truth, owner)
    assert found == ceiling(truth.facts, np.array(owner), truth.scenes)
    assert 50 < found["speech_to_image"]["R@1"] <= 100


def test_a_corpus_without_it_has_none(corpus, tmp_path):
    assert read_ground_truth(replace(corpus, root=tmp_path)) is None
    assert read_foils(replace(corpus, root=tmp_path)) is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda entry: "{",
        lambda entry: "[]",
        lambda entry: entry.pop("objects"),
        lambda entry: entry["objects"][0].pop("colour"),
        lambda entry: entry["objects"][0].update(shape="octopus"),
        lambda entry: entry["objects"][0].update(box=[1, 2, 3, 4, 5]),
        lambda entry: entry["captions"][0]["words"][0].update(object=9),
        lambda entry: entry["captions"][0]["words"][0].update(loud=True),
        lambda entry: entry.update(captions=7),
    ],
)
def test_a_damaged_line_is_refused_by_file_and_number(edited, edit):
    damaged = edited("test.jsonl", edit)
    with pytest.raises(InputError, match=r"test\.jsonl: line 1 is damaged .*; make the corpus"):
        read_ground_truth(damaged)


@pytest.mark.parametrize(
    "edit",
    [
        lambda entry: entry.update(image="another"),
        lambda entry: entry["captions"].pop(),
    ],
)
def test_a_missing_image_or_caption_is_refused(edited, corpus, edit):
    with pytest.raises(InputError, match=r"test\.jsonl: lacks .*; make the corpus again"):
        read_ground_truth(edited("test.jsonl", edit))


def test_foils_are_captions_with_two_colours_exchanged(corpus):
    foils = read_foils(corpus)
    captions = {caption.id: caption for caption in corpus.captions}
    assert len(foils.of) == len(set(foils.of)) == len(foils.corpus.captions) > 10
    colours = {word for words in COLOURS.values() for word in words}
    for foil, of in zip(foils.corpus.captions, foils.of, strict=True):
        caption = captions[of]
        assert (foil.image_id, foil.speaker) == (caption.image_id, caption.speaker)
        assert foil.audio.is_file()
        pairs = zip(caption.text.split(), foil.text.split(), strict=True)
        changed = [pair for pair in pairs if pair[0] != pair[1]]
        assert len(changed) == 2
        assert changed[0] == changed[1][::-1]
        assert set(changed[0]) <= colours
    assert foils.corpus.content_hash != corpus.content_hash


@pytest.mark.parametrize(
    "edit",
    [
        lambda entry: "{",
        lambda entry: entry.pop("foil_of"),
        lambda entry: entry.update(foil_of="nobody"),
        lambda entry: entry.update(wav="../outside.flac"),
        lambda entry: entry.update(wav="wavs/none.flac"),
        lambda entry: entry.update(wav=5),
    ],
)
def test_a_damaged_foil_is_refused(edited, edit):
    with pytest.raises(InputError, match=r"test_foils\.jsonl: line 1 is damaged"):
        read_foils(edited("test_foils.jsonl", edit))
