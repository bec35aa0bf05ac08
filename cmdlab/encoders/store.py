"""Features of a frozen encoder, computed once: ragged tokens in memory-mapped files.

A store is a folder of chunks; a chunk is written aside and renamed when it is whole, so a store
that was left half-built is completed by opening it again. Its name holds the hash of all that its
content depends on: the encoder, the corpus, the split, how speech is degraded.

On a CPU each process reads and encodes chunks of its own. On a GPU the processes read ahead, and
this one encodes.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cmdlab.corpora import Caption, Corpus, Image, worker_pool
from cmdlab.encoders.encoder import Description, Encoded, Hearing
from cmdlab.encoders.encoding import (
    Encoder,
    Items,
    compute,
    encode,
    fingerprint,
    read_inputs,
    refuse_short,
)
from cmdlab.errors import InputError

CHUNK = 250  # items, or fewer where they are large
CHUNK_BYTES = 256_000_000
TYPICAL_SECONDS = 4  # of a spoken caption
MANY = 1000  # items, of which it is told beforehand what they will take
PROBED = 16  # items of each encoder that are encoded first, to find that out


class FeatureStore:
    """The features of a corpus' captions or images, in the order of the corpus."""

    def __init__(self, folder: Path, chunks: int, encoder: Encoder, chunk: int) -> None:
        self.name = folder.name  # a digest of all that the features depend on is part of it
        self.encoder = encoder
        self._chunk = chunk  # items
        loaded = [_load(folder / f"{i:05d}") for i in range(chunks)]
        self._tokens = [tokens for tokens, _, _ in loaded]
        self._starts = [np.concatenate(([0], np.cumsum(lengths))) for _, lengths, _ in loaded]
        self.lengths = torch.from_numpy(np.concatenate([part[1] for part in loaded]))  # int64
        embeddings = np.concatenate([part[2] for part in loaded])
        self.embeddings = torch.from_numpy(embeddings)  # float32 [items, D]
        self.layers, self.width = self._tokens[0].shape[1:]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def description(self) -> Description:
        return self.encoder.description

    def tokens(self, items: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        """float32 [layers, all tokens, width], item after item, and int64 lengths [items].

        `seed` is for what `OnlineSpeech` draws; what is stored is always the same.
        """
        lengths = self.lengths[torch.as_tensor(items)]
        states = np.empty((int(lengths.sum()), self.layers, self.width), np.float16)
        begin = 0
        for item, length in zip(items, lengths.tolist(), strict=True):
            chunk, within = divmod(int(item), self._chunk)
            start = self._starts[chunk][within]
            states[begin : begin + length] = self._tokens[chunk][start : start + length]
            begin += length
        by_layer = torch.from_numpy(states).transpose(0, 1)
        return by_layer.to(torch.float32, memory_format=torch.contiguous_format), lengths

    def patches(self, items: Sequence[int]) -> Tensor:
        """float32 [items, patches, width], for images, which all have as many patches."""
        return self.tokens(items)[0][0].unflatten(0, (len(items), -1))


def open_stores(
    wanted: Sequence[tuple[Corpus, Encoder]],
    folder: Path,
    *,
    hearing: Hearing,
    workers: int | None = None,
    device: str = "cpu",
) -> list[FeatureStore]:
    """The stores of some splits and encoders under `folder`: built, completed or just opened.

    All cores work on what is missing of any (`workers` processes otherwise), with one progress bar
    on standard error; where there is much, its size and hours are told first.
    Raises InputError for a damaged chunk, for a disk without room, and for media that cannot be
    read or whose features are not finite, naming it; what was encoded before is kept.
    """
    paths, parts = [], []
    done = 0
    for corpus, encoder in wanted:
        size = _chunk_items(encoder)
        identity = {
            **fingerprint(encoder, hearing),
            "corpus": corpus.content_hash,
            "split": corpus.split,
            "chunk": size,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        path = folder / f"{encoder}-{corpus.split}-{digest}"
        paths.append(path)
        items = _items(corpus, encoder)
        chunks = range(-(-len(items) // size))
        missing = [i for i in chunks if not (path / f"{i:05d}").is_dir()]
        if missing:
            path.mkdir(parents=True, exist_ok=True)
            (path / "store.json").write_text(json.dumps(identity, indent=1) + "\n")
        own = [_Part(path, i, encoder, items[i * size : (i + 1) * size]) for i in missing]
        done += len(items) - sum(len(part.items) for part in own)
        parts += own
    if parts:
        processes = min(workers or os.cpu_count() or 1, len(parts))
        if sum(len(part.items) for part in parts) >= MANY:
            _foretell(parts, folder, hearing, processes, device)
        _build(parts, done, hearing, processes, device)
        for leftover in (part for path in paths for part in path.glob("*.part")):
            shutil.rmtree(leftover, ignore_errors=True)  # of processes that were killed
    stores = []
    for path, (corpus, encoder) in zip(paths, wanted, strict=True):
        size, items = _chunk_items(encoder), _items(corpus, encoder)
        store = FeatureStore(path, -(-len(items) // size), encoder, size)
        if len(store) != len(items):
            raise InputError(
                f"{path}: holds {len(store)} items, not {len(items)}; remove it, it is computed "
                "again"
            )
        stores.append(store)
    return stores


def _items(corpus: Corpus, encoder: Encoder) -> Items:
    return corpus.images if encoder.kind == "images" else corpus.captions


def _chunk_items(encoder: Encoder) -> int:
    """So many that a chunk, which is in memory as a whole while it is made, is not too large."""
    described = encoder.description
    rows, columns = described.grid or (0, 0)
    tokens = rows * columns + (described.tokens_per_second or 0) * TYPICAL_SECONDS
    bytes_of_one = max(1.0, tokens * described.layers * described.width * 2)
    return max(1, min(CHUNK, int(CHUNK_BYTES / bytes_of_one)))


@dataclass(frozen=True)
class _Part:
    """A chunk that is to be made."""

    store: Path
    chunk: int
    encoder: Encoder
    items: Items


def _foretell(
    parts: list[_Part], folder: Path, hearing: Hearing, processes: int, device: str
) -> None:
    """Encode a few items by each encoder, and tell what all of them will take.

    Raises InputError where the disk has no room for them.
    """
    of_encoder: dict[Encoder, list[Caption | Image]] = {}
    for part in parts:
        of_encoder.setdefault(part.encoder, []).extend(part.items)
    size, seconds = 0.0, 0.0
    for encoder, items in of_encoder.items():
        encoder.open(device)
        probed = items[:: max(1, len(items) // PROBED)][:PROBED]
        started = time.perf_counter()
        encoded = encode(encoder, probed, hearing, device)
        seconds += (time.perf_counter() - started) * len(items) / len(probed)
        bytes_of_one = sum(x.tokens.nbytes + x.embedding.nbytes for x in encoded) / len(probed)
        size += bytes_of_one * len(items)
    if device == "cpu":
        seconds /= processes
    count = sum(len(part.items) for part in parts)
    took = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"
    print(f"features: {count:,} items, {_readable(size)}, about {took}", file=sys.stderr)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{folder}: these features need {_readable(size)}, and {_readable(free)} are free; "
            "keep fewer layers (speech_layers), encode speech as it is needed (online), or name a "
            "folder on another disk (features)"
        )


def _readable(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _build(parts: list[_Part], done: int, hearing: Hearing, processes: int, device: str) -> None:
    total = done + sum(len(part.items) for part in parts)
    bar = tqdm(total=total, initial=done, desc="features", unit=" items", leave=False)
    if processes == 1 and device == "cpu":  # quicker done here than a process is started
        threads = torch.get_num_threads()
        _one_thread()
        try:
            with bar:
                for part in parts:
                    bar.update(_make(part, hearing))
        finally:
            torch.set_num_threads(threads)
        return
    pool = worker_pool(processes, _one_thread)
    with bar:
        try:
            if device == "cpu":
                for future in as_completed([pool.submit(_make, part, hearing) for part in parts]):
                    bar.update(future.result())
            else:
                for part, inputs in _read_ahead(pool, parts, hearing, 2 * processes):
                    refuse_short(part.encoder, part.items, inputs)
                    bar.update(_write(part, compute(part.encoder, inputs, device)))
        finally:
            pool.shutdown(cancel_futures=True)


def _read_ahead(
    pool: Executor, parts: list[_Part], hearing: Hearing, ahead: int
) -> Iterator[tuple[_Part, list[Tensor]]]:
    """The inputs of each part, in order, while the pool reads those of the next ones."""
    waiting: deque[tuple[_Part, Future[list[Tensor]]]] = deque()
    for part in parts:
        waiting.append((part, pool.submit(read_inputs, part.encoder, part.items, hearing)))
        if len(waiting) > ahead:
            next_part, inputs = waiting.popleft()
            yield next_part, inputs.result()
    for next_part, inputs in waiting:
        yield next_part, inputs.result()


def _one_thread() -> None:
    torch.set_num_threads(1)  # each worker has a core to itself; and low bits depend on the number


def _make(part: _Part, hearing: Hearing) -> int:
    return _write(part, encode(part.encoder, part.items, hearing))


def _write(part: _Part, encoded: list[Encoded]) -> int:
    for i, features in enumerate(encoded):
        if not (np.isfinite(features.tokens).all() and np.isfinite(features.embedding).all()):
            item = part.items[i]
            file = item.path if isinstance(item, Image) else item.audio
            raise InputError(
                f"{file}: '{item.id}': {part.encoder} gives features that are not finite; replace "
                "it or remove its entry"
            )
    whole = part.store / f"{part.chunk:05d}"
    aside = part.store / f"{part.chunk:05d}.{os.getpid()}.part"
    try:
        aside.mkdir(exist_ok=True)
        np.save(aside / "tokens.npy", np.concatenate([item.tokens for item in encoded]))
        np.save(aside / "lengths.npy", np.array([len(item.tokens) for item in encoded], np.int64))
        np.save(aside / "embeddings.npy", np.stack([item.embedding for item in encoded]))
        os.replace(aside, whole)
    except OSError:  # another process wrote the same chunk meanwhile, or completed the store
        if not whole.is_dir():
            raise
        shutil.rmtree(aside, ignore_errors=True)
    return len(part.items)


def _load(chunk: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A chunk's tokens [all tokens, layers, width], lengths [items] and embeddings [items, D]."""
    try:
        tokens, lengths, embeddings = (
            np.load(chunk / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("tokens", "lengths", "embeddings")
        )
        if tokens.ndim != 3 or len(tokens) != lengths.sum() or len(lengths) != len(embeddings):
            raise ValueError("its files do not fit each other")
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InputError(
            f"{chunk}: is damaged ({error}); remove it, it is computed again"
        ) from error
    return tokens, lengths, embeddings
