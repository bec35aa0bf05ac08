"""Reads a spoken-image data set in a hub's parquet parts, from a local folder, with pyarrow.

Two forms are known. In the hub's Flickr8k Audio the parts are `audio`, `images` and `qrels`, the
last with columns audio_id and image_id. In the benchmark mteb's retrieval data sets they are
`queries`, `corpus` and `qrels` (or `default`), with query-id, corpus-id and score; either of the
first two holds the recordings. A part is a folder of parquet files, or one file or several named
after it. A medium is a struct of bytes and path, and its path is a name, nothing that is opened.
No code of a data set is run.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cmdlab.corpora.corpus import SPLITS, Split
from cmdlab.corpora.flickr8k_audio import SPLIT_LISTS
from cmdlab.corpora.pairs import OTHER_NAMES, Medium, MediumKey, Pair, Pairs
from cmdlab.corpora.untrusted import BadEntry, UntrustedFolder, is_name, shown
from cmdlab.errors import InputError

FORMS = (
    ("audio", "images", "qrels"),
    ("queries", "corpus", "qrels"),
    ("queries", "corpus", "default"),
)
ID_COLUMNS = (("audio_id", "image_id"), ("query-id", "corpus-id"))
ROWS = 64  # read at a time; a row is a photograph or a recording


def find_parts(root: Path) -> dict[str, list[str]]:
    """The parquet files of each part, relative to the folder; empty where there are no parts."""
    if not root.is_dir():
        return {}
    for form in FORMS:
        parts = {name: _files_of(root, name) for name in form}
        if all(parts.values()):
            return parts
    return {}


def read_parquet_parts(root: Path) -> Pairs:
    """The pairs of such a folder, in the order of its qrels.

    An image's split is that of the file that holds it (`test-00000-of-00003.parquet`). Where all
    are in one split "train", as in the hub's Flickr8k Audio, the three lists
    `Flickr_8k.{train,dev,test}Images.txt` beside the parts say it; images that no list has are
    left, as every paper leaves them.
    A caption's text is its recording's: an image's text is what one of its five captions says.
    Raises InputError for a folder without parts, a file that is not as described and for missing
    lists.
    """
    folder = UntrustedFolder(root, skip_bad=True)
    parts = find_parts(root)
    if not parts:
        raise InputError(
            f"{root}: holds no parquet parts; give a folder with audio, images and qrels, or with "
            "queries, corpus and qrels, or a CSV file of pairs"
        )
    first, second, qrels = parts
    spoken, seen = (
        (first, second) if "audio" in _columns(folder, parts[first][0]) else (second, first)
    )
    rows = {
        "audio": _index(folder, parts[spoken], "audio"),
        "image": _index(folder, parts[seen], "image"),
    }
    split_of, notes = _splits(folder, rows["image"])
    pairs: list[Pair] = []
    for file, place, audio, image in _judgements(folder, parts[qrels], rows["audio"].keys()):
        missing = [
            f"{kind} {shown(name)} is in no part; add it or remove the row"
            for kind, name in (("audio", audio), ("image", image))
            if name not in rows[kind]
        ]
        if missing:
            folder.reject(file, place, missing[0])
        elif image in split_of:
            row = rows["audio"][audio]
            split, place = split_of[image], f"{file} {place}"
            pairs.append(Pair(len(pairs), place, audio, image, row.text, row.speaker, split))
    wanted: set[MediumKey] = {key for pair in pairs for key in pair.media}
    for image in split_of:
        if ("image", image) not in wanted:
            message = f"the image has no recording in {qrels}; add one or remove the image"
            folder.reject(rows["image"][image].file, shown(image), message)

    def media() -> Iterator[Medium]:
        yield from _media(folder, parts[seen], "image", wanted)
        yield from _media(folder, parts[spoken], "audio", wanted)

    return Pairs(root.name, pairs, media, folder.problems, notes, trimmed=False)


@dataclass(frozen=True, slots=True)
class _Row:
    """What the first reading keeps of a medium's row: all but the medium."""

    file: str
    path: str
    text: str
    speaker: str


def _files_of(root: Path, part: str) -> list[str]:
    """A part's files in the order of their names: `part/*.parquet`, `part.parquet`, `part-*`."""
    try:
        inside = [f"{part}/{name}" for name in os.listdir(root / part)]
    except OSError:
        inside = []
    beside = [name for name in os.listdir(root) if re.match(rf"{part}(-\d.*)?\.parquet$", name)]
    return sorted(name for name in inside + beside if name.endswith(".parquet"))


