"""`cmdlab index` and `cmdlab search` as a user meets them, with a model trained on a few scenes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cmdlab.cli import main
from cmdlab.corpora import load_corpus
from cmdlab.search import Index


@pytest.fixture(scope="module")
def indexed(run, smoke_corpus, tmp_path_factory) -> tuple[Path, Path]:
    """An index of the test pictures, and a recorded caption."""
    folder = tmp_path_factory.mktemp("searched") / "gallery"
    folder.mkdir()
    test = load_corpus(smoke_corpus, "test")
    for number, image in enumerate(test.images):
        name = os.fsdecode(b"\xff\nred.png") if number == 0 else f"{number}.png"
        (folder / name).write_bytes(Path(image.path).read_bytes())
    assert main(["index", str(folder), "--model", str(run / "model")]) == 0
    return folder.with_name("gallery.index"), Path(test.captions[0].audio)


def test_a_recording_finds_pictures(indexed, retriever, capsys):
    index, query = indexed
    assert main(["search", str(index), str(query), "-k", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    opened = Index(index)
    scores = opened.vectors.astype(np.float64) @ retriever.embed_speech(query)
    best = np.argsort(-scores, kind="stable")[:3]
    assert [one["rank"] for one in found] == [1, 2, 3]
    assert [one["path"] for one in found] == [str(opened.pictures / opened.path(r)) for r in best]
    assert [one["score"] for one in found] == pytest.approx(scores[best], abs=1e-6)


def test_waiting_before_and_after_speaking_changes_nothing(indexed, tmp_path, capsys):
    index, query = indexed
    said, rate = soundfile.read(query, dtype="float32")
    still = 0.003 * said.std() * np.random.default_rng(1).standard_normal(2 * rate)
    soundfile.write(tmp_path / "waited.wav", np.concatenate((still[:rate], said, still)), rate)
    scores = []
    for file in (query, tmp_path / "waited.wav"):
        assert main(["search", str(index), str(file), "-k", "80", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        scores.append({one["path"]: one["score"] for one in found})
    plain, waited = ([one[path] for path in scores[0]] for one in scores)
    assert np.corrcoef(plain, waited)[0, 1] > 0.9


def test_every_name_is_one_line_and_json_gives_its_bytes_back(indexed, capsys):
    index, _ = indexed
    asked = ["search", str(index), "--say", "a red circle left of a star", "-k", "9999"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(Index(index))
    assert sum("\\x0ared.png" in line for line in lines) == 1
    assert main([*asked, "--json"]) == 0
    names = [os.fsencode(one["path"]) for one in json.loads(capsys.readouterr().out)]
    assert sum(name.endswith(b"/\xff\nred.png") for name in names) == 1


def test_what_was_said_is_what_was_searched_for(indexed, tmp_path, capsys):
    import soundfile

    from cmdlab.search import spoken

    samples, rate = spoken("a blue square")
    soundfile.write(tmp_path / "said.wav", samples, rate)
    index, _ = indexed
    results = []
    for query in (["--say", "a blue square"], [str(tmp_path / "said.wav")]):
        assert main(["search", str(index), *query, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]


def test_an_unchanged_folder_is_seen_without_torch(indexed, run):
    folder = str(indexed[0].with_name("gallery"))
    code = (
        "import sys; from cmdlab.cli import main\n"
        "status = main(['index', sys.argv[1], '--model', sys.argv[2]])\n"
        "sys.exit(status or 3 * ('torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder, str(run / "model")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert " 0 embedded, 0 known by their content, 0 forgotten" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "say what to search for"),
        (["q.wav", "--say", "a star"], "say what to search for"),
        (["no-such.wav"], "no-such.wav"),
        (["--say", "…"], "cannot be spoken"),
        (["--say", "a star", "--model", "elsewhere"], "is neither a folder nor one of the modules"),
        (["--say", "a star", "--model", "/"], "/model.json: cannot be read"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(arguments, line, indexed, capsys):
    assert main(["search", str(indexed[0]), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error


def test_a_model_that_was_moved_is_asked_for(indexed, run, tmp_path, capsys):
    shutil.copytree(run / "model", tmp_path / "model")
    pictures, index = indexed[0].with_name("gallery"), tmp_path / "moved.index"
    assert main(["index", str(pictures), "--model", f"{tmp_path}/model", "-o", str(index)]) == 0
    (tmp_path / "model").rename(tmp_path / "later")
    said = ["search", str(index), "--say", "a star"]
    assert main(said) == 2
    assert "if it was moved, say where to by --model" in capsys.readouterr().err
    assert main([*said, "--model", str(tmp_path / "later")]) == 0


class Microphone:
    """Stands for sounddevice, which needs a sound card to be tried: one that hums at 48 kHz."""

    class PortAudioError(Exception):
        pass

    def __init__(self, there: bool) -> None:
        self.there = there

    def query_devices(self, *, kind):
        assert kind == "input"
        if not self.there:
            raise self.PortAudioError("Error querying device -1")
        return {"default_samplerate": 48_000.0}

    def rec(self, frames, samplerate, *, channels, dtype):
        assert channels == 1
        times = np.arange(frames, dtype=dtype) / samplerate
        return 0.1 * np.sin(2 * np.pi * 200 * times)[:, None]

    def wait(self):
        pass


def test_what_the_microphone_hears_is_searched_for(indexed, retriever, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", Microphone(there=True))
    assert main(["search", str(indexed[0]), "--record", "2", "-k", "1", "--json"]) == 0
    printed = capsys.readouterr()
    assert "recording for 2 s: speak now" in printed.err
    hum = 0.1 * np.sin(2 * np.pi * 200 * np.arange(96_000) / 48_000)
    scores = Index(indexed[0]).vectors @ retriever.embed_speech(hum, 48_000)
    assert json.loads(printed.out)[0]["score"] == pytest.approx(scores.max(), abs=1e-4)


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        (None, "pip install cmdlab[microphone], or give a sound file"),
        (Microphone(there=False), "there is no microphone to record from (Error querying device"),
        ("raise OSError('PortAudio library not found')", "Debian has it as libportaudio2"),
    ],
    ids=["no package", "no device", "no PortAudio"],
)
def test_without_a_microphone_the_remedy_is_told(
    module, remedy, indexed, tmp_path, capsys, monkeypatch
):
    if isinstance(module, str):
        (tmp_path / "sounddevice.py").write_text(module)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "sounddevice", module)
    assert main(["search", str(indexed[0]), "--record", "1"]) == 2
    error = capsys.readouterr().err
    assert remedy in error
    assert "speak now" not in error
