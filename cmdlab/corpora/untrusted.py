"""A corpus folder that nobody vouches for: its names, paths and values are checked before use."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cmdlab.errors import InputError

MAX_METADATA_BYTES = 2 << 30  # SpokenCOCO's largest file has about 0.2 GB


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and where: `file` is relative to the corpus folder."""

    file: str
    entry: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.entry}: {self.message}"


class BadEntry(Exception):
    """What an entry holds cannot be used; the message says why and what to do."""


class UntrustedFolder:
    """Reads the metadata files of a corpus and finds its media files, never outside `root`.

    A bad entry raises InputError; with `skip_bad` it is added to `problems` instead. A file that
    cannot be read at all always raises. `digests` holds the SHA-256 of each metadata file read.
    """

    def __init__(self, root: Path, *, skip_bad: bool) -> None:
        if not root.is_dir():
            raise InputError(f"{root}: is not a folder; give the folder that holds the corpus")
        self.root = root
        self.skip_bad = skip_bad
        self.problems: list[Problem] = []
        self.digests: dict[str, str] = {}
        self._real_root = os.path.realpath(root)
        self._listings: dict[str, dict[str, os.DirEntry[str]] | str] = {}

    def reject(self, file: str, entry: str, message: str) -> None:
        """Report one bad entry."""
        problem = Problem(file, entry, message)
        if not self.skip_bad:
            raise InputError(f"{self.root / file}: {entry}: {message}")
        self.problems.append(problem)

    def fail(self, file: str, message: str) -> NoReturn:
        """Report a fault that no skipping mends."""
        raise InputError(f"{self.root / file}: {message}")

    def locate(self, relative: str) -> Path:
        """The regular file at this path below the folder. Raises BadEntry.

        Each folder is listed once, so that 600,000 files cost seconds.
        """
        relative = plain_path(relative)
        folder, _, name = relative.rpartition("/")
        listing = self._listings.get(folder)
        if listing is None:
            listing = self._listings[folder] = self._list(folder)
        if isinstance(listing, str):
            raise BadEntry(listing)
        entry = listing.get(name)
        if entry is None:
            raise BadEntry(f"there is no file {shown(relative)}; add it or remove the entry")
        if entry.is_symlink():
            self._refuse_escape(relative)
        try:
            regular = entry.is_file()
        except OSError:
            regular = False
        if not regular:
            raise BadEntry(f"{shown(relative)} is not a regular file; replace it")
        return self.root / relative

    def has(self, relative: str) -> bool:
        """Whether anything, usable or not, lies at this path of our own making."""
        return os.path.lexists(self.root / relative)

    def has_folder(self, name: str) -> bool:
        """Whether a folder of this plain name lies at the top."""
        return "/" not in name and is_name(name) and (self.root / name).is_dir()

    def read_bytes(self, relative: str) -> bytes:
        """A metadata file's bytes; its digest is kept. Raises InputError."""
        try:
            with self.locate(relative).open("rb") as file:
                if os.fstat(file.fileno()).st_size > MAX_METADATA_BYTES:
                    self.fail(relative, f"is larger than {MAX_METADATA_BYTES >> 30} GiB; split it")
                content = file.read()
        except BadEntry as error:
            raise InputError(f"{self.root}: {error}") from error
        except OSError as error:
            self.fail(relative, f"cannot be read ({error.strerror}); mend its rights")
        self.digests[relative] = hashlib.sha256(content).hexdigest()
        return content

    def read_text(self, relative: str) -> str:
        """A metadata file's text: UTF-8, with or without a byte order mark. Raises InputError."""
        content = self.read_bytes(relative)
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            self.fail(relative, f"line {line}: is not UTF-8; save the file as UTF-8")

    def read_lines(self, relative: str) -> list[tuple[str, str]]:
        """The lines that are not blank, each with its place ("line 12"), whatever the line ends."""
        lines = self.read_text(relative).split("\n")  # splitlines() also splits at U+2028
        return [(f"line {n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]

    def read_json(self, relative: str) -> Any:
        """A metadata file's JSON value. Raises InputError, for a repeated key too."""
        try:
            return json.loads(
                self.read_text(relative),
                object_pairs_hook=_without_repeated_keys,
                parse_constant=_refuse_constant,
            )
        except InputError:
            raise
        except RecursionError:
            self.fail(relative, "is nested too deeply to be a corpus file; restore the file")
        except ValueError as error:
            self.fail(relative, f"is not valid JSON ({error}); restore or mend the file")

    def _list(self, folder: str) -> dict[str, os.DirEntry[str]] | str:
        """The folder's entries by name, or why it cannot be used."""
        try:
            self._refuse_escape(folder)
            with os.scandir(self.root / folder) as entries:
                return {entry.name: entry for entry in entries}
        except BadEntry as error:
            return str(error)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            return f"folder {shown(folder)} cannot be read ({reason}); add it or mend the path"

    def _refuse_escape(self, relative: str) -> None:
        real = os.path.realpath(self.root / relative)
        if os.path.commonpath([real, self._real_root]) != self._real_root:
            raise BadEntry(
                f"{shown(relative)} is a link that leaves the corpus folder; "
                "put the files themselves there"
            )


def plain_path(relative: str) -> str:
    """A path below some folder in its shortest form: "./a//b/../c" is "a/c".

    Raises BadEntry for one that leaves the folder.
    """
    if "\\" in relative or not is_name(relative):
        raise BadEntry(f"{shown(relative)} is no path; write it as printable text, with '/'")
    plain = posixpath.normpath(relative)
    if plain.startswith("/") or plain.split("/")[0] == "..":
        raise BadEntry(
            f"path {shown(relative)} leaves the corpus folder; write it relative to that folder"
        )
    return plain


def text_of(entry: Any, key: str) -> str:
    """A field that must be text. Raises BadEntry where it is missing or anything else."""
    value = _field(entry, key)
    if not isinstance(value, str):
        raise BadEntry(f"'{key}' is {shown(value)}, which is no text; write it in quotes")
    if not is_text(value):
        raise BadEntry(f"'{key}' {shown(value)} holds half a character; mend it")
    return value


def name_of(entry: Any, key: str) -> str:
    """A field that must be fit for an id or a path. Raises BadEntry."""
    value = text_of(entry, key)
    if value == "":
        raise BadEntry(f"'{key}' is empty; fill it or remove the entry")
    if not is_name(value):
        raise BadEntry(f"'{key}' {shown(value)} is not printable; mend it")
    return value


def list_of(entry: Any, key: str) -> list[Any]:
    """A field that must be a list. Raises BadEntry where it is missing or anything else."""
    value = _field(entry, key)
    if not isinstance(value, list):
        raise BadEntry(f"'{key}' is {shown(value)}, which is no list; mend it")
    return value


def is_name(value: object) -> bool:
    """Whether this is text fit for an id or a path: not empty, nothing invisible in it."""
    return isinstance(value, str) and value != "" and value.isprintable()


def is_text(value: object) -> bool:
    """Whether this is text that can be written as UTF-8 (JSON can state half a character)."""
    if not isinstance(value, str):
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """A value of a data file, on one line and short enough for a message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def is_regular(path: Path) -> bool:
    """Whether the path is a regular file: opening a pipe would wait for ever."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _field(entry: Any, key: str) -> Any:
    if not isinstance(entry, dict):
        raise BadEntry(f"{shown(entry)} is no object with '{key}'; mend or remove it")
    if key not in entry:
        raise BadEntry(f"'{key}' is missing; add it or remove the entry")
    return entry[key]


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {shown(repeated)} is repeated in one object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
