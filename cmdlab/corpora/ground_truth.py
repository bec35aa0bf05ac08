"""Reads the ground truth that SpokenScenes keeps beside a corpus: objects, facts, word timings."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cmdlab.corpora.ceiling import ceiling
from cmdlab.corpora.corpus import Caption, Corpus
from cmdlab.corpora.scenes import ATTRIBUTES, VALUES, Scene, SceneObject
from cmdlab.corpora.untrusted import BadPath, UntrustedFolder
from cmdlab.errors import InputError


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

    Raises InputError for a file that does not fit the corpus.
    """
    path = corpus.root / "ground_truth" / f"{corpus.split}.jsonl"
    if not path.exists():
        return None
    of_image: dict[str, tuple[Scene, np.ndarray]] = {}
    of_caption: dict[str, tuple[dict[str, Any], list[TimedWord]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            objects = tuple(
                SceneObject(**{name: item[name] for name in ATTRIBUTES})
                for item in entry["objects"]
            )
            strange = [
                value
                for item in objects
                for name, value in vars(item).items()
                if value not in VALUES[name]
            ]
            if strange:
                raise ValueError(f"{strange[0]!r} is said of no object")
            boxes = np.array([item["box"] for item in entry["objects"]], np.float32).reshape(-1, 4)
            of_image[entry["image"]] = Scene(objects), boxes
            for caption in entry["captions"]:
                words = [TimedWord(**word) for word in caption["words"]]
                if not {word.object for word in words} <= {None, *range(len(objects))}:
                    raise ValueError(f"{caption['uttid']} speaks of an object that is not there")
                of_caption[caption["uttid"]] = caption["facts"], words
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number} is damaged ({error}); make the corpus again"
            ) from error
    try:
        images = [of_image[image.id] for image in corpus.images]
        captions = [of_caption[caption.id] for caption in corpus.captions]
    except KeyError as error:
        raise InputError(f"{path}: lacks {error}; make the corpus again") from error
    return GroundTruth(
        [scene for scene, _ in images],
        [boxes for _, boxes in images],
        [facts for facts, _ in captions],
        [words for _, words in captions],
    )


def corpus_ceiling(truth: GroundTruth, caption_image: Sequence[int]) -> dict[str, dict[str, float]]:
    """The all-knowing system's Recall@K on the gallery of `truth`; see `ceiling.py`."""
    return ceiling(truth.facts, np.asarray(caption_image), truth.scenes)


@dataclass(frozen=True)
class Foils:
    """Captions with two colours exchanged: `corpus.captions[i]` is the foil of caption `of[i]`."""

    corpus: Corpus
    of: list[str]


def read_foils(corpus: Corpus) -> Foils | None:
    """The spoken foils of a corpus' captions, or None for a corpus or split that has none.

    Raises InputError for a file that does not fit the corpus.
    """
    path = corpus.root / "ground_truth" / f"{corpus.split}_foils.jsonl"
    if not path.exists():
        return None
    image_of = {caption.id: caption.image_id for caption in corpus.captions}
    folder = UntrustedFolder(corpus.root, skip_bad=False)
    captions, of = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            captions.append(
                Caption(
                    entry["uttid"],
                    image_of[entry["foil_of"]],
                    folder.locate(entry["wav"]),
                    entry["text"],
                    entry["speaker"],
                )
            )
            of.append(entry["foil_of"])
        except (ValueError, KeyError, TypeError, AttributeError, BadPath) as error:
            raise InputError(
                f"{path}: line {number} is damaged ({error}); make the corpus again"
            ) from error
    return Foils(
        replace(corpus, content_hash=f"{corpus.content_hash} foils", captions=tuple(captions)), of
    )