def _open(folder: UntrustedFolder, file: str) -> Any:
    """A pyarrow ParquetFile. Raises InputError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"{folder.root / file}: pyarrow is missing, which reads it; pip install cmdlab[parquet]"
        ) from error
    try:
        return parquet.ParquetFile(folder.locate(file))
    except BadEntry as error:
        raise InputError(f"{folder.root}: {error}") from error
    except (OSError, pyarrow.ArrowException) as error:
        folder.fail(file, f"is no readable parquet file ({_line(error)}); fetch it again")


def _columns(folder: UntrustedFolder, file: str) -> list[str]:
    with _open(folder, file) as table:
        return list(table.schema_arrow.names)


def _rows(
    folder: UntrustedFolder, file: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row's number and these columns of it. Raises InputError."""
    import pyarrow

    with _open(folder, file) as table:
        there = table.schema_arrow.names
        for name in needed:
            if name.split(".")[0] not in there:
                folder.fail(
                    file, f"has no column {shown(name)}, but {', '.join(map(shown, there))}"
                )
        columns = [*needed, *(name for name in optional if name.split(".")[0] in there)]
        number = 0
        try:
            for batch in table.iter_batches(batch_size=ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            folder.fail(file, f"row {number}: cannot be read ({_line(error)}); fetch it again")


def _id_column(columns: list[str]) -> str:
    return "_id" if "_id" in columns and "id" not in columns else "id"


def _index(folder: UntrustedFolder, files: list[str], kind: str) -> dict[str, _Row]:
    """Each medium's row by its id, without the medium."""
    rows: dict[str, _Row] = {}
    for file in files:
        column = _id_column(_columns(folder, file))
        optional = (f"{kind}.path", "text", "speaker", "speaker_id")
        for number, row in _rows(folder, file, (column,), optional):
            name = str(row[column])
            place = f"row {number} {shown(name)}"
            if not is_name(name):
                folder.reject(file, place, f"'{column}' is not printable; mend it")
            elif name in rows:
                folder.reject(file, place, f"the {kind} is in {rows[name].file} too; remove one")
            else:
                medium, speaker = row.get(kind), row.get("speaker", row.get("speaker_id"))
                path = medium.get("path") if isinstance(medium, dict) else None
                rows[name] = _Row(file, _text(path), _text(row.get("text")), _text(speaker))
    return rows


def _judgements(
    folder: UntrustedFolder, files: list[str], recordings: Any
) -> Iterator[tuple[str, str, str, str]]:
    """File, place, recording and image of each row that says that the two belong together."""
    for file in files:
        there = _columns(folder, file)
        names = next((pair for pair in ID_COLUMNS if set(pair) <= set(there)), ID_COLUMNS[0])
        for number, row in _rows(folder, file, names, ("score",)):
            first, second = (str(row[name]) for name in names)
            if names == ID_COLUMNS[1] and first not in recordings:
                first, second = second, first  # the queries are the images
            if (row.get("score", 1) or 0) > 0:
                yield file, f"row {number}", first, second


def _splits(folder: UntrustedFolder, images: dict[str, _Row]) -> tuple[dict[str, Split], list[str]]:
    """The split of each image that has one, and a note on those that have none."""
    lists = {
        split: name
        for split, file in SPLIT_LISTS.items()
        for name in (file, f"Flickr8k_text/{file}")
        if folder.has(name)
    }
    stated = {file: _split_in_name(file) for file in {row.file for row in images.values()}}
    if not lists:
        if set(stated.values()) <= {"train", None}:
            raise InputError(
                f"{folder.root}: all {len(images):,} images are in one split; put the papers' "
                f"lists {', '.join(SPLIT_LISTS.values())} beside the parts"
            )
        split_of = {name: split for name, row in images.items() if (split := stated[row.file])}
    elif len(lists) < len(SPLIT_LISTS):
        missing = [SPLIT_LISTS[split] for split in SPLITS if split not in lists]
        folder.fail(missing[0], "is missing, and the other lists are there; add it")
    else:
        split_of = _listed(folder, lists, images)
    left = len(images) - len(split_of)
    return split_of, [f"{left:,} images are in no split and are left"] if left else []


def _listed(
    folder: UntrustedFolder, lists: dict[Split, str], images: dict[str, _Row]
) -> dict[str, Split]:
    """The split of each image that a list names, as the file that it was, with or without .jpg."""
    known: dict[str, str] = {}
    for name, row in images.items():
        for spelling in (posixpath.basename(row.path), f"{name}.jpg", name):
            known[spelling] = name
    split_of: dict[str, Split] = {}
    for split, file in lists.items():
        for place, line in folder.read_lines(file):
            image = known.get(line)
            if image is None:
                message = "no image of the parts is called so; add it or remove the line"
                folder.reject(file, f"{place} {shown(line)}", message)
            elif split_of.setdefault(image, split) != split:
                message = f"the image is in {lists[split_of[image]]} already; remove one"
                folder.reject(file, f"{place} {shown(line)}", message)
    return split_of


def _split_in_name(file: str) -> Split | None:
    """The split that a part's file states in its name: `validation-00000-of-00001.parquet`."""
    name = re.split(r"[-.]", posixpath.basename(file))[0]
    return next((split for split in SPLITS if split == OTHER_NAMES.get(name, name)), None)


def _media(
    folder: UntrustedFolder, files: list[str], kind: Any, wanted: set[MediumKey]
) -> Iterator[Medium]:
    """The media that a pair names, in the order of the files, each once."""
    given: set[str] = set()
    for file in files:
        found = folder.locate(file).stat()
        version = f"{file} {found.st_size} {found.st_mtime_ns}"
        column = _id_column(_columns(folder, file))
        for _, row in _rows(folder, file, (column, kind)):
            name = str(row[column])
            if (kind, name) in wanted and name not in given:
                given.add(name)
                yield Medium((kind, name), version, partial(_bytes_of, row[kind]))


def _bytes_of(medium: Any) -> bytes:
    content = medium.get("bytes") if isinstance(medium, dict) else medium
    if not isinstance(content, bytes):
        raise BadEntry("its row holds no bytes; fetch the data set with its media embedded")
    return content


def _text(value: object) -> str:
    return " ".join(str(value).split()) if isinstance(value, str | int) else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
