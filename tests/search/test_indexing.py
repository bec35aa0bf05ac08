"""A folder's index: what is new is embedded, what is known is not, and nothing is ever lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmdlab.errors import InputError
from cmdlab.search import Index, index_pictures

DIMENSION = 12


class Colours:
    """A stand-in for a model: a picture's vector is its colours, 2 × 2 of them."""

    dimension = DIMENSION

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._lock = threading.Lock()

    def embed_images(self, pictures):
        vectors = []
        for path in pictures:
            try:
                with Image.open(path) as image:
                    small = np.asarray(image.convert("RGB").resize((2, 2)), np.float32).ravel()
            except Exception as error:
                raise InputError(f"{path}: is no picture") from error
            vectors.append((small + 1) / np.linalg.norm(small + 1))
        with self._lock:
            self.seen += [Path(path).name for path in pictures]
        return np.stack(vectors)


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((16, 16), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "model", b"weights")


def make_model(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    for number in range(10):
        picture(folder / f"{'abc'[number % 3]}" / f"{number}.png", number)
    return folder


@pytest.fixture
def update(pictures, model, tmp_path):
    """Bring the index up to date. Returns what was done, and the names of the pictures that were
    embedded; None if the model was not even opened."""

    def run(model=model, index=tmp_path / "index", pictures=pictures):
        opened = []

        def open_model():
            opened.append(Colours())
            return opened[0]

        done = index_pictures(pictures, index, model, open_model, workers=2, progress=False)
        return done, sorted(opened[0].seen) if opened else None

    return run


def paths(index: Index) -> list[str]:
    return [index.path(row) for row in range(len(index))]


def check(index: Path, pictures: Path) -> None:
    """Every row is its own picture's, and nothing but the current arrays lies there."""
    opened = Index(index)
    if len(opened):
        expected = Colours().embed_images([pictures / path for path in paths(opened)])
        np.testing.assert_array_equal(opened.vectors, expected)
    assert opened.pictures == pictures.resolve()
    there = {path.name for path in index.iterdir()}
    assert there == {"index.json", "index.lock", opened.generation}


def test_every_picture_is_found_by_its_own_vector(update, pictures, tmp_path):
    done, embedded = update()
    assert (done.pictures, done.embedded, len(embedded)) == (10, 10, 10)
    check(tmp_path / "index", pictures)
    index = Index(tmp_path / "index")
    assert paths(index) == sorted(paths(index))
    for row in range(10):
        first, second = index.nearest(index.vectors[row], 2)
        assert (first.rank, first.row, first.path) == (1, row, index.path(row))
        assert first.score == pytest.approx(1)
        assert second.score < first.score
    assert len(index.nearest(index.vectors[0], 99)) == 10


def test_a_second_run_opens_no_picture_and_no_model(update, pictures, tmp_path):
    update()
    before = (tmp_path / "index" / "index.json").read_bytes()
    for path in pictures.rglob("*.png"):  # the same sizes and times, other content
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=times)

    done, embedded = update()
    assert embedded is None
    assert (done.pictures, done.embedded, done.recognised) == (10, 0, 0)
    assert (tmp_path / "index" / "index.json").read_bytes() == before


def test_only_what_is_new_or_changed_is_embedded(update, pictures, tmp_path):
    update()
    picture(pictures / "new" / "10.png", 10)
    picture(pictures / "a" / "0.png", 20)
    (pictures / "b" / "1.png").unlink()
    done, embedded = update()
    assert embedded == ["0.png", "10.png"]
    assert (done.pictures, done.embedded, done.recognised, done.forgotten) == (10, 2, 0, 2)
    check(tmp_path / "index", pictures)


def test_moved_renamed_touched_and_copied_pictures_keep_their_vectors(update, pictures, tmp_path):
    update()
    (pictures / "a").rename(pictures / "z")
    (pictures / "b" / "1.png").rename(pictures / "b" / "renamed.png")
    os.utime(pictures / "c" / "2.png", (0, 0))
    shutil.copy(pictures / "c" / "5.png", pictures / "c" / "copy.png")
    done, embedded = update()
    assert embedded == []
    assert (done.pictures, done.embedded, done.forgotten) == (11, 0, 0)
    assert done.recognised == 4 + 1 + 1 + 1
    check(tmp_path / "index", pictures)


def test_a_folder_that_moved_with_its_index_is_searched_and_updated(update, pictures, tmp_path):
    update()
    moved = tmp_path / "elsewhere" / "disk"
    moved.mkdir(parents=True)
    for name in ("pictures", "index"):
        (tmp_path / name).rename(moved / name)
    check(moved / "index", moved / "pictures")
    assert update(index=moved / "index", pictures=moved / "pictures")[1] is None
    (moved / "pictures").rename(tmp_path / "other")
    assert update(index=moved / "index", pictures=tmp_path / "other")[1] is None
    check(moved / "index", tmp_path / "other")


def test_unreadable_pictures_are_listed_and_shift_nothing(update, pictures, tmp_path):
    (pictures / "b" / "bad.jpg").write_bytes(b"no picture")
    done, _ = update()
    assert [(one.path, one.reason) for one in done.unreadable] == [("b/bad.jpg", "is no picture")]
    assert "unreadable: b/bad.jpg: is no picture" in str(done)
    check(tmp_path / "index", pictures)
    again, embedded = update()
    assert (embedded, again.unreadable) == (None, done.unreadable)
    picture(pictures / "b" / "bad.jpg", 3)
    mended, embedded = update()
    assert (embedded, mended.unreadable, mended.pictures) == (["bad.jpg"], [], 11)
    (pictures / "b" / "bad.jpg").write_bytes(b"bad again")
    update()
    (pictures / "b" / "bad.jpg").chmod(0o640)  # a change of its rights may have mended it
    assert update()[1] == []
    (pictures / "b" / "bad.jpg").unlink()
    assert update()[0].unreadable == []
    assert Index(tmp_path / "index").unreadable == []


