"""Fixtures that several test files share."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdlab.corpora.corpus import Caption, Corpus, Image
from cmdlab.corpora.spoken_scenes import make_corpus
from cmdlab.encoders import IMAGE, SPEECH, Encoder, Features, FeatureStore
from cmdlab.experiment.run import Data, open_data


@pytest.fixture(scope="session")
def smoke_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke corpus, made once for all xdist workers of a test session. Never change it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "smoke_corpus"
    with _alone(folder):
        make_corpus(folder, preset="smoke")  # whoever comes second finds it made
    return folder


@pytest.fixture(scope="session")
def smoke_data(smoke_corpus: Path) -> Data:
    """The smoke corpus as the tiny encoders give it, encoded once likewise, beside the corpus."""
    with _alone(smoke_corpus.with_name("smoke_corpus.features")):
        return open_data(smoke_corpus)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def toy_features(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Features]:
    """Makes up a split of random features in milliseconds: no corpus, no encoder.

    Each image has two captions, whose tokens (2 layers, 16 wide, 3 to 9 of them) and whose image's
    patches (12 wide) hold the image's embedding (8 wide) and noise, so there is something to learn.
    """

    def make(*, images: int = 24, patches: int = 4, seed: int = 0) -> Features:
        rng = np.random.default_rng(seed)
        folder = tmp_path_factory.mktemp("toy")
        embeddings = rng.normal(size=(images, 8)).astype(np.float32)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        owner = np.arange(2 * images) // 2
        spoken = np.random.default_rng(99).normal(size=(8, 32))
        seen = np.random.default_rng(98).normal(size=(8, 12))

        def noisy(signal: np.ndarray, *shape: int) -> np.ndarray:
            return (signal.reshape(-1, *shape[1:]) + 0.3 * rng.normal(size=shape)).astype("f2")

        speech = [noisy(embeddings[i] @ spoken, int(rng.integers(3, 10)), 2, 16) for i in owner]
        pictures = [noisy(one @ seen, patches, 1, 12) for one in embeddings]
        corpus = Corpus(
            "toy",
            folder,
            "train",
            tuple(Image(f"i{i}", folder / f"{i}.png") for i in range(images)),
            tuple(
                Caption(f"c{c}", f"i{i}", folder / f"{c}.wav", "", "") for c, i in enumerate(owner)
            ),
            f"{seed:064x}",
        )
        return Features(
            corpus,
            _store(folder / "speech", SPEECH, speech, np.zeros((len(owner), 0), np.float32)),
            _store(folder / "image", IMAGE, pictures, embeddings),
            torch.from_numpy(owner),
        )

    return make


def _store(
    folder: Path, encoder: Encoder, tokens: list[np.ndarray], embeddings: np.ndarray
) -> FeatureStore:
    """A feature store of one chunk."""
    chunk = folder / "00000"
    chunk.mkdir(parents=True)
    np.save(chunk / "tokens.npy", np.concatenate(tokens))
    np.save(chunk / "lengths.npy", np.array([len(one) for one in tokens], np.int64))
    np.save(chunk / "embeddings.npy", embeddings)
    return FeatureStore(folder, 1, encoder, len(tokens))
