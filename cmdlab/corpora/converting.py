"""Converts all media of a source into the folder of a corpus: by all cores, and resumably."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cmdlab.corpora.foreign_media import convert_picture, convert_sound
from cmdlab.corpora.pairs import Medium, MediumKey, Pairs
from cmdlab.corpora.untrusted import BadEntry
from cmdlab.errors import InputError
from cmdlab.outputs import write_file


@dataclass(frozen=True, slots=True)
class Converted:
    """A medium in the corpus: its file there, a picture's `perceptual_hash`, or why it is not."""

    file: str = ""
    hash: str = ""  # in hexadecimal digits
    problem: str | None = None


def convert_all(
    pairs: Pairs, making: Path, side: int | None, workers: int, progress: bool
) -> dict[MediumKey, Converted]:
    """Converts what the pairs name into `making`/corpus, but for what was converted before.

    `making` keeps a journal, of which a line is written once its file is whole, so a kill at any
    moment loses no more than what was being converted. Conversions to another `side` are cleared
    away.
    Raises InputError where `making` is anything else than what this left there.
    """
    _start_or_go_on(making, side)
    wanted = {key for pair in pairs.pairs for key in pair.media}
    before = _read_journal(making)
    done: dict[MediumKey, Converted] = {}

    def convert(medium: Medium) -> Converted:
        return before.get((*medium.key, medium.version)) or _convert(
            making / "corpus", medium, side, pairs.trimmed
        )

    bar = tqdm(total=len(wanted), desc="importing", unit=" files", disable=not progress)
    with (making / _JOURNAL).open("a") as journal, bar:
        for medium, converted in _in_order(convert, pairs.media(), workers):
            done[medium.key] = converted
            key = (*medium.key, medium.version)
            if not converted.problem and key not in before:
                entry = [*key, converted.file, converted.hash]
                journal.write(json.dumps(entry) + "\n")
                journal.flush()
            bar.update()
    return done


def _start_or_go_on(making: Path, side: int | None) -> None:
    """Keeps what was converted to the same size, and clears away what was not."""
    marker, text = making / "size.json", json.dumps(side)
    if making.exists():
        if not marker.is_file() and any(making.iterdir()):
            raise InputError(f"{making}: is in the way; move it or remove it")
        if marker.is_file() and marker.read_text() == text:
            return
        shutil.rmtree(making)
    (making / "corpus").mkdir(parents=True)
    write_file(marker, text)


_JOURNAL = "journal.jsonl"


def _read_journal(making: Path) -> dict[tuple[str, str, str], Converted]:
    """What was converted before, by kind, name and version; a line cut by a kill is dropped."""
    journal = making / _JOURNAL
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if whole != lines:
        write_file(journal, "".join(whole))
    converted = {}
    for line in whole:
        kind, name, version, file, hash_ = json.loads(line)
        if (making / "corpus" / file).is_file():
            converted[kind, name, version] = Converted(file, hash_)
    return converted


def _convert(corpus: Path, medium: Medium, side: int | None, trimmed: bool) -> Converted:
    """Writes a medium into the corpus, in a file named by its content: equal ones are one file."""
    hash_ = b""
    try:
        if medium.key[0] == "audio":
            folder = "wavs"
            content, suffix = convert_sound(medium.read(), trimmed=trimmed)
        else:
            folder = "images"
            content, suffix, hash_ = convert_picture(medium.read(), side=side)
    except BadEntry as error:
        return Converted(problem=str(error))
    digest = hashlib.sha256(content).hexdigest()[:32]
    file = f"{folder}/{digest[:2]}/{digest}{suffix}"
    write_file(corpus / file, content)
    return Converted(file, hash_.hex())


def _in_order(
    function: Callable[[Medium], Converted], media: Iterator[Medium], workers: int
) -> Iterator[tuple[Medium, Converted]]:
    """The results of `workers` threads in the order of the media, few of which are held at once."""
    waiting: deque[tuple[Medium, Future[Converted]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for medium in media:
                waiting.append((medium, pool.submit(function, medium)))
                if len(waiting) > 4 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