def test_hidden_system_and_foreign_files_are_left_out(update, pictures, tmp_path):
    for name in (".hidden.png", ".trash/1.png", "@eaDir/thumb.png", "a/__MACOSX/1.png"):
        picture(pictures / name, 1)
    for name in ("notes.txt", "a/photo.heic", "b/photo.HEIC", "plain"):
        (pictures / name).write_text("text")
    picture(tmp_path / "outside.png", 5)
    (pictures / "out.png").symlink_to(tmp_path / "outside.png")
    (pictures / "loop").symlink_to(pictures)
    (pictures / "within.png").symlink_to(pictures / "a" / "0.png")
    done, _ = update()
    assert "within.png" in paths(Index(tmp_path / "index"))
    assert done.pictures == 11
    told = str(done)
    for line in ("2 .heic", "1 .txt", "1 no ending", "out.png: is a link", "loop: is a link"):
        assert line in told
    assert ".hidden" not in told


def test_names_of_any_bytes_are_kept(update, pictures, tmp_path):
    names = [b"\xff\xfe.png", "Grüße 花.png".encode(), b"two\nlines.png"]
    for seed, name in enumerate(names):
        picture(pictures / os.fsdecode(name), 30 + seed)
    (pictures / os.fsdecode(b"bad\xff.png")).write_bytes(b"no picture")
    update()
    assert {os.fsencode(path) for path in paths(Index(tmp_path / "index"))} >= set(names)
    assert [os.fsencode(one.path) for one in Index(tmp_path / "index").unreadable] == [
        b"bad\xff.png"
    ]
    check(tmp_path / "index", pictures)
    assert update()[1] is None


def test_an_index_may_lie_among_its_pictures(update, pictures):
    update(index=pictures / "index")
    done, embedded = update(index=pictures / "index")
    assert (done.pictures, embedded) == (10, None)


def test_another_models_index_is_refused(update, tmp_path):
    update()
    with pytest.raises(InputError, match=r"was made by .*model.* name another index by -o"):
        update(model=make_model(tmp_path / "other", b"other weights"))


def test_what_is_no_index_is_left_alone(update, pictures, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("text")
    with pytest.raises(InputError, match="is a folder of something else"):
        update(index=tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_disk_that_is_not_there_empties_no_index(update, pictures, tmp_path):
    update()
    pictures.rename(tmp_path / "unmounted")
    pictures.mkdir()
    with pytest.raises(InputError, match="holds no picture where its index has 10"):
        update()
    assert len(Index(tmp_path / "index")) == 10


RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, str(Path({here!r}).parent))
from test_indexing import Colours
from cmdlab.search import index_pictures
class Slow(Colours):
    def embed_images(self, pictures):
        time.sleep(0.05)
        print(len(pictures), flush=True)
        return super().embed_images(pictures)
index_pictures(Path({pictures!r}), Path({index!r}), {model!r}, Slow, workers=1, progress=False)
"""


def test_a_killed_run_is_gone_on_with(update, pictures, model, tmp_path):
    for number in range(10, 400):
        picture(pictures / "many" / f"{number}.png", number)
    index = tmp_path / "index"
    code = RUN.format(here=__file__, pictures=str(pictures), index=str(index), model=str(model))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(4):
        process.stdout.readline()
    with pytest.raises(InputError, match="another run works on it"):
        update()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(Index(index)) == 0  # the last whole one
    done, embedded = update()
    assert done.pictures == 400
    assert len(embedded) <= 400 - 2 * 64
    check(index, pictures)


@pytest.mark.parametrize(
    "damage",
    [
        lambda index, arrays: (index / "index.json").write_text("{"),
        lambda index, arrays: (index / "index.json").write_text('{"format": "other"}'),
        lambda index, arrays: (arrays / "codes.npy").unlink(),
        lambda index, arrays: (arrays / "vectors.npy").write_bytes(b"x" * 1000),
        lambda index, arrays: np.save(arrays / "vectors.npy", np.zeros((3, 12), np.float32)),
        lambda index, arrays: np.save(arrays / "ends.npy", np.full(10, 5)),
        lambda index, arrays: np.save(arrays / "hashes.npy", np.array([{}]), allow_pickle=True),
    ],
)
def test_a_damaged_index_is_refused(damage, update, tmp_path):
    update()
    index = tmp_path / "index"
    damage(index, index / Index(index).generation)
    with pytest.raises(InputError, match="make it"):
        Index(index)


def test_a_path_that_leaves_the_folder_is_refused(update, tmp_path):
    update()
    arrays = tmp_path / "index" / Index(tmp_path / "index").generation
    stored = np.load(arrays / "paths.npy")
    stored[:7] = np.frombuffer(b"../../a", np.uint8)
    np.save(arrays / "paths.npy", stored)
    with pytest.raises(InputError, match="leaves the folder"):
        paths(Index(tmp_path / "index"))


def test_a_generation_that_leaves_the_index_is_refused(update, tmp_path):
    update()
    manifest = tmp_path / "index" / "index.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "generation": "../.."}))
    with pytest.raises(InputError, match="its generation is no name"):
        Index(tmp_path / "index")
