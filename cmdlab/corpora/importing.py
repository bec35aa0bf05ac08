"""Makes a corpus of pairs that people have: a CSV file of their own, or a hub's parquet parts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cmdlab.corpora.content_hash import content_hash
from cmdlab.corpora.converting import Converted, convert_all
from cmdlab.corpora.corpus import SPLITS, Split
from cmdlab.corpora.near_duplicates import group_near_duplicates, join_groups
from cmdlab.corpora.pairs import MediumKey, Pair, Pairs, read_pairs_csv
from cmdlab.corpora.parquet_parts import read_parquet_parts
from cmdlab.corpora.untrusted import BadEntry, Problem, is_name, shown
from cmdlab.errors import InputError, check_seed
from cmdlab.outputs import write_file

HELD_OUT = 0.1  # of the images, in val and again in test
SIDES = (8, 1024)  # pixels


@dataclass(frozen=True)
class Imported:
    """What an import did, or found wrong. `str()` gives it as lines to print.

    `counts`: the images and captions of each split. `near_duplicates`: the sources' names of the
    pictures that are nearly the same, by group. `bad`: what was left out, or is to be mended.
    """

    folder: Path
    counts: dict[str, tuple[int, int]]
    bad: tuple[Problem, ...]
    near_duplicates: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the corpus was made."""
        return bool(self.counts)

    def __str__(self) -> str:
        lines = [*self.notes, *self.near_duplicates]
        lines += [f"{'left out' if self.ok else 'bad'}: {problem}" for problem in self.bad]
        for split, (images, captions) in self.counts.items():
            lines.append(f"  {split}: {images:,} images, {captions:,} captions")
        if self.ok:
            lines.append(f"{self.folder}: made, {len(self.bad):,} entries left out")
        else:
            lines.append(f"not made: {len(self.bad):,} to mend, or pass --skip-bad")
        return "\n".join(lines)


