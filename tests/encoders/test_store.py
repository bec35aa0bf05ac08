"""Frozen features: the encoders that are shipped, and the store that keeps what they give."""

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from cmdlab.corpora import Corpus, load_corpus
from cmdlab.encoders import (
    IMAGE,
    SPEECH,
    TEXT,
    Encoder,
    Hearing,
    encode,
    encoders_for,
    encoding,
    fingerprint,
    store,
)
from cmdlab.encoders.store import FeatureStore, open_stores
from cmdlab.errors import InputError

HEARING = Hearing()
ITEMS = 8
FILES = ("tokens.npy", "lengths.npy", "embeddings.npy")


@pytest.fixture(scope="module")
def corpus(smoke_corpus: Path) -> Corpus:
    """Eight images and eight captions of the smoke corpus."""
    whole = load_corpus(smoke_corpus, "val")
    return replace(whole, images=whole.images[:ITEMS], captions=whole.captions[:ITEMS])


def open_store(corpus: Corpus, encoder: Encoder, folder: Path, **options) -> FeatureStore:
    (store,) = open_stores([(corpus, encoder)], folder, **options)
    return store


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(store, "CHUNK", 3)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def built(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the eight images: two chunks of three, one of two."""
    folder = tmp_path_factory.mktemp("built")
    open_store(corpus, IMAGE, folder, hearing=HEARING, workers=2)
    return folder


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(built, tmp_path / "store")
    return tmp_path / "store"


def chunk(folder: Path, number: int) -> Path:
    return next(folder.glob(f"{IMAGE}-*")) / f"{number:05d}"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.npy")}


def test_the_store_gives_what_the_encoder_gave(built, corpus):
    features = open_store(corpus, IMAGE, built, hearing=HEARING)
    assert len(features) == ITEMS
    torch.set_num_threads(1)
    parts = [encode(IMAGE, corpus.images[i : i + 3], HEARING) for i in (0, 3, 6)]
    encoded = [item for part in parts for item in part]
    tokens, lengths = features.tokens([7, 0, 3])  # of three chunks, in another order
    assert tokens.shape == (1, 3 * 64, 128)
    assert lengths.tolist() == [64] * 3
    for own, item in zip(tokens.split(64, 1), (7, 0, 3), strict=True):
        assert (own.numpy() == encoded[item].tokens.transpose(1, 0, 2)).all()
    assert torch.equal(features.patches([7, 0, 3]), tokens[0].view(3, 64, 128))
    assert (features.embeddings.numpy() == np.stack([one.embedding for one in encoded])).all()
    assert features.embeddings.norm(dim=1) == pytest.approx(1, abs=1e-5)


def test_speech_is_ragged_and_the_same_for_any_number_of_workers(corpus, tmp_path):
    one = open_store(corpus, SPEECH, tmp_path / "one", hearing=HEARING, workers=1)
    open_store(corpus, SPEECH, tmp_path / "two", hearing=HEARING, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    tokens, lengths = one.tokens(range(ITEMS))
    assert len(set(lengths.tolist())) > 1
    assert tokens.shape == (one.layers, int(lengths.sum()), one.width)
    again, _ = one.tokens([3, 1])
    parts = tokens.split(lengths.tolist(), 1)
    assert torch.equal(again, torch.cat([parts[3], parts[1]], 1))
    assert (tokens != 0).any(dim=(0, 2)).all()


def test_what_is_read_ahead_for_a_device_is_encoded_alike(corpus, tmp_path):
    """As for a GPU: other processes read, this one encodes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    open_store(corpus, SPEECH, tmp_path / "each", hearing=HEARING, workers=2)
    open_store(corpus, SPEECH, tmp_path / "one", hearing=HEARING, workers=2, device="cpu:0")
    torch.set_num_threads(threads)
    each, one = content(tmp_path / "each"), content(tmp_path / "one")
    assert each.keys() == one.keys()
    for file in each:
        ours, theirs = (np.load(folder / file) for folder in (tmp_path / "one", tmp_path / "each"))
        assert np.allclose(ours, theirs, atol=2e-3)  # float16 of sums in another order


def test_chosen_layers_are_a_store_of_their_own(corpus, tmp_path):
    every = open_store(corpus, SPEECH, tmp_path, hearing=HEARING)
    two = open_store(corpus, replace(SPEECH, layers=(3, 1)), tmp_path, hearing=HEARING)
    assert two.name != every.name
    assert two.description.layers == two.layers == 2
    assert torch.equal(two.tokens([5])[0], every.tokens([5])[0][[3, 1]])
    for encoder in (replace(SPEECH, layers=(4,)), replace(IMAGE, layers=(0,))):
        with pytest.raises(InputError, match="speech encoders have some, this one 0 to "):
            open_store(corpus, encoder, tmp_path, hearing=HEARING)


def test_what_it_will_take_is_told_first_and_refused_without_room(
    corpus, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(store, "MANY", 8)
    features = open_store(corpus, IMAGE, tmp_path / "roomy", hearing=HEARING, workers=1)
    size = sum(len(part) for part in content(tmp_path / "roomy").values())
    told = capfd.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"features: 8 items, 0\.1 MB, about \d\.\d minutes", told)
    assert 100_000 < size < 150_000  # what was told, and the headers of small files
    assert len(features) == ITEMS
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100_000))
    with pytest.raises(InputError, match=r"need 0\.1 MB, and 0\.1 MB are free; keep fewer layers"):
        open_store(corpus, IMAGE, tmp_path / "full", hearing=HEARING, workers=1)
    assert content(tmp_path / "full") == {}


