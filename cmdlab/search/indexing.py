"""Makes the index of a folder of pictures, and brings it up to date.

Only what is new or changed is embedded: a file whose size and time are the index's is not opened,
and one whose content is known by its hash, moved or renamed or touched, keeps its vector. What was
embedded is written at once, a batch a file; when all is done the new arrays are laid beside the old
ones and `index.json` is renamed. So it can be killed at any moment, and the next run goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cmdlab.errors import InputError
from cmdlab.outputs import write_file
from cmdlab.search.index import ARRAYS, FORMAT, MANIFEST, Index, Unreadable
from cmdlab.search.nearest import padded, quantise
from cmdlab.shipped import MODULES, model_folder

BATCH = 64  # pictures that a thread reads and embeds at a time
ROWS = 4096  # of the arrays written at a time
LOCK = "index.lock"
FRESH = "fresh"  # the folder of what was embedded since the last generation
SYSTEM_FOLDERS = {"@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


class Embedder(Protocol):
    """What an index needs of a model, as `Retriever` has it."""

    @property
    def dimension(self) -> int: ...

    def embed_images(self, pictures: Sequence[Path]) -> NDArray[np.float32]:
        """float32 [n, dimension] of unit norm; InputError for the first that cannot be read."""
        ...


@dataclass
class Indexed:
    """What a run did. `str()` gives it as lines to print."""

    index: Path
    pictures: int = 0
    embedded: int = 0
    recognised: int = 0  # by their content: moved, renamed, copied or touched
    forgotten: int = 0  # contents that are no longer there
    unreadable: list[Unreadable] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"left out: {line}" for line in self.left_out]
        lines += [f"unreadable: {one.path}: {one.reason}" for one in self.unreadable]
        lines.append(
            f"{self.index}: {self.pictures:,} pictures; {self.embedded:,} embedded, "
            f"{self.recognised:,} known by their content, {self.forgotten:,} forgotten, "
            f"{len(self.unreadable):,} unreadable"
        )
        return "\n".join(lines)


def index_pictures(
    pictures: Path,
    index: Path,
    model: Path | str,
    open_model: Callable[[], Embedder],
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Indexed:
    """Make or update `index`, of all pictures below the folder `pictures`.

    model: a folder, or the name of a module that ships, kept for those who search; open_model opens
    it, and is called only where there is something to embed. `workers` threads read, hash and
    embed (default: one a core). Hidden and system files, links that lead out and links to folders
    are left out. Pictures that cannot be read are listed, with reasons, and the others go on.

    Raises InputError for an index of another model, a folder that is no index, one that another run
    works on, and for a folder without pictures: more likely a disk that is not there than a wish.
    """
    if not pictures.is_dir():
        raise InputError(f"{pictures}: is no folder; name the folder that holds the pictures")
    identity = model_identity(model)
    with _alone(index):
        before = _opened(index, model, identity)
        done = Indexed(index)
        found = list(_walk(pictures, index, done.left_out))
        if not found:
            seen = "".join(f"; left out: {line}" for line in done.left_out)
            indexed = f" where its index has {len(before):,}" if before else ""
            raise InputError(
                f"{pictures}: holds no picture{indexed}{seen}; name another folder, or mount it"
            )
        kept, done.unreadable, doubtful = _compare(found, before)
        manifest = _Manifest(
            FORMAT,
            _lasting_name(model),
            identity,
            before.dimension if before else 0,
            os.path.relpath(os.path.realpath(pictures), os.path.realpath(index)),
            before.generation if before else "",
            done.unreadable,
        )
        if doubtful:
            known = _known(index, before)
            embedder = open_model()
            manifest.dimension = embedder.dimension
            if before is None:  # what a run leaves that is killed is to be known as an index
                _publish(index, manifest, [])
            for looked in _look_at_all(doubtful, pictures, known, embedder, workers, progress):
                known |= _keep(index / FRESH, looked.fresh, embedder.dimension)
                kept += [_Entry(one, known[one.hash]) for one in looked.pictures]
                done.unreadable += looked.unreadable
                done.embedded += len(looked.fresh)
                done.recognised += len(looked.pictures) - len(looked.fresh)
        kept.sort(key=lambda entry: os.fsencode(entry.found.path))
        done.unreadable.sort(key=lambda one: os.fsencode(one.path))
        done.pictures = len(kept)
        if before:
            there = {entry.found.hash for entry in kept}
            done.forgotten = sum(one.tobytes() not in there for one in before.hashes)
        if before is None or doubtful or len(kept) < len(before):
            _publish(index, manifest, kept)
        elif _written(manifest) != (index / MANIFEST).read_text(encoding="utf-8"):
            write_file(index / MANIFEST, _written(manifest))
    return done


def model_identity(model: Path | str) -> str:
    """The SHA-256 of a model's two files, which say which frozen encoders it belongs to.

    It loads no torch. Raises InputError where the files are missing.
    """
    folder = model_folder(model)
    digest = hashlib.sha256()
    for name in ("model.json", "model.safetensors"):
        try:
            digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
        except OSError as error:
            raise InputError(
                f"{folder / name}: cannot be read ({error.strerror}); give a trained model's "
                "folder, as RUN/model"
            ) from error
    return digest.hexdigest()


def _lasting_name(model: Path | str) -> str:
    """The name of a module that ships, as it is, or a folder, wherever one stands."""
    folder = model_folder(model)
    return folder.name if folder.parent == MODULES else str(folder)


class _Found(NamedTuple):
    """A picture's file; its hash is known once it has been looked at."""

    path: str
    size: int
    modified: int  # ns
    changed: int  # ns
    hash: bytes = b""


