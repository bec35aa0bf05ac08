"""Small corpora in the real layouts, written by the tests."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from cmdlab.corpora import Corpus, load_corpus
from cmdlab.corpora.corpus import Split
from cmdlab.errors import InputError


def write_sound(path: Path, seconds: float = 0.05, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(path.name.encode())  # no two recordings are equal
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))
    soundfile.write(path, samples, rate, subtype="PCM_16")


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 256, (4, 6, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def spoken_coco(tmp_path: Path) -> Path:
    """Six images: 3 train (one of them restval, one released under val), 1 val, 2 test.

    The test images have two captions and one, spoken by WAV and FLAC files.
    """
    root = tmp_path / "coco"
    splits = ["train", "train", "val", "restval", "test", "test"]
    release: dict[str, list] = {"train": [], "val": []}
    listed = []
    for number, split in enumerate(splits):
        part = "train" if number < 2 else "val"
        name = f"COCO_{part}2014_{number:012d}.jpg"
        write_image(root / f"{part}2014" / name)
        captions = []
        for n in reversed(range(2 if number != 5 else 1)):  # file order is not the sorted order
            uttid = f"speaker{n}-{number}-{n}"
            wav = f"wavs/{part}/0/{uttid}.{'flac' if n else 'wav'}"
            write_sound(root / wav)
            text = f"IMAGE {number} AGAIN {n}"
            captions.append({"text": text, "speaker": f"speaker{n}", "uttid": uttid, "wav": wav})
        release[part].append({"image": f"{part}2014/{name}", "captions": captions})
        listed.append({"filepath": f"{part}2014", "filename": name, "split": split})
    for part, data in release.items():
        (root / f"SpokenCOCO_{part}.json").write_text(json.dumps({"data": data}))
    karpathy = {"dataset": "coco", "images": listed[::-1]}
    (root / "dataset_coco.json").write_text(json.dumps(karpathy))
    return root


@pytest.fixture
def flickr8k_audio(tmp_path: Path) -> Path:
    """Four images: 2 train, 1 val, 1 test, two captions each, and one image of no split."""
    root = tmp_path / "flickr8k"
    stems = ["30_c", "10_a", "20_b", "40_d", "50_unlisted"]
    (root / "flickr_audio").mkdir(parents=True)
    recordings, speakers, tokens = [], [], []
    for stem in stems:
        write_image(root / "Images" / f"{stem}.jpg")
        for n in (1, 0):
            tokens.append(f"{stem}.jpg#{n}\tA dog runs in {stem} , {n} .")
            if stem != "50_unlisted":
                write_sound(root / "flickr_audio" / "wavs" / f"{stem}_{n}.wav")
                recordings.append(f"{stem}_{n}.wav {stem}.jpg #{n}")
                speakers.append(f"{stem}_{n}.wav {n}")
    for name, lines in {
        "flickr_audio/wav2capt.txt": recordings,
        "flickr_audio/wav2spk.txt": speakers[::-1],
        "Flickr8k.token.txt": tokens,
        "Flickr_8k.trainImages.txt": ["20_b.jpg", "30_c.jpg"],
        "Flickr_8k.devImages.txt": ["10_a.jpg"],
        "Flickr_8k.testImages.txt": ["40_d.jpg"],
    }.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def places_audio(tmp_path: Path) -> Path:
    """Two images in train, one with two captions; one each in val and test; foreign base paths."""
    root = tmp_path / "places"
    for split, images in {"train": "aab", "val": "c", "test": "d"}.items():
        data = []
        for number, name in enumerate(images):
            image, wav = f"{name}/abbey/gsun_{name}.jpg", f"wavs/{split}/utterance_{number}.wav"
            write_image(root / "images" / image)
            write_sound(root / wav)
            entry = {"uttid": f"U-{split}-{number}", "speaker": f"S{number}", "wav": wav}
            data.append(entry | {"asr_text": f"a room {number}", "image": image})
        lists = {"image_base_path": "/data/elsewhere/images/", "audio_base_path": "/data/places"}
        (root / f"{split}.json").write_text(json.dumps(lists | {"data": data}))
    return root


@pytest.fixture(scope="session")
def edit_text() -> Callable[[Path, str, str], None]:
    """Replaces one piece of a text file."""

    def edit(path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


@pytest.fixture(scope="session")
def loads_or_refuses() -> Callable[..., Corpus | None]:
    """Loads a corpus and checks what every corpus promises, or checks the refusal: then None."""

    def load(root: Path, split: Split, *, skip_bad: bool) -> Corpus | None:
        try:
            corpus = load_corpus(root, split, skip_bad=skip_bad)
        except InputError as error:
            refusal = str(error)
        else:
            image_ids = {image.id for image in corpus.images}
            paths = [image.path for image in corpus.images] + [c.audio for c in corpus.captions]
            assert len(image_ids) == len(corpus.images) > 0
            assert image_ids == {caption.image_id for caption in corpus.captions}
            assert len({caption.id for caption in corpus.captions}) == len(corpus.captions)
            assert all(path.resolve().is_relative_to(root.resolve()) for path in paths)
            return corpus
        assert refusal.startswith(str(root))
        assert "\n" not in refusal
        return None

    return load