def test_several_stores_are_opened_in_the_order_asked_for(corpus, built, tmp_path):
    wanted = [(corpus, TEXT), (corpus, IMAGE)]
    text, image = open_stores(wanted, tmp_path, hearing=HEARING, workers=2)
    alone = open_store(corpus, IMAGE, built, hearing=HEARING)
    assert torch.equal(image.embeddings, alone.embeddings)
    assert text.embeddings.shape == image.embeddings.shape
    assert not torch.equal(text.embeddings, image.embeddings)


def test_a_half_built_store_is_completed(copied, corpus):
    whole = content(copied)
    shutil.rmtree(chunk(copied, 1))
    leftover = chunk(copied, 1).with_name("00001.7.part")  # of a process that was killed
    leftover.mkdir()
    (leftover / "tokens.npy").write_bytes(b"half")
    kept = chunk(copied, 0) / "tokens.npy"
    written = kept.stat().st_mtime_ns
    open_store(corpus, IMAGE, copied, hearing=HEARING, workers=2)
    assert content(copied) == whole
    assert not leftover.exists()
    assert kept.stat().st_mtime_ns == written


def test_workers_end_with_a_killed_parent(smoke_corpus, tmp_path):
    program = (
        "from pathlib import Path\n"
        "from cmdlab.corpora import load_corpus\n"
        "from cmdlab.encoders import SPEECH, Hearing, store\n"
        "store.CHUNK = 2\n"
        f"wanted = [(load_corpus({str(smoke_corpus)!r}, 'train'), SPEECH)]\n"
        f"store.open_stores(wanted, Path({str(tmp_path)!r}), hearing=Hearing(), workers=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(tmp_path.glob("*/?????"))) >= 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert len(children) >= 2
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def truncate(path: Path) -> None:
    (path / "tokens.npy").write_bytes((path / "tokens.npy").read_bytes()[:-200])


def shorten(path: Path) -> None:
    np.save(path / "lengths.npy", np.load(path / "lengths.npy")[:-1])


def take_out_an_item(path: Path) -> None:
    for name in ("lengths.npy", "embeddings.npy"):
        np.save(path / name, np.load(path / name)[:-1])
    np.save(path / "tokens.npy", np.load(path / "tokens.npy")[:-64])


def pickle(path: Path) -> None:
    np.save(path / "embeddings.npy", np.array([{"a": 1}], object), allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        shorten,
        take_out_an_item,
        pickle,
        lambda path: (path / "tokens.npy").write_bytes(b""),
        lambda path: (path / "lengths.npy").write_bytes(b"no array"),
        lambda path: (path / "embeddings.npy").unlink(),
    ],
)
def test_a_damaged_chunk_is_refused(copied, corpus, damage):
    damage(chunk(copied, 1))
    with pytest.raises(InputError, match="remove it, it is computed again") as refusal:
        open_store(corpus, IMAGE, copied, hearing=HEARING)
    assert str(refusal.value).startswith(str(chunk(copied, 1).parent))


