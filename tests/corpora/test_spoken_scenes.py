"""SpokenScenes as made on disk: layout, truth, the same bytes always, resuming, refusing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmdlab.corpora import SPLITS, content_hash, load_corpus, read_foils
from cmdlab.corpora.audio import read_audio
from cmdlab.corpora.images import read_image
from cmdlab.corpora.presets import PRESETS, Preset
from cmdlab.corpora.scenes import Scene, SceneObject, caption_is_true, mend_articles
from cmdlab.corpora.speaking import STUDY_VOICES, TEST_ONLY_VOICES
from cmdlab.corpora.spoken_scenes import make_corpus, scene_rng
from cmdlab.errors import InputError

SIZES = {"train": 40, "val": 20, "test": 20}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset of six images in five shards."""
    monkeypatch.setitem(PRESETS, "tiny", Preset({"train": 3, "val": 1, "test": 2}, shard=1))
    return "tiny"


def truth(root: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (root / f"ground_truth/{split}.jsonl").open()]


def files_below(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def identity(root: Path) -> dict:
    return json.loads((root / "corpus.json").read_text())


def test_twins_lie_side_by_side_and_their_foils_are_not_known_by_an_article(tmp_path, monkeypatch):
    sizes = {"train": 4, "val": 2, "test": 12}
    monkeypatch.setitem(PRESETS, "pairs", Preset(sizes, shard=4, twins=True))
    make_corpus(tmp_path / "twins", preset="pairs", workers=1)
    for split, size in sizes.items():
        scenes = [line["objects"] for line in truth(tmp_path / "twins", split)]
        assert len(scenes) == size
        for first, second in zip(scenes[::2], scenes[1::2], strict=True):
            differ = {
                name
                for one, other in zip(first, second, strict=True)
                for name in one
                if name != "box" and one[name] != other[name]
            }
            assert len(differ) == 1
            assert differ <= {"colour", "shape", "texture"}
    foils = read_foils(load_corpus(tmp_path / "twins", "test"))
    assert foils is not None
    texts = [caption.text for caption in foils.corpus.captions]
    assert len(texts) > 6
    assert texts == [mend_articles(text) for text in texts]


@pytest.mark.parametrize("split", SPLITS)
def test_the_loader_reads_every_split(smoke_corpus, split):
    corpus = load_corpus(smoke_corpus, split)
    assert corpus.name == "SpokenScenes"
    assert len(corpus.images) == SIZES[split]
    assert len(corpus.captions) == 5 * SIZES[split]
    assert {read_image(image.path).shape for image in corpus.images} == {(64, 64, 3)}
    assert all(1 < len(read_audio(c.audio)) / 16_000 < 12 for c in corpus.captions)
    of_an_image: dict[str, set[str]] = {}
    for caption in corpus.captions:
        of_an_image.setdefault(caption.image_id, set()).add(caption.text)
    assert {len(texts) for texts in of_an_image.values()} == {5}


def test_the_files_have_the_schema_of_spokencoco(smoke_corpus):
    for file, size in (("SpokenCOCO_train.json", 40), ("SpokenCOCO_val.json", 40)):
        release = json.loads((smoke_corpus / file).read_text())
        assert list(release) == ["data"]
        assert len(release["data"]) == size
        for entry in release["data"]:
            assert set(entry) == {"image", "captions"}
            for caption in entry["captions"]:
                assert set(caption) == {"uttid", "text", "speaker", "wav"}
    listed = json.loads((smoke_corpus / "dataset_coco.json").read_text())["images"]
    counts = {split: sum(image["split"] == split for image in listed) for split in SIZES}
    assert counts == SIZES


def test_some_voices_are_heard_in_the_test_split_only(smoke_corpus):
    speakers = {s: [c.speaker for c in load_corpus(smoke_corpus, s).captions] for s in SPLITS}
    assert set(speakers["train"]) == set(STUDY_VOICES)
    assert set(speakers["val"]) == set(STUDY_VOICES)
    assert set(speakers["test"]) == set(STUDY_VOICES + TEST_ONLY_VOICES)
    unheard = sum(speaker in TEST_ONLY_VOICES for speaker in speakers["test"])
    assert 0.3 < unheard / len(speakers["test"]) < 0.7


@pytest.mark.parametrize("split", SPLITS)
def test_the_ground_truth_is_that_of_the_files(smoke_corpus, split):
    corpus = load_corpus(smoke_corpus, split)
    captions = {caption.id: caption for caption in corpus.captions}
    lines = truth(smoke_corpus, split)
    assert [line["image"] for line in lines] == [image.id for image in corpus.images]
    for line in lines:
        boxes = [item.pop("box") for item in line["objects"]]
        assert all(0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64 for x0, y0, x1, y1 in boxes)
        scene = Scene(tuple(SceneObject(**item) for item in line["objects"]))
        for told in line["captions"]:
            caption = captions.pop(told["uttid"])
            assert caption.image_id == line["image"]
            assert caption_is_true(told["facts"], scene)
            assert [word["word"] for word in told["words"]] == caption.text.split()
            assert {word["object"] for word in told["words"]} <= {None, *range(len(boxes))}
            times = [time for word in told["words"] for time in (word["start"], word["end"])]
            assert times == sorted(times)
            assert times[-1] <= len(read_audio(caption.audio)) / 16_000
    assert captions == {}


def test_the_content_hash_is_kept_and_tells_of_a_change(smoke_corpus, tmp_path, tiny):
    made = identity(smoke_corpus)
    assert made["content_hash"] == content_hash(smoke_corpus)
    assert made["files"] == len(files_below(smoke_corpus)) - 1
    make_corpus(tmp_path / "tiny", preset=tiny, workers=1)
    assert identity(tmp_path / "tiny")["content_hash"] == content_hash(tmp_path / "tiny")
    picture = next((tmp_path / "tiny").rglob("*.png"))
    picture.write_bytes(picture.read_bytes() + b"\0")
    assert identity(tmp_path / "tiny")["content_hash"] != content_hash(tmp_path / "tiny")


def test_the_bytes_depend_on_the_seed_and_not_on_the_workers(tmp_path, tiny):
    for workers in (1, 2, 3):
        make_corpus(tmp_path / str(workers), preset=tiny, seed=5, workers=workers)
    one = files_below(tmp_path / "1")
    assert files_below(tmp_path / "2") == one
    assert files_below(tmp_path / "3") == one
    make_corpus(tmp_path / "other", preset=tiny, seed=6, workers=2)
    other = files_below(tmp_path / "other")
    media = [name for name in one if name.endswith((".png", ".flac")) and "foil" not in name]
    assert len(media) == 6 + 6 * 5
    assert not any(other[name] == one[name] for name in media)


def making_command(folder: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict) -> list[str]:
    """What makes a corpus of these sizes in a process of its own; "tiny" means them here too."""
    monkeypatch.setitem(PRESETS, "tiny", Preset(sizes, shard=1))
    program = (
        "from cmdlab.corpora.presets import PRESETS, Preset\n"
        "from cmdlab.corpora.spoken_scenes import make_corpus\n"
        f"PRESETS['tiny'] = Preset({sizes}, shard=1)\n"
        f"make_corpus({str(folder)!r}, preset='tiny', workers=2)\n"
    )
    return [sys.executable, "-c", program]


def test_killed_work_goes_on_from_the_last_whole_shard(tmp_path, tiny, monkeypatch):
    folder, making = tmp_path / "corpus", tmp_path / "corpus.making"
    command = making_command(folder, monkeypatch, {"train": 30, "val": 1, "test": 1})
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # what is killed cannot clear up after itself
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: len(list(making.glob("shards/*-????"))) >= 2)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert workers
    assert not folder.exists()
    shards = [path.name.rpartition("-") for path in making.glob("shards/*-????")]
    sounds = [
        name
        for split, _, number in shards
        for name in making.glob(f"corpus/wavs/{split}/{number}/*")
    ]
    kept = {name.relative_to(making / "corpus"): name.stat().st_mtime_ns for name in sounds}
    assert 10 <= len(kept) < 5 * 32
    (making / "shards" / "val-0000.part").mkdir(exist_ok=True)  # killed while it was written
    make_corpus(folder, preset=tiny, workers=2)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert not making.exists()
    make_corpus(tmp_path / "at_once", preset=tiny, workers=2)
    assert files_below(folder) == files_below(tmp_path / "at_once")


