"""The hash of every file of a generated corpus, by which it is known."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from cmdlab.corpora.corpus import hash_of_lines
from cmdlab.corpora.untrusted import is_name, shown
from cmdlab.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def content_hash(root: Path | str, *, workers: int | None = None, progress: bool = False) -> str:
    """The SHA-256 of every file of a generated corpus but corpus.json, which holds it.

    It is taken over the sorted lines "<sha256 of the file>  <relative posix path>\\n".
    `workers` threads read the files (default: one a core); their number does not change it.
    Raises InputError for a link or a file that cannot be read.
    """
    root = Path(root)
    files = [name for name in _files_below(root) if name != "corpus.json"]

    def line(name: str) -> str:
        try:
            with (root / name).open("rb") as file:
                return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n"
        except OSError as error:
            raise InputError(f"{root / name}: cannot be read ({error.strerror})") from error

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        hashed = tqdm(
            in_slices(pool, line, files),
            total=len(files),
            desc="content hash",
            unit=" files",
            disable=not progress,
        )
        return hash_of_lines(sorted(hashed))


def in_slices(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    size: int = 4096,
) -> Iterator[Result]:
    """`pool.map` that holds only one slice's futures at a time: corpora have a million files."""
    for start in range(0, len(items), size):
        yield from pool.map(function, items[start : start + size])


def _files_below(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root, onerror=_cannot_list):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() or (name in files and not path.is_file()) or not is_name(name):
                raise InputError(
                    f"{folder}: {shown(name)} is a link, no regular file, or has no printable "
                    "name; a generated corpus has none such: remove it"
                )
        for name in files:
            yield Path(folder, name).relative_to(root).as_posix()


def _cannot_list(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); mend its rights")
