"""Checks a whole corpus on disk, media files and content hash included."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cmdlab.corpora.audio import read_audio
from cmdlab.corpora.content_hash import content_hash, in_slices
from cmdlab.corpora.corpus import SPLITS, Caption, Corpus, Image, Split, leave_out
from cmdlab.corpora.images import read_image
from cmdlab.corpora.loading import load_corpus, read_identity
from cmdlab.corpora.untrusted import Problem, UntrustedFolder
from cmdlab.errors import InputError

SILENCE = 0.001  # of full scale, -60 dB: the hiss of a recorder that heard nothing


@dataclass(frozen=True)
class CorpusCheck:
    """What a check found. `str()` gives it as lines to print.

    `counts` holds the usable images and captions of each split, `bad_entries` what `skip_bad`
    leaves out, `faults` what no skipping mends, `warnings` what is usable and yet likely wrong.
    `picture_sizes` (width, height) and `words` of the usable captions say what encoders must take.
    """

    root: Path
    name: str
    counts: dict[str, tuple[int, int]]
    bad_entries: tuple[Problem, ...]
    faults: tuple[str, ...]
    skip_bad: bool
    warnings: tuple[Problem, ...]
    picture_sizes: Counter[tuple[int, int]]
    words: Counter[str]

    @property
    def ok(self) -> bool:
        """Whether the corpus can be used: as it is, or without the entries left out."""
        return not self.faults and (self.skip_bad or not self.bad_entries)

    def __str__(self) -> str:
        lines = [f"{self.name} in {self.root}"]
        for split, (images, captions) in self.counts.items():
            lines.append(f"  {split}: {images:,} images, {captions:,} captions usable")
        lines += [f"fault: {fault}" for fault in self.faults]
        verb = "left out" if self.skip_bad else "bad"
        lines += [
            f"{verb}: {self.root / problem.file}: {problem.entry}: {problem.message}"
            for problem in self.bad_entries
        ]
        lines += [f"warning: {self.root}/{problem}" for problem in self.warnings]
        if self.ok:
            warned = f", {len(self.warnings):,} to look at" if self.warnings else ""
            lines.append(f"usable, {len(self.bad_entries):,} entries left out{warned}")
        else:
            total = len(self.faults) + len(self.bad_entries)
            remedy = "" if self.faults else ", or pass --skip-bad"
            lines.append(f"not usable: {total:,} to mend{remedy}")
        return "\n".join(lines)


def check_corpus(
    root: Path | str,
    *,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> CorpusCheck:
    """Validate layout, counts, ids, every sound and image file, and a generated corpus' hash.

    Warns of recordings without sound, and of files that two splits hold byte for byte: those of the
    released corpora may, so only one file that two captions share is refused.
    Goes on after a fault to find the others; progress goes to standard error.
    Raises InputError when there is no corpus to check.
    """
    root = Path(root)
    name = ""
    counts: dict[str, tuple[int, int]] = {}
    bad: dict[Problem, None] = {}  # each split's loading finds the metadata's problems again
    faults: dict[str, None] = {}
    warnings: list[Problem] = []
    holders: dict[bytes, tuple[str, str]] = {}  # of each content the first split and entry
    picture_sizes: Counter[tuple[int, int]] = Counter()
    words: Counter[str] = Counter()
    for split in SPLITS:
        try:
            corpus = load_corpus(root, split, skip_bad=True)
            bad.update(dict.fromkeys(corpus.left_out))
            findings = _read_all(corpus, workers, progress)
            corpus = _leave_out_unread(corpus, findings)
        except InputError as error:
            faults[str(error)] = None
            continue
        bad.update(dict.fromkeys(corpus.left_out))
        name = corpus.name
        counts[split] = (len(corpus.images), len(corpus.captions))
        for item in _items(corpus):
            found = findings[item]
            file, entry = _place(corpus, item)
            holder_split, holder = holders.setdefault(found.digest, (split, f"{file}: {entry}"))
            if found.warning:
                warnings.append(Problem(file, entry, found.warning))
            elif holder_split != split:
                message = f"holds the bytes of {holder}, a leak from {holder_split} to {split}"
                warnings.append(Problem(file, entry, f"{message}; remove one of the two"))
            if found.picture_size:
                picture_sizes[found.picture_size] += 1
        words.update(word for caption in corpus.captions for word in caption.text.split())
    if not counts:
        raise InputError(next(iter(faults)))
    mismatch = _hash_mismatch(root, workers, progress)
    if mismatch and not (skip_bad and bad):  # bad files explain another hash
        faults[mismatch + (", or pass --skip-bad" if bad else "")] = None
    return CorpusCheck(
        root,
        name,
        counts,
        tuple(bad),
        tuple(faults),
        skip_bad,
        tuple(warnings),
        picture_sizes,
        words,
    )


def load_usable(root: Path, split: Split) -> Corpus:
    """The corpus without any entry that cannot be used; decodes every file, with a progress bar.

    Raises InputError when nothing is left.
    """
    return leave_out_unreadable(load_corpus(root, split, skip_bad=True), progress=True)


def leave_out_unreadable(
    corpus: Corpus, *, workers: int | None = None, progress: bool = False
) -> Corpus:
    """The corpus without the entries whose sound or image cannot be read; `left_out` lists them.

    Decodes every file with `workers` threads (default: one a core).
    Raises InputError when nothing is left.
    """
    return _leave_out_unread(corpus, _read_all(corpus, workers, progress))


@dataclass(frozen=True, slots=True)
class _Finding:
    """What the reading of one file gave: why it failed, or the rest."""

    problem: Problem | None = None
    warning: str | None = None
    digest: bytes = b""
    picture_size: tuple[int, int] | None = None  # width, height


def _read_all(
    corpus: Corpus, workers: int | None, progress: bool
) -> dict[Image | Caption, _Finding]:
    items = _items(corpus)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = in_slices(pool, lambda item: _read(corpus, item), items)
        bar = tqdm(
            zip(items, found, strict=True),
            total=len(items),
            desc=f"checking {corpus.split}",
            unit=" files",
            disable=not progress,
        )
        return dict(bar)


def _read(corpus: Corpus, item: Image | Caption) -> _Finding:
    path = item.path if isinstance(item, Image) else item.audio
    warning = picture_size = None
    try:
        if isinstance(item, Image):
            height, width, _ = read_image(path).shape
            picture_size = width, height
        else:
            warning = _silence(read_audio(path))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except InputError as error:
        message = str(error).removeprefix(f"{path}: ")
        return _Finding(problem=Problem(*_place(corpus, item), message))
    return _Finding(None, warning, digest, picture_size)


def _silence(waveform: NDArray[np.float32]) -> str | None:
    low, high = waveform.min(), waveform.max()
    if low == high:
        return f"is silent, every sample is {low:g}; replace it or remove its caption"
    if (high - low) / 2 < SILENCE:
        return f"is silent, no sample is above {SILENCE} of full scale; replace it or amplify it"
    return None


def _items(corpus: Corpus) -> list[Image | Caption]:
    return [*corpus.images, *corpus.captions]


def _place(corpus: Corpus, item: Image | Caption) -> tuple[str, str]:
    """An item's file, relative to the corpus folder, and its name."""
    if isinstance(item, Image):
        return item.path.relative_to(corpus.root).as_posix(), f"image '{item.id}'"
    return item.audio.relative_to(corpus.root).as_posix(), f"caption '{item.id}'"


def _leave_out_unread(corpus: Corpus, findings: dict[Image | Caption, _Finding]) -> Corpus:
    problems = {item: found.problem for item, found in findings.items() if found.problem}
    return leave_out(
        corpus,
        problems.values(),
        image_ids={item.id for item in problems if isinstance(item, Image)},
        caption_ids={item.id for item in problems if isinstance(item, Caption)},
    )


def _hash_mismatch(root: Path, workers: int | None, progress: bool) -> str | None:
    folder = UntrustedFolder(root, skip_bad=True)
    if not folder.has("corpus.json"):
        return None
    try:
        _, stated = read_identity(folder)
        if content_hash(root, workers=workers, progress=progress) == stated:
            return None
    except InputError as error:
        return str(error)
    return (
        f"{root / 'corpus.json'}: content_hash: files were changed, added or removed since the "
        "corpus was made; make it again"
    )
