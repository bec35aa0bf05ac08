"""What a spoken-image corpus is: one Corpus type, whatever its layout on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from cmdlab.corpora.untrusted import Problem
from cmdlab.errors import InputError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Caption:
    """One spoken caption of one image."""

    id: str
    image_id: str
    audio: Path
    text: str
    speaker: str


@dataclass(frozen=True, slots=True)
class Image:
    """One image; its captions name it by `id`."""

    id: str
    path: Path


@dataclass(frozen=True, slots=True)
class Corpus:
    """One split of a corpus, in the order of its files.

    Every caption's image is in `images`, and every image has at least one caption. `content_hash`
    changes with the entries left out, so nothing computed from another selection passes for this.
    """

    name: str
    root: Path
    split: Split
    images: tuple[Image, ...]
    captions: tuple[Caption, ...]
    content_hash: str
    left_out: tuple[Problem, ...] = ()


def leave_out(
    corpus: Corpus,
    problems: Iterable[Problem],
    *,
    image_ids: Collection[str] = (),
    caption_ids: Collection[str] = (),
) -> Corpus:
    """The corpus without these images and captions, with `problems` added to `left_out`.

    Captions go with their image, images with their last caption.
    Raises InputError when nothing is left.
    """
    problems = tuple(problems)
    known = {image.id for image in corpus.images}.difference(image_ids)
    captions = tuple(c for c in corpus.captions if c.image_id in known and c.id not in caption_ids)
    spoken = {caption.image_id for caption in captions}
    images = tuple(image for image in corpus.images if image.id in spoken)
    left_out = (*corpus.left_out, *problems)
    if not images:
        reason = f"; the first of {len(left_out)} problems: {left_out[0]}" if left_out else ""
        raise InputError(
            f"{corpus.root}: split '{corpus.split}' has no usable caption; mend the corpus{reason}"
        )
    content_hash = corpus.content_hash
    if problems:
        entries = sorted(f"{problem.file}  {problem.entry}\n" for problem in problems)
        content_hash = hash_of_lines([f"{content_hash}\n", *entries])
    return replace(
        corpus, images=images, captions=captions, content_hash=content_hash, left_out=left_out
    )


def hash_of_lines(lines: Iterable[str]) -> str:
    """The SHA-256 of some text, given in pieces."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()
