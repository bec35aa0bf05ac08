"""The ground truth beside a corpus: in the corpus' order, absent where absent, damaged refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cmdlab.corpora import Corpus, load_corpus
from cmdlab.corpora.ceiling import ceiling
from cmdlab.corpora.corpus import leave_out
from cmdlab.corpora.ground_truth import (
    corpus_ceiling,
    read_foils,
    read_ground_truth,
)
from cmdlab.corpora.scenes import COLOURS, caption_is_true
from cmdlab.corpora.untrusted import Problem
from cmdlab.errors import InputError


@pytest.fixture(scope="module")
def corpus(smoke_corpus: Path) -> Corpus:
    return load_corpus(smoke_corpus, "test")


@pytest.fixture
def edited(corpus: Corpus, tmp_path: Path) -> Callable[..., Corpus]:
    """The corpus with a ground truth of its own, whose first line is changed by `edit`."""

    def make(file: str, edit: Callable[[dict], object]) -> Corpus:
        shutil.copytree(corpus.root / "ground_truth", tmp_path / "ground_truth")
        shutil.copytree(corpus.root / "wavs" / "test", tmp_path / "wavs" / "test")
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
        lambda entry: entry["objects"][0].update(box=[1, 2, 3, float("nan")]),
        lambda entry: entry["captions"][0]["facts"].pop("mentions"),
        lambda entry: entry["captions"][0]["facts"].pop("relations"),
        lambda entry: entry["captions"][0]["facts"]["mentions"][0].update(colour="loud"),
        lambda entry: entry["captions"][0]["facts"]["mentions"][0].update(weight="heavy"),
        lambda entry: entry["captions"][0]["facts"].update(relations=[[0, "inside", 1]]),
        lambda entry: entry["captions"][0]["facts"].update(relations=[[0, "above", 9]]),
        lambda entry: entry["captions"][0]["facts"].update(mentions=[{"size": "small"}] * 9),
        lambda entry: entry["captions"][0]["words"][0].update(start="soon"),
        lambda entry: entry["captions"][0]["words"][0].update(start=None),
        lambda entry: entry["captions"][0]["words"][0].update(end=float("nan")),
        lambda entry: entry["captions"][0]["words"][0].update(end=float("inf")),
        lambda entry: entry["captions"][0]["words"][0].update(start=-1),
        lambda entry: entry["captions"][0]["words"][0].update(object=True),
        lambda entry: entry["captions"].append(entry["captions"][0]),
        lambda entry: entry["captions"][0].update(uttid="test-000001-0"),
        lambda entry: "[" * 100_000,
    ],
)
def test_a_damaged_line_is_refused_by_file_and_number(edited, edit):
    damaged = edited("test.jsonl", edit)
    with pytest.raises(InputError, match=r"test\.jsonl: line 1 is damaged .*; make the corpus"):
        read_ground_truth(damaged)


def test_an_image_told_of_twice_is_refused(edited, corpus):
    def twice(entry: dict) -> str:
        return "\n".join([json.dumps(entry | {"captions": []}), json.dumps(entry)])

    with pytest.raises(InputError, match=r"line 2 is damaged .*test-000000\.png' is repeated"):
        read_ground_truth(edited("test.jsonl", twice))


@pytest.mark.parametrize("file", ["test.jsonl", "test_foils.jsonl"])
def test_a_link_out_of_the_corpus_is_not_followed(edited, corpus, tmp_path, file):
    linked = edited(file, lambda entry: None)
    path = tmp_path / "ground_truth" / file
    path.unlink()
    path.symlink_to(corpus.root / "ground_truth" / file)
    with pytest.raises(InputError, match=rf"{file}' is a link that leaves the corpus folder"):
        (read_foils if "foils" in file else read_ground_truth)(linked)


@pytest.mark.parametrize(
    "edit",
    [
        lambda entry: entry.update(image="another", captions=[]),
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
        lambda entry: entry.update(uttid=5),
        lambda entry: "[" * 100_000,
    ],
)
def test_a_damaged_foil_is_refused(edited, edit):
    with pytest.raises(InputError, match=r"test_foils\.jsonl: line 1 is damaged"):
        read_foils(edited("test_foils.jsonl", edit))


def test_a_foil_goes_with_its_caption(edited, corpus):
    foils = read_foils(edited("test_foils.jsonl", lambda entry: None))
    problem = Problem("SpokenCOCO_val.json", foils.of[0], "is bad")
    rest = leave_out(corpus, [problem], caption_ids={foils.of[0]})
    assert read_foils(rest).of == foils.of[1:]
    assert len(read_ground_truth(rest).facts) == len(corpus.captions) - 1


def test_a_split_without_a_foil_has_none(edited, tmp_path):
    empty = edited("test_foils.jsonl", lambda entry: None)
    (tmp_path / "ground_truth" / "test_foils.jsonl").write_text("")
    assert read_foils(empty) is None
