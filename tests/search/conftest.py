"""A small trained model, and the recordings and pictures of the smoke corpus' test split."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cmdlab.experiment import run_experiment
from cmdlab.search import Index, Retriever, index_pictures


@pytest.fixture(scope="session")
def run(smoke_corpus, smoke_data, tmp_path_factory) -> Path:
    """The folder of a short run, which learns a little and pools patches too."""
    folder = tmp_path_factory.mktemp("run") / "patches"
    recipe = {"steps": 40, "batch_size": 32, "warm_up": 10, "learning_rate": 1e-3}
    run_experiment(smoke_corpus, folder, device="cpu", image_head="patches", **recipe)
    return folder


@pytest.fixture(scope="session")
def retriever(run) -> Retriever:
    return Retriever(run / "model")


@pytest.fixture(scope="session")
def make_index(run, retriever) -> Callable[[Path], Index]:
    """Makes the index of a folder of pictures, beside it."""

    def make(pictures: Path) -> Index:
        folder = pictures.with_name(f"{pictures.name}.index")
        index_pictures(pictures, folder, run / "model", lambda: retriever, progress=False)
        return Index(folder)

    return make