def import_corpus(
    source: Path | str,
    folder: Path | str,
    *,
    side: int | None = None,
    seed: int = 1,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Imported:
    """Make a corpus in SpokenCOCO's layout of a CSV file of pairs or a folder of parquet parts.

    Sound becomes 16 kHz mono, pictures upright RGB of at most 1,024 pixels a side, or, with `side`,
    squares of that many; `foreign_media` has the details. Images that the source puts into no split
    are put there by `seed`, a tenth into val and test each, near-duplicates together, and so are
    pictures of which one recording speaks. Every problem is listed; with any, nothing is made
    unless `skip_bad` leaves them out.

    `workers` threads (default: one a core) convert into `<folder>.making`; work that was stopped
    goes on there, and what was converted is kept for the next try when an entry has been mended.
    The same source, seed and side give the same bytes, whatever the number of workers. Sources are
    only read. `sources.json` says which file came from where.

    Raises InputError for a source that cannot be read at all, for too few pictures, and where
    `folder` holds anything else than this very corpus.
    """
    source, folder = Path(source), Path(os.path.abspath(folder))
    check_seed(seed)
    if side is not None and not SIDES[0] <= side <= SIDES[1]:
        raise InputError(f"size: {side} pixels is not within {SIDES[0]} to {SIDES[1]}")
    pairs = read_parquet_parts(source) if source.is_dir() else read_pairs_csv(source)
    recipe = _recipe(folder, pairs, side, seed)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        return _as_made(folder, recipe)
    making = folder.with_name(f"{folder.name}.making")
    corpus = making / "corpus"
    converted = convert_all(pairs, making, side, workers or os.cpu_count() or 1, progress)
    kept, bad = _usable(pairs, converted)
    if bad and not skip_bad:
        return Imported(folder, {}, tuple(bad), (), tuple(pairs.notes))
    if not kept:
        first = f"; the first of {len(bad)} problems: {bad[0]}" if bad else ""
        raise InputError(f"{source}: no pair can be used; mend it{first}")
    images = _images(corpus, kept, converted)
    groups = group_near_duplicates([image.hash for image in images])
    shared = _shared_recordings(kept, converted, images)
    split_of = _split(source, images, join_groups(groups, [of for _, of in shared]), seed)
    told = _near_duplicates(images, groups, split_of)
    told += _told_recordings(source, images, shared, split_of)
    counts = _write_layout(corpus, images, split_of)
    _remove_unused(corpus, images)
    identity = {
        **recipe,
        "counts": counts,
        "bad": [asdict(problem) for problem in bad],
        "near_duplicates": told,
        "content_hash": content_hash(corpus, workers=workers, progress=progress),
    }
    write_file(corpus / "corpus.json", json.dumps(identity, indent=1) + "\n")
    os.replace(corpus, folder)
    shutil.rmtree(making)
    return Imported(folder, counts, tuple(bad), tuple(told), tuple(pairs.notes))


def _recipe(folder: Path, pairs: Pairs, side: int | None, seed: int) -> dict[str, Any]:
    """What decides the corpus' bytes, but for the media, as corpus.json states it."""
    entries = json.dumps([asdict(pair) for pair in pairs.pairs])
    return {
        "name": folder.name if is_name(folder.name) else "imported",
        "pairs_sha256": hashlib.sha256(entries.encode()).hexdigest(),
        "side": side,
        "seed": seed,
    }


def _as_made(folder: Path, recipe: dict[str, Any]) -> Imported:
    """What was imported there before. Raises InputError where that is anything else."""
    try:
        made = json.loads((folder / "corpus.json").read_bytes())
        if {key: made[key] for key in recipe} != recipe:
            raise ValueError("another source, seed or size")
        bad = tuple(Problem(**problem) for problem in made["bad"])
        told = (*made["near_duplicates"], f"{folder}: kept; remove it to import these pairs again")
        counts = {split: (images, captions) for split, (images, captions) in made["counts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: is there already and is not the corpus of these pairs; remove it or name "
            "another folder"
        ) from error
    return Imported(folder, counts, bad, told, ())


def _usable(
    pairs: Pairs, converted: dict[MediumKey, Converted]
) -> tuple[list[Pair], list[Problem]]:
    """The pairs whose media were converted and which agree with the earlier ones, and the rest."""
    kept: list[Pair] = []
    bad = list(pairs.problems)
    said: dict[tuple[str, str], Pair] = {}  # files of image and recording: their first pair
    stated: dict[str, Pair] = {}  # an image's file: the first pair that states its split
    for pair in pairs.pairs:
        try:
            for key in pair.media:
                if problem := converted[key].problem:
                    raise BadEntry(f"{key[0]} {shown(key[1])}: {problem}")
            image, sound = (converted[key].file for key in pair.media)
            if pair.split:
                first = stated.setdefault(image, pair)
                if first.split != pair.split:
                    raise BadEntry(
                        f"image {shown(pair.image)} is in {first.split} by {first.place}; one "
                        "picture is in one split: mend one of the two"
                    )
            other = said.setdefault((image, sound), pair)
            if other is not pair:
                same = "" if pair.audio == other.audio else f", as {shown(other.audio)} there,"
                raise BadEntry(
                    f"audio {shown(pair.audio)}{same} is paired with this picture by {other.place} "
                    "too; remove one"
                )
        except BadEntry as error:
            bad.append(Problem(pairs.file, pair.place, str(error)))
        else:
            kept.append(pair)
    return kept, bad


@dataclass(frozen=True, slots=True)
class _Image:
    """A picture of the corpus, the captions of which may name it by several names."""

    file: str
    hash: bytes
    captions: list[tuple[Pair, str]]  # with the recording's file

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(pair.image for pair, _ in self.captions))

    @property
    def stated(self) -> Split | None:
        return next((pair.split for pair, _ in self.captions if pair.split), None)


def _images(
    corpus: Path, kept: Sequence[Pair], converted: dict[MediumKey, Converted]
) -> list[_Image]:
    """In the order of their first pairs. Each caption has a file of its own, as the layout wants
    it: what several pairs say is copied."""
    images: dict[str, _Image] = {}
    taken: set[str] = set()
    for pair in kept:
        image, sound = (converted[key] for key in pair.media)
        entry = images.setdefault(image.file, _Image(image.file, bytes.fromhex(image.hash), []))
        own = sound.file
        if own in taken:
            stem, dot, suffix = own.rpartition(".")
            own = f"{stem}-{pair.number:06d}{dot}{suffix}"
            write_file(corpus / own, (corpus / sound.file).read_bytes())
        taken.add(own)
        entry.captions.append((pair, own))
    return list(images.values())


def _split(
    source: Path, images: Sequence[_Image], groups: np.ndarray, seed: int
) -> dict[str, Split]:
    """The split of each image's file: as stated, else that stated in its group, else by the seed.

    Groups are taken in an order that depends on the seed and their own pictures alone, so that
    pairs which are added later move few of the others. Test takes groups till it has its tenth,
    then val; groups that are larger than a tenth come last, and so into train.
    """
    members: dict[int, list[_Image]] = {}
    for image, group in zip(images, groups.tolist(), strict=True):
        members.setdefault(group, []).append(image)
    split_of: dict[str, Split] = {}
    free: list[list[_Image]] = []
    for group in members.values():
        known = next((image.stated for image in group if image.stated), None)
        if known is None:
            free.append(group)
        else:
            split_of |= {image.file: image.stated or known for image in group}
    total = sum(map(len, free))
    want = max(1, round(HELD_OUT * total))

    def order(group: list[_Image]) -> tuple[bool, str]:
        name = min(image.file for image in group)
        return len(group) > want, hashlib.sha256(f"{seed} {name}".encode()).hexdigest()

    if not split_of and len(free) < len(SPLITS):
        raise InputError(
            f"{source}: has {len(free)} pictures that are not nearly the same, which make no three "
            "splits; add some"
        )
    taken = dict.fromkeys(SPLITS, 0)
    for group in sorted(free, key=order):
        split: Split = "test" if taken["test"] < want else "val" if taken["val"] < want else "train"
        taken[split] += len(group)
        split_of |= {image.file: split for image in group}
    return split_of


def _shared_recordings(
    kept: Sequence[Pair], converted: dict[MediumKey, Converted], images: Sequence[_Image]
) -> list[tuple[str, list[int]]]:
    """Recordings that speak of several pictures: the name of each, and which pictures those are."""
    row = {image.file: i for i, image in enumerate(images)}
    spoken: dict[str, tuple[str, list[int]]] = {}
    for pair in kept:
        image, sound = (converted[key].file for key in pair.media)
        spoken.setdefault(sound, (pair.audio, []))[1].append(row[image])
    return [one for one in spoken.values() if len(one[1]) > 1]


def _told_recordings(
    source: Path,
    images: Sequence[_Image],
    shared: Sequence[tuple[str, list[int]]],
    split_of: dict[str, Split],
) -> list[str]:
    """A line for each recording of several pictures. Raises InputError where the source states
    several splits for one: what is tested would have been learnt."""
    lines = []
    for audio, of in shared:
        names = ", ".join(shown(images[i].names[0]) for i in of)
        splits = [split for split in SPLITS if split in {split_of[images[i].file] for i in of}]
        if len(splits) > 1:
            raise InputError(
                f"{source}: audio {shown(audio)} speaks of pictures in {' and '.join(splits)}, as "
                f"stated: {names}; put them into one split, or record it again"
            )
        lines.append(f"one recording of {len(of)} pictures, all in {splits[0]}: {names}")
    return lines


def _near_duplicates(
    images: Sequence[_Image], groups: np.ndarray, split_of: dict[str, Split]
) -> list[str]:
    """A line for each group of more than one picture."""
    members: dict[int, list[_Image]] = {}
    for image, group in zip(images, groups.tolist(), strict=True):
        members.setdefault(group, []).append(image)
    lines = []
    for group in members.values():
        splits = [split for split in SPLITS if split in {split_of[image.file] for image in group}]
        names = ", ".join(shown(image.names[0]) for image in group)
        if len(splits) > 1:
            lines.append(
                f"warning: near-duplicates in {' and '.join(splits)}, as stated: {names}; remove "
                "those that show the same"
            )
        elif len(group) > 1:
            lines.append(f"near-duplicates, all in {splits[0]}: {names}")
    return lines


def _write_layout(
    corpus: Path, images: Sequence[_Image], split_of: dict[str, Split]
) -> dict[str, tuple[int, int]]:
    """Writes SpokenCOCO's files and sources.json. Returns images and captions of each split."""
    released: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    listed = []
    sources: dict[str, list[str]] = {}
    counts: dict[str, tuple[int, int]] = dict.fromkeys(SPLITS, (0, 0))
    for image in images:
        split = split_of[image.file]
        captions = []
        for pair, wav in image.captions:
            uttid = f"{pair.number:06d}"
            captions.append(
                {"uttid": uttid, "text": pair.text, "speaker": pair.speaker, "wav": wav}
            )
            sources[wav] = [pair.audio]
        sources[image.file] = image.names
        released["train" if split == "train" else "val"].append(
            {"image": image.file, "captions": captions}
        )
        folder, _, name = image.file.rpartition("/")
        listed.append({"filepath": folder, "filename": name, "split": split})
        counts[split] = counts[split][0] + 1, counts[split][1] + len(captions)
    for part, entries in released.items():
        write_file(corpus / f"SpokenCOCO_{part}.json", json.dumps({"data": entries}, indent=1))
    write_file(corpus / "dataset_coco.json", json.dumps({"images": listed}, indent=1))
    write_file(corpus / "sources.json", json.dumps(sources, indent=1))
    return counts


def _remove_unused(corpus: Path, images: Sequence[_Image]) -> None:
    """Removes what earlier tries converted and this one does not use."""
    used = {image.file for image in images}
    used |= {wav for image in images for _, wav in image.captions}
    for folder in ("images", "wavs"):
        for file in list((corpus / folder).rglob("*")):
            if file.is_file() and file.relative_to(corpus).as_posix() not in used:
                file.unlink()
