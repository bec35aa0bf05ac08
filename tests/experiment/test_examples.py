"""Example queries beside a run."""

import json

import numpy as np
from PIL import Image

from cmdlab.corpora.images import read_image
from cmdlab.experiment.examples import write_examples
from cmdlab.retrieval.model import RetrievalModel, Shape
from cmdlab.retrieval.training import rank


def test_a_reused_folder_shows_the_pictures_of_its_own_corpus(smoke_data, tmp_path):
    test = smoke_data.test
    shape = Shape(
        test.speech.layers, test.speech.width, test.image.width, test.image.embeddings.shape[1]
    )
    model = RetrievalModel(shape).eval()
    rank(model, test).save(tmp_path / "ranks.npz")
    (tmp_path / "examples").mkdir()
    for index in range(len(test.image)):  # of a run on another corpus
        Image.new("RGB", (64, 64)).save(tmp_path / f"examples/image-{index:05d}.png")
    write_examples(smoke_data, model, tmp_path)
    path_of = {image.id: image.path for image in test.corpus.images}
    queries = json.loads((tmp_path / "examples.json").read_text())["queries"]
    shown = [answer for query in queries for answer in query["top"]]
    assert len(shown) == 16 * 5
    for answer in shown:
        picture = read_image(tmp_path / answer["file"])
        assert np.array_equal(picture, read_image(path_of[answer["image_id"]]))
    named = {answer["file"] for answer in shown} | {query["image"] for query in queries}
    assert {f"examples/{p.name}" for p in (tmp_path / "examples").glob("*.png")} == named