class _Entry(NamedTuple):
    found: _Found
    vector: NDArray[np.float32]  # [D], a view of a memory-mapped file


class _Looked(NamedTuple):
    """A batch that a thread has read."""

    pictures: list[_Found]
    fresh: dict[bytes, NDArray[np.float32]]  # vectors [D] by hash, of contents not known before
    unreadable: list[Unreadable]


@dataclass
class _Manifest:
    """What `index.json` says."""

    format: str
    model: str
    identity: str
    dimension: int
    pictures: str  # relative to the index, so that both may be moved together
    generation: str
    unreadable: list[Unreadable]


@contextmanager
def _alone(index: Path) -> Iterator[None]:
    """The index's folder, made where there is none, for this process only."""
    try:
        index.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in index.iterdir()}
        if names and not names & {MANIFEST, LOCK}:
            raise InputError(f"{index}: is a folder of something else; name another one by -o")
        lock = (index / LOCK).open("ab")
    except OSError as error:
        raise InputError(
            f"{index}: cannot be written ({error.strerror}); name another one by -o"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{index}: another run works on it; wait for its end") from error
        yield


def _opened(index: Path, model: Path | str, identity: str) -> Index | None:
    if not (index / MANIFEST).exists():
        return None
    before = Index(index)
    if before.identity != identity:
        raise InputError(
            f"{index}: was made by {before.model} of SHA-256 {before.identity[:12]}…, and {model} "
            f"is {identity[:12]}…; use that model, name another index by -o, or remove this one"
        )
    return before


def _walk(pictures: Path, index: Path, left_out: list[str]) -> Iterator[_Found]:
    """Every picture's file by its name's ending, as the system's stat has it; nothing is opened."""
    endings = _endings()
    others: Counter[str] = Counter()
    top = os.path.realpath(pictures)
    own = os.path.realpath(index)
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(os.path.join(top, folder)) as listing:
                entries = sorted(listing, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            left_out.append(f"{folder or pictures}: cannot be listed ({error.strerror})")
            continue
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                continue
            if entry.is_dir(follow_symlinks=False):
                if entry.path != own:
                    folders.append(path)
                continue
            if entry.is_symlink():
                leads = os.path.realpath(entry.path)
                if os.path.commonpath([leads, top]) != top or not os.path.isfile(leads):
                    left_out.append(f"{path}: is a link that leads out, to a folder or nowhere")
                    continue
            ending = os.path.splitext(entry.name)[1].lower()
            if ending not in endings:
                others[ending or "no ending"] += 1
            elif entry.is_file():
                try:
                    status = entry.stat()
                except OSError:  # removed meanwhile
                    continue
                yield _Found(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if others:
        counts = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common())
        left_out.append(f"by the endings of their names, {counts}")


def _endings() -> frozenset[str]:
    """Those of all that Pillow reads but PostScript, which is a program that Ghostscript runs."""
    from PIL import Image

    known = Image.registered_extensions().items()
    return frozenset(ending for ending, name in known if name in Image.OPEN and name != "EPS")


def _compare(
    found: list[_Found], before: Index | None
) -> tuple[list[_Entry], list[Unreadable], list[_Found]]:
    """The pictures that are as the index has them, readable or not, and those to look at."""
    if before is None:
        return [], [], found
    rows = {before.path(row): row for row in range(len(before))}
    bad = {one.path: one for one in before.unreadable}
    times = before.times.tolist()
    kept, unreadable, doubtful = [], [], []
    for one in found:
        row, failed = rows.get(one.path), bad.get(one.path)
        if row is not None and times[row] == [one.size, one.modified]:
            seen = one._replace(hash=before.hashes[row].tobytes())
            kept.append(_Entry(seen, before.vectors[row]))
        elif failed and (failed.size, failed.changed) == (one.size, one.changed):
            unreadable.append(failed)
        else:
            doubtful.append(one)
    return kept, unreadable, doubtful


def _known(index: Path, before: Index | None) -> dict[bytes, NDArray[np.float32]]:
    """Vectors by the hash of their pictures, of the index and of runs that were stopped."""
    known: dict[bytes, NDArray[np.float32]] = {}
    if before:
        known = {
            one.tobytes(): vector for one, vector in zip(before.hashes, before.vectors, strict=True)
        }
    for path in sorted((index / FRESH).glob("*.npy")):
        try:
            if before is None:
                raise ValueError("it is of no index")
            known |= _read_fresh(path, before.dimension)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: is damaged ({error}); remove it") from error
    return known


def _keep(
    folder: Path, fresh: dict[bytes, NDArray[np.float32]], dimension: int
) -> dict[bytes, NDArray[np.float32]]:
    """Write vectors by hash to a file of their own. Returns them as they lie there."""
    if not fresh:
        return {}
    rows = np.empty(len(fresh), _fresh_type(dimension))
    rows["hash"] = [np.frombuffer(one, np.uint8) for one in fresh]
    rows["vector"] = list(fresh.values())
    content = io.BytesIO()
    np.save(content, rows, allow_pickle=False)
    path = folder / f"{secrets.token_hex(8)}.npy"
    write_file(path, content.getvalue())
    return _read_fresh(path, dimension)


def _read_fresh(path: Path, dimension: int) -> dict[bytes, NDArray[np.float32]]:
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if rows.dtype != _fresh_type(dimension):
        raise ValueError("it is of another kind")
    hashes = (one.tobytes() for one in rows["hash"])
    return dict(zip(hashes, rows["vector"], strict=True))


def _fresh_type(dimension: int) -> np.dtype[Any]:
    return np.dtype([("hash", np.uint8, (32,)), ("vector", np.float32, (dimension,))])


def _look_at_all(
    doubtful: list[_Found],
    pictures: Path,
    known: dict[bytes, NDArray[np.float32]],
    embedder: Embedder,
    workers: int | None,
    progress: bool,
) -> Iterator[_Looked]:
    """While one thread computes, others read: hashing, decoding and torch free Python's lock."""
    batches = [doubtful[start : start + BATCH] for start in range(0, len(doubtful), BATCH)]
    pool = ThreadPoolExecutor(workers or os.cpu_count(), initializer=_compute_alone)
    with tqdm(total=len(doubtful), unit=" pictures", disable=not progress) as bar:
        try:
            first, *others = batches  # the first alone: a network is opened when it is first used
            yield _look_at(first, pictures, known, embedder)
            bar.update(len(first))
            futures = [pool.submit(_look_at, batch, pictures, known, embedder) for batch in others]
            for batch, future in zip(others, futures, strict=True):
                yield future.result()
                bar.update(len(batch))
        finally:
            pool.shutdown(cancel_futures=True)


def _compute_alone() -> None:
    """The threads are one a core already: torch's own would only wait for each other."""
    import torch

    torch.set_num_threads(1)


def _look_at(
    batch: list[_Found],
    pictures: Path,
    known: dict[bytes, NDArray[np.float32]],
    embedder: Embedder,
) -> _Looked:
    looked = _Looked([], {}, [])
    new: dict[bytes, list[_Found]] = {}  # by hash; pictures of one content are embedded once
    for one in batch:
        try:
            with (pictures / one.path).open("rb") as file:
                seen = one._replace(hash=hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            looked.unreadable.append(_unreadable(one, f"cannot be read ({error.strerror})"))
            continue
        if seen.hash in known:
            looked.pictures.append(seen)
        else:
            new.setdefault(seen.hash, []).append(seen)
    firsts = [alike[0] for alike in new.values()]
    for first, vector in zip(firsts, _vectors(firsts, pictures, embedder), strict=True):
        if isinstance(vector, str):
            looked.unreadable.extend(_unreadable(one, vector) for one in new[first.hash])
        else:
            looked.fresh[first.hash] = vector
            looked.pictures.extend(new[first.hash])
    return looked


def _vectors(
    batch: list[_Found], pictures: Path, embedder: Embedder
) -> list[NDArray[np.float32] | str]:
    """The vector [D] of each picture, or why it has none."""
    paths = [pictures / one.path for one in batch]
    if not paths:
        return []
    try:
        vectors = embedder.embed_images(paths)
    except InputError as error:
        if len(paths) > 1:  # one of them cannot be read: each alone
            return [_vectors([one], pictures, embedder)[0] for one in batch]
        return [str(error).removeprefix(f"{paths[0]}: ")]
    return [
        vector if np.isfinite(vector).all() else "gives a vector that is not finite; replace it"
        for vector in vectors
    ]


def _unreadable(one: _Found, reason: str) -> Unreadable:
    return Unreadable(one.path, one.size, one.changed, reason)


def _publish(index: Path, manifest: _Manifest, entries: list[_Entry]) -> None:
    """Write a generation of all arrays, then the manifest that makes it count; drop older ones."""
    manifest.generation = secrets.token_hex(8)
    folder = index / manifest.generation
    folder.mkdir()
    _write_arrays(folder, manifest.dimension, entries)
    write_file(index / MANIFEST, _written(manifest))
    if entries:
        shutil.rmtree(index / FRESH, ignore_errors=True)
    for path in index.iterdir():
        if re.fullmatch("[0-9a-f]{16}", path.name) and path != folder:
            shutil.rmtree(path, ignore_errors=True)


def _written(manifest: _Manifest) -> str:
    return json.dumps(asdict(manifest), indent=1) + "\n"


def _write_arrays(folder: Path, dimension: int, entries: list[_Entry]) -> None:
    """Rows pass through memory in blocks; the arrays themselves stay on disk."""
    paths = [os.fsencode(entry.found.path) for entry in entries]
    sizes = {
        "vectors": (len(entries), dimension),
        "codes": (len(entries), padded(dimension)),
        "hashes": (len(entries), 32),
        "times": (len(entries), 2),
        "paths": (sum(map(len, paths)),),
    }
    arrays = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", dtype, sizes.get(name, (len(entries),))
        )
        for name, (dtype, _) in ARRAYS.items()
    }
    arrays["paths"][:] = np.frombuffer(b"".join(paths), np.uint8)
    arrays["ends"][:] = np.cumsum([len(path) for path in paths])
    for start in range(0, len(entries), ROWS):
        rows = slice(start, start + ROWS)
        block = entries[rows]
        vectors = np.stack([entry.vector for entry in block])
        arrays["vectors"][rows] = vectors
        arrays["codes"][rows], arrays["units"][rows], arrays["residuals"][rows] = quantise(vectors)
        arrays["hashes"][rows] = [np.frombuffer(entry.found.hash, np.uint8) for entry in block]
        arrays["times"][rows] = [(entry.found.size, entry.found.modified) for entry in block]
    for name, array in arrays.items():
        array.flush()
        with (folder / f"{name}.npy").open("rb") as file:
            os.fsync(file.fileno())