def test_what_was_encoded_before_a_bad_file_is_kept(corpus, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    images = (*corpus.images[:5], replace(corpus.images[5], path=bad))
    with pytest.raises(InputError, match=r"bad\.png"):
        open_store(replace(corpus, images=images), IMAGE, tmp_path, hearing=HEARING, workers=1)
    assert (chunk(tmp_path, 0) / "tokens.npy").is_file()
    assert not chunk(tmp_path, 1).exists()


def test_features_that_are_not_finite_are_refused_by_name_and_never_stored(corpus, tmp_path):
    deafening = Hearing(snr_db=(-400.0, -400.0))  # noise whose power float32 cannot hold
    with pytest.raises(InputError, match="tiny-speech gives features that are not finite") as error:
        open_store(corpus, SPEECH, tmp_path, hearing=deafening, workers=1)
    first = corpus.captions[0]
    assert str(error.value).startswith(f"{first.audio}: '{first.id}': ")
    assert list(tmp_path.rglob("*.npy")) == []


def test_another_corpus_split_or_encoder_has_another_store(built, copied, corpus):
    folders = {path.name for path in copied.iterdir()}
    others = replace(corpus, content_hash="f" * 64, images=corpus.images[:1])
    open_store(others, IMAGE, copied, hearing=HEARING, workers=1)
    new = {path.name for path in copied.iterdir()} - folders
    assert len(new) == 1
    open_store(corpus, IMAGE, copied, hearing=HEARING)
    assert {path.name for path in copied.iterdir()} == folders | new


def test_the_identity_changes_with_weights_and_hearing(tmp_path, monkeypatch):
    clean = Hearing(snr_db=None, reverberation=False)
    assert fingerprint(SPEECH, clean) != fingerprint(SPEECH, HEARING)
    assert fingerprint(SPEECH, replace(HEARING, seed=1)) != fingerprint(SPEECH, HEARING)
    assert fingerprint(IMAGE, clean) == fingerprint(IMAGE, HEARING)  # images are not heard
    before = fingerprint(IMAGE, HEARING)
    weights = (encoding.WEIGHTS / f"{IMAGE}.safetensors").read_bytes()
    (tmp_path / f"{IMAGE}.safetensors").write_bytes(weights[:-1] + b"!")
    monkeypatch.setattr(encoding, "WEIGHTS", tmp_path)
    assert fingerprint(IMAGE, HEARING) != before


def test_the_identity_changes_with_the_libraries(monkeypatch):
    before = fingerprint(IMAGE, HEARING)
    monkeypatch.setattr("importlib.metadata.version", lambda library: "0")
    assert fingerprint(IMAGE, HEARING) != before


def test_hearing_decides_what_is_heard(corpus):
    captions = corpus.captions[:2]
    noisy, again = (encode(SPEECH, captions, HEARING)[0].tokens for _ in range(2))
    clean = encode(SPEECH, captions, Hearing(snr_db=None, reverberation=False))[0].tokens
    assert (noisy == again).all()
    assert noisy.shape == clean.shape
    assert (noisy != clean).any()


def test_what_cannot_be_encoded_is_refused(corpus, tmp_path):
    with pytest.raises(
        InputError, match=r"'clip-vit-b32' \(did you mean 'clip-vit-b-32'\?\); there"
    ):
        Encoder("clip-vit-b32")
    Picture.new("RGB", (64, 32)).save(tmp_path / "flat.png")
    flat = [replace(corpus.images[0], path=tmp_path / "flat.png")]
    octopus = [replace(corpus.captions[0], text="a red octopus")]
    with pytest.raises(InputError, match="64 × 64 pixels, not 64 × 32; clip-vit-b-32, ") as refusal:
        encode(IMAGE, flat, HEARING)
    assert str(refusal.value).startswith(f"{tmp_path / 'flat.png'}: tiny-image takes ")
    with pytest.raises(InputError, match=r"of SpokenScenes, not 'octopus'; no encoder here takes"):
        encode(TEXT, octopus, HEARING)
    with pytest.raises(
        InputError, match="not an item of type Caption; tiny-speech, tiny-words, tiny-text, tiny-b"
    ):
        encode(IMAGE, octopus, HEARING)
    with pytest.raises(InputError, match="type Image; tiny-image, tiny-bindings, clip-vit-b-32, "):
        encode(SPEECH, flat, HEARING)
    with pytest.raises(InputError, match="type str; no encoder here takes it: give captions"):
        encode(TEXT, ["a red square"], HEARING)


def test_the_encoders_that_take_a_corpus_are_named():
    every = encoders_for("images", Counter({(64, 64): 2}))
    assert every.startswith("encoders for its images: tiny-image, tiny-bindings, clip-vit-b-32, ")
    photographs = encoders_for("images", Counter({(64, 64): 2, (640, 480): 1000, (9, 9): 3}))
    assert photographs.startswith("encoders for its images: clip-vit-b-32, ")
    assert photographs.endswith(
        "; tiny-image, tiny-bindings take 64 × 64 pixels, and 1,003 of 1,005 are others, "
        "mostly 640 × 480"
    )
