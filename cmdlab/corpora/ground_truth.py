"""Reads the ground truth that SpokenScenes keeps beside a corpus: objects, facts, word timings."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cmdlab.corpora.audio import MAX_SECONDS
from cmdlab.corpora.ceiling import ceiling
from cmdlab.corpora.corpus import Caption, Corpus
from cmdlab.corpora.scenes import ATTRIBUTES, VALUES, Scene, SceneObject, caption_is_true
from cmdlab.corpora.untrusted import BadEntry, UntrustedFolder, shown, text_of


@dataclass(frozen=True)
class TimedWord:
    """A spoken word, its span in seconds, and the index of the object it speaks of, or None."""

    word: str
    start: float
    end: float
    object: int | None


@dataclass(frozen=True)
class GroundTruth:
    """For each image of a corpus its scene and boxes; for each caption its facts and words.

    boxes: float32 [objects, 4], (x0, y0, x1, y1) in pixels.
    """

    scenes: list[Scene]
    boxes: list[np.ndarray]
    facts: list[dict[str, Any]]
    words: list[list[TimedWord]]


def read_ground_truth(corpus: Corpus) -> GroundTruth | None:
    """The ground truth in the order of `corpus`, or None for a corpus that has none.

    Raises InputError for a file that does not fit the corpus, and for a caption's facts that are
    not true of its image.
    """
    file = f"ground_truth/{corpus.split}.jsonl"
    folder = UntrustedFolder(corpus.root, skip_bad=False)
    if not folder.has(file):
        return None
    image_of = {caption.id: caption.image_id for caption in corpus.captions}
    of_image: dict[str, tuple[Scene, np.ndarray]] = {}
    of_caption: dict[str, tuple[dict[str, Any], list[TimedWord]]] = {}
    for place, line in folder.read_lines(file):
        try:
            entry = json.loads(line)
            image, (scene, boxes) = entry["image"], _scene(entry["objects"])
            if image in of_image:
                raise ValueError(f"{shown(image)} is repeated")
            of_image[image] = scene, boxes
            for caption in entry["captions"]:
                uttid, facts = caption["uttid"], caption["facts"]
                if uttid in of_caption:
                    raise ValueError(f"{shown(uttid)} is repeated")
                if image_of.get(uttid, image) != image:
                    raise ValueError(f"{shown(uttid)} is a caption of another image")
                if not caption_is_true(facts, scene):  # the ceiling relies on it
                    raise ValueError(f"the facts of {shown(uttid)} are not true of its objects")
                of_caption[uttid] = facts, [_word(word, len(boxes)) for word in caption["words"]]
        except _DAMAGE as error:
            folder.fail(file, f"{place} is damaged ({error}); make the corpus again")
    try:
        images = [of_image[image.id] for image in corpus.images]
        captions = [of_caption[caption.id] for caption in corpus.captions]
    except KeyError as error:
        folder.fail(file, f"lacks {error}; make the corpus again")
    return GroundTruth(
        [scene for scene, _ in images],
        [boxes for _, boxes in images],
        [facts for facts, _ in captions],
        [words for _, words in captions],
    )


_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


def _scene(entries: list[dict[str, Any]]) -> tuple[Scene, np.ndarray]:
    objects = tuple(SceneObject(**{name: item[name] for name in ATTRIBUTES}) for item in entries)
    for item in objects:
        for name, value in vars(item).items():
            if value not in VALUES[name]:
                raise ValueError(f"{shown(value)} is said of no object")
    boxes = np.array([item["box"] for item in entries], np.float32).reshape(len(objects), 4)
    if not np.isfinite(boxes).all():
        raise ValueError("a box is not finite")
    return Scene(objects), boxes


def _word(entry: dict[str, Any], objects: int) -> TimedWord:
    word = TimedWord(**entry)
    if not isinstance(word.word, str) or not 0 <= word.start <= word.end <= MAX_SECONDS:
        raise ValueError(f"the word {shown(word.word)} has no span of time")
    if word.object is not None and (type(word.object) is not int or not 0 <= word.object < objects):
        raise ValueError(f"the word {shown(word.word)} is of an object that is not there")
    return word


def corpus_ceiling(truth: GroundTruth, caption_image: Sequence[int]) -> dict[str, dict[str, float]]:
    """The all-knowing system's Recall@K on the gallery of `truth`; see `ceiling.py`."""
    return ceiling(truth.facts, np.asarray(caption_image), truth.scenes)


@dataclass(frozen=True)
class Foils:
    """Captions with two colours exchanged: `corpus.captions[i]` is the foil of caption `of[i]`."""

    corpus: Corpus
    of: list[str]

    def keep(self, corpus: Corpus) -> "Foils":
        """Only the foils that are in `corpus`, a part of this one."""
        kept = {caption.id for caption in corpus.captions}
        pairs = zip(self.corpus.captions, self.of, strict=True)
        return Foils(corpus, [of for caption, of in pairs if caption.id in kept])


def read_foils(corpus: Corpus) -> Foils | None:
    """The spoken foils of a corpus' captions, or None for a corpus or split that has none.

    Raises InputError for a file that does not fit the corpus.
    """
    file = f"ground_truth/{corpus.split}_foils.jsonl"
    folder = UntrustedFolder(corpus.root, skip_bad=False)
    if not folder.has(file):
        return None
    image_of = {caption.id: caption.image_id for caption in corpus.captions}
    captions, of = [], []
    for place, line in folder.read_lines(file):
        try:
            entry = json.loads(line)
            uttid, text, speaker = (text_of(entry, key) for key in ("uttid", "text", "speaker"))
            foil_of = entry["foil_of"]
            if corpus.left_out and foil_of not in image_of:
                continue  # it went with its caption
            audio = folder.locate(entry["wav"])
            captions.append(Caption(uttid, image_of[foil_of], audio, text, speaker))
            of.append(foil_of)
        except (*_DAMAGE, BadEntry) as error:
            folder.fail(file, f"{place} is damaged ({error}); make the corpus again")
    if not captions:
        return None
    return Foils(
        replace(corpus, content_hash=f"{corpus.content_hash} foils", captions=tuple(captions)), of
    )
