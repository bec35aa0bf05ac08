"""Checks a whole corpus on disk, media files and content hash included."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cmdlab.corpora.audio import read_audio
from cmdlab.corpora.content_hash import content_hash, in_slices
from cmdlab.corpora.corpus import SPLITS, Caption, Corpus, Image, Split, leave_out
from cmdlab.corpora.images import read_image
from cmdlab.corpora.loading import load_corpus, read_identity
from cmdlab.corpora.untrusted import Problem, UntrustedFolder
from cmdlab.errors import InputError


@dataclass(frozen=True)
class CorpusCheck:
    """What a check found. `str()` gives it as lines to print.

    `counts` holds the usable images and captions of each split, `bad_entries` what `skip_bad`
    leaves out, `faults` what no skipping mends.
    """

    root: Path
    name: str
    counts: dict[str, tuple[int, int]]
    bad_entries: tuple[Problem, ...]
    faults: tuple[str, ...]
    skip_bad: bool

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
        if self.ok:
            lines.append(f"usable, {len(self.bad_entries):,} entries left out")
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

    Goes on after a fault to find the others; progress goes to standard error.
    Raises InputError when there is no corpus to check.
    """
    root = Path(root)
    name = ""
    counts: dict[str, tuple[int, int]] = {}
    bad: dict[Problem, None] = {}  # each split's loading finds the metadata's problems again
    faults: dict[str, None] = {}
    for split in SPLITS:
        try:
            corpus = load_corpus(root, split, skip_bad=True)
            bad.update(dict.fromkeys(corpus.left_out))
            corpus = leave_out_unreadable(corpus, workers=workers, progress=progress)
        except InputError as error:
            faults[str(error)] = None
            continue
        bad.update(dict.fromkeys(corpus.left_out))
        name = corpus.name
        counts[split] = (len(corpus.images), len(corpus.captions))
    if not counts:
        raise InputError(next(iter(faults)))
    mismatch = _hash_mismatch(root, workers, progress)
    if mismatch and not (skip_bad and bad):  # bad files explain another hash
        faults[mismatch + (", or pass --skip-bad" if bad else "")] = None
    return CorpusCheck(root, name, counts, tuple(bad), tuple(faults), skip_bad)


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

    def problem_of(item: Image | Caption) -> Problem | None:
        path = item.path if isinstance(item, Image) else item.audio
        try:
            (read_image if isinstance(item, Image) else read_audio)(path)
        except InputError as error:
            kind = "image" if isinstance(item, Image) else "caption"
            message = str(error).removeprefix(f"{path}: ")
            return Problem(path.relative_to(corpus.root).as_posix(), f"{kind} '{item.id}'", message)
        return None

    items: list[Image | Caption] = [*corpus.images, *corpus.captions]
    problems: dict[Image | Caption, Problem] = {}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = in_slices(pool, problem_of, items)
        bar = tqdm(
            zip(items, found, strict=True),
            total=len(items),
            desc=f"checking {corpus.split}",
            unit=" files",
            disable=not progress,
        )
        problems = {item: problem for item, problem in bar if problem is not None}
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
