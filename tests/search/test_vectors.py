"""`cmdlab encode` writes what `cmdlab evaluate` takes."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from cmdlab.cli import main
from cmdlab.corpora import load_corpus
from cmdlab.evaluation import rank_table, retrieval_metrics


@pytest.fixture
def pairs(smoke_corpus, tmp_path) -> Path:
    """A CSV file of some test captions, beside links to the corpus' media."""
    corpus = load_corpus(smoke_corpus, "test")
    image = {one.id: one.path for one in corpus.images}
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / "pairs.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["audio", "image"])
        for number, caption in enumerate(corpus.captions[:30]):
            names = (f"{number}.wav", f"{Path(caption.image_id).stem}.png")
            for name, source in zip(names, (caption.audio, image[caption.image_id]), strict=True):
                target = path.parent / name
                if not target.exists():
                    target.write_bytes(source.read_bytes())
            table.writerow(names)
    return path


def test_pairs_become_what_evaluate_takes(run, retriever, pairs, tmp_path, capsys):
    output = tmp_path / "own.npz"
    model = str(run / "model")
    command = ["encode", "--model", model, "--device", "cpu", "-o", str(output)]
    assert main([*command, "--pairs", str(pairs)]) == 0
    with np.load(output) as arrays:
        assert arrays["speech"].dtype == arrays["image"].dtype == np.float32
        assert arrays["speech"].shape == (30, retriever.dimension)
        assert arrays["image"].shape == (6, retriever.dimension)
        rows = list(csv.DictReader(pairs.open()))
        assert arrays["speech_image_id"].tolist() == [row["image"] for row in rows]
        images = [pairs.parent / name for name in arrays["image_id"]]
        speech = retriever.embed_recordings([pairs.parent / row["audio"] for row in rows])
        table = rank_table(
            speech, retriever.embed_images(images), arrays["speech_image_id"], arrays["image_id"]
        )
    capsys.readouterr()
    assert main(["evaluate", str(output)]) == 0
    assert json.loads(capsys.readouterr().out) == retrieval_metrics(table)


def test_files_alone_keep_their_names(run, retriever, pairs, tmp_path, capsys):
    output = tmp_path / "own.npz"
    kinds = [sorted(pairs.parent.glob(f"*.{kind}")) for kind in ("png", "wav")]
    files = [str(file) for kind in kinds for file in kind[:4]]
    command = ["encode", "--model", str(run / "model"), "--device", "cpu", "-o", str(output)]
    assert main([*command, *files]) == 0
    with np.load(output) as arrays:
        found = {*arrays["speech_id"].tolist(), *arrays["image_id"].tolist()}
        assert found == set(files)
        assert all(name.endswith(".png") for name in arrays["image_id"])
        one = retriever.embed_image(arrays["image_id"][0].item())
        assert np.allclose(arrays["image"][0], one, atol=1e-5)
    assert main(["evaluate", str(output)]) == 2
    assert "speech_image_id is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda text: text.replace(".png", ".gif", 1),
            "pairs.csv: line 2: image: there is no file",
        ),
        (lambda text: text.splitlines()[0] + "\n", "holds no pairs"),
        (lambda text: text + "0.wav,../../x.png\n", "line 32: image: path .* leaves"),
    ],
)
def test_a_bad_pair_is_named(run, pairs, tmp_path, capsys, change, reason):
    pairs.write_text(change(pairs.read_text()))
    output = tmp_path / "own.npz"
    command = ["encode", "--model", str(run / "model"), "--device", "cpu", "-o", str(output)]
    assert main([*command, "--pairs", str(pairs)]) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not output.exists()


def test_files_or_pairs(run, capsys):
    assert main(["encode", "--model", str(run / "model"), "-o", "x.npz"]) == 2
    assert "give either FILES or --pairs" in capsys.readouterr().err
    assert main(["encode", "--model", "no-such-module", "-o", "x.npz", "a.wav"]) == 2
    assert "no-such-module: is neither a folder nor one of the modules" in capsys.readouterr().err
