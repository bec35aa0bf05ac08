"""Pairs of a recording and a picture that are to become a corpus, and their form as a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cmdlab.corpora.corpus import SPLITS, Split
from cmdlab.corpora.untrusted import BadEntry, Problem, UntrustedFolder, is_regular, shown

MAX_MEDIUM_BYTES = 1 << 29  # five minutes at 192 kHz in four channels, and the largest photographs

MediumKey = tuple[Literal["audio", "image"], str]
"""What a pair calls a recording or a picture: its kind, and its name in the source."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One spoken caption of one picture; `place` says where the source has it ("line 12").

    `split` is None where the source leaves the choice to us.
    """

    number: int
    place: str
    audio: str
    image: str
    text: str
    speaker: str
    split: Split | None

    @property
    def media(self) -> tuple[MediumKey, MediumKey]:
        return ("image", self.image), ("audio", self.audio)


@dataclass(frozen=True, slots=True)
class Medium:
    """One recording or picture of a source. `version` changes when its content does.

    `read` gives the file's bytes. Raises BadEntry.
    """

    key: MediumKey
    version: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Pairs:
    """All pairs of a source, `file` its name. `media` gives each medium that a pair names once.

    `problems` are the entries that are no pair; `notes` are lines for the user. `trimmed` says
    whether recordings lose long silence at their ends, as what is searched for does; a published
    corpus stays as its publisher has it.
    """

    file: str
    pairs: list[Pair]
    media: Callable[[], Iterator[Medium]]
    problems: list[Problem]
    notes: list[str]
    trimmed: bool


COLUMNS = ("audio", "image", "text", "speaker", "split")
OTHER_NAMES: dict[str, Split] = {"dev": "val", "valid": "val", "validation": "val"}


def read_pairs_csv(path: Path) -> Pairs:
    """The pairs of a CSV file with the columns audio and image, and text, speaker, split at will.

    The separator is a comma, or a semicolon or tab if the header has no comma. Media files are
    named relative to the file's own folder, and lie in it.
    Raises InputError for a file that is no such table.
    """
    folder = UntrustedFolder(path.parent, skip_bad=True)
    table = csv.reader(
        io.StringIO(text := folder.read_text(path.name), newline=""),
        delimiter=_separator(text.split("\n", 1)[0]),
        strict=True,
    )
    pairs: list[Pair] = []
    versions: dict[MediumKey, tuple[Path, str]] = {}
    try:
        header = [name.strip().lower() for name in next(table, [])]
        _check_header(folder, path.name, header)
        for row in table:
            if not any(map(str.strip, row)):
                continue
            place = f"line {table.line_num}"
            try:
                pair = _pair(table.line_num, place, header, row)
                for key in pair.media:
                    if key not in versions:
                        versions[key] = _located(folder, *key)
            except BadEntry as error:
                folder.reject(path.name, place, str(error))
            else:
                pairs.append(pair)
    except csv.Error as error:
        folder.fail(path.name, f"line {table.line_num}: is no CSV ({error}); save the table again")

    def media() -> Iterator[Medium]:
        for key in dict.fromkeys(key for pair in pairs for key in pair.media):
            file, version = versions[key]
            yield Medium(key, version, partial(bytes_of, file))

    unused = [shown(name) for name in header if name not in COLUMNS]
    notes = [f"{path.name}: not used: column {', '.join(unused)}"] if unused else []
    return Pairs(path.name, pairs, media, folder.problems, notes, trimmed=True)


def split_named(name: str) -> Split:
    """The split of this name, whichever of its names that is. Raises BadEntry."""
    plain = name.strip().lower()
    for split in SPLITS:
        if split == OTHER_NAMES.get(plain, plain):
            return split
    raise BadEntry(f"split {shown(name)} is none of {', '.join(SPLITS)}; mend it or leave it empty")


def _separator(header: str) -> str:
    return next((mark for mark in ",;\t" if mark in header), ",")


def _check_header(folder: UntrustedFolder, file: str, header: list[str]) -> None:
    for name in ("audio", "image"):
        if name not in header:
            folder.fail(
                file, f"line 1: column '{name}' is missing; name the columns: {','.join(COLUMNS)}"
            )
    for name in COLUMNS:
        if header.count(name) > 1:
            folder.fail(file, f"line 1: column '{name}' is there twice; remove one")


def _pair(number: int, place: str, header: list[str], row: list[str]) -> Pair:
    if len(row) != len(header):
        raise BadEntry(
            f"has {len(row)} fields, not {len(header)}; put fields that hold a separator in quotes"
        )
    value = dict.fromkeys(COLUMNS, "") | dict(zip(header, row, strict=True))
    text, speaker = (" ".join(value[column].split()) for column in ("text", "speaker"))
    split = split_named(value["split"]) if value["split"].strip() else None
    audio, image = value["audio"].strip(), value["image"].strip()
    return Pair(number, place, audio, image, text, speaker, split)


def _located(folder: UntrustedFolder, kind: str, name: str) -> tuple[Path, str]:
    """A medium's file and version. Raises BadEntry."""
    if not name:
        raise BadEntry(f"'{kind}' is empty; fill it or remove the line")
    try:
        file = folder.locate(name)
        found = file.stat()
    except BadEntry as error:
        raise BadEntry(f"{kind}: {error}") from error
    except OSError as error:
        raise BadEntry(f"{kind} {shown(name)} cannot be read ({error.strerror})") from error
    return file, f"{found.st_size} {found.st_mtime_ns}"


def bytes_of(file: Path) -> bytes:
    """A medium's content. Raises BadEntry for what is no file, or has over MAX_MEDIUM_BYTES."""
    if not is_regular(file):
        raise BadEntry("is no file; mend the path")
    try:
        with file.open("rb") as content:
            data = content.read(MAX_MEDIUM_BYTES + 1)
    except OSError as error:
        raise BadEntry(f"cannot be read ({error.strerror}); mend its rights") from error
    if len(data) > MAX_MEDIUM_BYTES:
        raise BadEntry(f"has over {MAX_MEDIUM_BYTES >> 20} MiB; cut or shrink it")
    return data