def test_ctrl_c_spoils_no_sound(tmp_path, tiny, monkeypatch):
    folder, making = tmp_path / "corpus", tmp_path / "corpus.making"
    command = making_command(folder, monkeypatch, {"train": 60, "val": 1, "test": 1})
    for _ in range(3):
        before = len(list(making.glob("shards/*-????")))
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        wait_for(lambda n=before: len(list(making.glob("shards/*-????"))) >= n + 4)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        assert process.wait() != 0
    make_corpus(folder, preset=tiny, workers=2)
    make_corpus(tmp_path / "undisturbed", preset=tiny, workers=2)
    assert identity(folder)["content_hash"] == identity(tmp_path / "undisturbed")["content_hash"]


def test_shards_of_another_recipe_are_not_taken(tmp_path, tiny):
    make_corpus(tmp_path / "two", preset=tiny, seed=2, workers=1)
    making = tmp_path / "corpus.making"
    (making / "shards" / "train-0000").mkdir(parents=True)
    (making / "recipe.json").write_text("{}")
    make_corpus(tmp_path / "corpus", preset=tiny, seed=2, workers=1)
    assert files_below(tmp_path / "corpus") == files_below(tmp_path / "two")


def test_shards_whose_corpus_is_gone_are_made_again(tmp_path, tiny, monkeypatch):
    folder = tmp_path / "corpus"
    remove = shutil.rmtree

    def stop(path: Path, *arguments: Any, **options: Any) -> None:
        if path == tmp_path / "corpus.making":
            raise KeyboardInterrupt
        remove(path, *arguments, **options)

    with monkeypatch.context() as stopped:
        stopped.setattr("shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            make_corpus(folder, preset=tiny, workers=1)  # stopped when the corpus was in its place
    made = files_below(folder)
    assert "corpus.json" in made
    shutil.rmtree(folder)
    make_corpus(folder, preset=tiny, workers=1)
    assert files_below(folder) == made


def test_a_corpus_that_is_there_is_kept(tmp_path, tiny, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()  # an empty folder is no obstacle
    make_corpus(folder, preset=tiny, workers=1)
    before = (folder / "corpus.json").stat()
    capsys.readouterr()
    make_corpus(folder, preset=tiny, workers=1)
    assert "kept" in capsys.readouterr().err
    assert (folder / "corpus.json").stat() == before
    with pytest.raises(InputError, match="another seed"):
        make_corpus(folder, preset=tiny, seed=2)
    with pytest.raises(InputError, match="another preset, sizes"):
        make_corpus(folder, preset="smoke")
    assert (folder / "corpus.json").stat() == before


def test_what_is_not_ours_is_left_alone(tmp_path):
    thesis = tmp_path / "home" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for folder in (thesis.parent, thesis):
        with pytest.raises(InputError, match=r"holds files that are no|is a file"):
            make_corpus(folder, preset="smoke")
    (tmp_path / "new.making").mkdir()
    (tmp_path / "new.making" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="in the way"):
        make_corpus(tmp_path / "new", preset="smoke")
    broken = tmp_path / "broken"
    broken.mkdir()
    for content in ("{", "[]", "3"):
        (broken / "corpus.json").write_text(content)
        with pytest.raises(InputError, match="remove"):
            make_corpus(broken, preset="smoke")
    with pytest.raises(InputError, match="use one of smoke, study, default, twins, large"):
        make_corpus(tmp_path / "new", preset="huge")
    with pytest.raises(InputError, match="seed"):
        make_corpus(tmp_path / "new", preset="smoke", seed=-1)
    assert thesis.read_text() == "years of work"


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path, tiny, monkeypatch):
    """The parent's peak; a worker holds one shard at a time whatever their number."""
    peaks = []
    for shards in (2, 2, 42):  # the first time only loads what is needed
        sizes = {"train": shards - 1, "val": 1, "test": 0}
        monkeypatch.setitem(PRESETS, tiny, Preset(sizes, shard=1))
        tracemalloc.start()
        make_corpus(tmp_path / f"{len(peaks)}", preset=tiny, workers=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    metadata = sum(p.stat().st_size for p in (tmp_path / "2").rglob("*.json*"))
    assert peaks[2] - peaks[1] < metadata / 3


def test_no_two_images_share_their_random_numbers():
    streams = [
        scene_rng(seed, split, index).random(4)
        for seed in (1, 2)
        for split in (*SPLITS, "pretraining")
        for index in (0, 1, 1_000_000)
    ]
    assert len({tuple(stream) for stream in streams}) == len(streams)
    assert np.array_equal(scene_rng(1, "val", 3).random(4), scene_rng(1, "val", 3).random(4))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
