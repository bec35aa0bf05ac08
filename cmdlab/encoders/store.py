"""Features of a frozen encoder, computed once: ragged tokens in memory-mapped files.

A store is a folder of chunks; a chunk is written aside and renamed when it is whole, so a store
that was left half-built is completed by opening it again. Its name holds the hash of all that its
content depends on: the encoder, the corpus, the split, how speech is degraded.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cmdlab.corpora import Caption, Corpus, Image, worker_pool
from cmdlab.encoders.encoding import IMAGE, Hearing, encode, fingerprint
from cmdlab.errors import InputError

CHUNK = 250  # items


class FeatureStore:
    """The features of a corpus' captions or images, in the order of the corpus."""

    def __init__(self, folder: Path, chunks: int) -> None:
        self.name = folder.name  # a digest of all that the features depend on is part of it
        loaded = [_load(folder / f"{i:05d}") for i in range(chunks)]
        self._tokens = [tokens for tokens, _, _ in loaded]
        self._starts = [np.concatenate(([0], np.cumsum(lengths))) for _, lengths, _ in loaded]
        self.lengths = torch.from_numpy(np.concatenate([part[1] for part in loaded]))  # int64
        embeddings = np.concatenate([part[2] for part in loaded])
        self.embeddings = torch.from_numpy(embeddings)  # float32 [items, D]
        self.layers, self.width = self._tokens[0].shape[1:]

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 [layers, all tokens, width], item after item, and int64 lengths [items]."""
        lengths = self.lengths[torch.as_tensor(items)]
        states = np.empty((int(lengths.sum()), self.layers, self.width), np.float16)
        begin = 0
        for item, length in zip(items, lengths.tolist(), strict=True):
            chunk, within = divmod(int(item), CHUNK)
            start = self._starts[chunk][within]
            states[begin : begin + length] = self._tokens[chunk][start : start + length]
            begin += length
        by_layer = torch.from_numpy(states).transpose(0, 1)
        return by_layer.to(torch.float32, memory_format=torch.contiguous_format), lengths

    def patches(self, items: Sequence[int]) -> Tensor:
        """float32 [items, patches, width], for images, which all have as many patches."""
        return self.tokens(items)[0][0].unflatten(0, (len(items), -1))


@dataclass(frozen=True)
class Features:
    """One split, encoded. `image_index[i]` is the row in `image` of caption i's image."""

    corpus: Corpus
    speech: FeatureStore
    image: FeatureStore
    image_index: Tensor  # int64 [captions]


def open_stores(
    wanted: Sequence[tuple[Corpus, str]],
    folder: Path,
    *,
    hearing: Hearing,
    workers: int | None = None,
) -> list[FeatureStore]:
    """The stores of some splits and encoders under `folder`: built, completed or just opened.

    All cores work on what is missing of any (`workers` processes otherwise), with one progress bar
    on standard error. Raises InputError for a damaged chunk, and for media that cannot be read or
    whose features are not finite, naming it; what was encoded before is kept.
    """
    paths, parts = [], []
    done = 0
    for corpus, encoder in wanted:
        identity = {
            **fingerprint(encoder, hearing),
            "corpus": corpus.content_hash,
            "split": corpus.split,
            "chunk": CHUNK,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        path = folder / f"{encoder}-{corpus.split}-{digest}"
        paths.append(path)
        items = _items(corpus, encoder)
        missing = [i for i in range(_chunks(items)) if not (path / f"{i:05d}").is_dir()]
        if missing:
            path.mkdir(parents=True, exist_ok=True)
            (path / "store.json").write_text(json.dumps(identity, indent=1) + "\n")
        own = [(path, i, encoder, items[i * CHUNK : (i + 1) * CHUNK]) for i in missing]
        done += len(items) - sum(len(part[3]) for part in own)
        parts += own
    if parts:
        _build(parts, done, hearing, workers or os.cpu_count() or 1)
        for leftover in (part for path in paths for part in path.glob("*.part")):
            shutil.rmtree(leftover, ignore_errors=True)  # of processes that were killed
    stores = []
    for path, (corpus, encoder) in zip(paths, wanted, strict=True):
        items = _items(corpus, encoder)
        store = FeatureStore(path, _chunks(items))
        if len(store) != len(items):
            raise InputError(
                f"{path}: holds {len(store)} items, not {len(items)}; remove it, it is computed "
                "again"
            )
        stores.append(store)
    return stores


def _items(corpus: Corpus, encoder: str) -> Sequence[Caption] | Sequence[Image]:
    return corpus.images if encoder == IMAGE else corpus.captions


def _chunks(items: Sequence[Caption] | Sequence[Image]) -> int:
    return -(-len(items) // CHUNK)


Part = tuple[Path, int, str, Sequence[Caption] | Sequence[Image]]  # store, chunk, encoder, items


def _build(parts: list[Part], done: int, hearing: Hearing, workers: int) -> None:
    total = done + sum(len(part[3]) for part in parts)
    bar = tqdm(total=total, initial=done, desc="features", unit=" items", leave=False)
    if min(workers, len(parts)) == 1:  # quicker done here than a process is started
        threads = torch.get_num_threads()
        _one_thread()
        try:
            with bar:
                for part in parts:
                    bar.update(_write_chunk(*part, hearing))
        finally:
            torch.set_num_threads(threads)
        return
    pool = worker_pool(min(workers, len(parts)), _one_thread)
    with bar:
        try:
            futures = [pool.submit(_write_chunk, *part, hearing) for part in parts]
            for future in as_completed(futures):
                bar.update(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)  # each worker has a core to itself; and low bits depend on the number


def _write_chunk(
    path: Path,
    chunk: int,
    encoder: str,
    items: Sequence[Caption] | Sequence[Image],
    hearing: Hearing,
) -> int:
    encoded = encode(encoder, items, hearing)
    for i, features in enumerate(encoded):
        if not (np.isfinite(features.tokens).all() and np.isfinite(features.embedding).all()):
            item = items[i]
            file = item.path if isinstance(item, Image) else item.audio
            raise InputError(
                f"{file}: '{item.id}': {encoder} gives features that are not finite; replace it or "
                "remove its entry"
            )
    aside = path / f"{chunk:05d}.{os.getpid()}.part"
    try:
        aside.mkdir(exist_ok=True)
        np.save(aside / "tokens.npy", np.concatenate([item.tokens for item in encoded]))
        np.save(aside / "lengths.npy", np.array([len(item.tokens) for item in encoded], np.int64))
        np.save(aside / "embeddings.npy", np.stack([item.embedding for item in encoded]))
        os.replace(aside, path / f"{chunk:05d}")
    except OSError:  # another process wrote the same chunk meanwhile, or completed the store
        if not (path / f"{chunk:05d}").is_dir():
            raise
        shutil.rmtree(aside, ignore_errors=True)
    return len(items)


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
