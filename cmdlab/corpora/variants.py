"""Corpora made of a SpokenScenes corpus and its ground truth: the same scenes, told or shown anew.

`scans`: what a range finder tells takes the place of speech. It stands beside the scene at one of
five places and sends a pulse into each of 96 directions; a FLAC file holds 10 ms of echo for each,
one after another. An echo comes the later the farther the first object is, and is the louder the
brighter and nearer it is; beyond 75° from where it looks it hears noise alone.

`sketches`: the test pictures drawn by another hand: flat colours and black outlines on white paper,
upright, without light, noise or clutter. Only the test split is there, for `test_corpus`.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image as Picture
from tqdm import tqdm

from cmdlab.corpora.audio import SAMPLE_RATE, caption_seed
from cmdlab.corpora.content_hash import content_hash
from cmdlab.corpora.corpus import SPLITS, Corpus, Split
from cmdlab.corpora.ground_truth import GroundTruth, read_ground_truth
from cmdlab.corpora.loading import load_corpus
from cmdlab.corpora.rendering import IMAGE_SIZE, RADIUS, RGB, SIGNED_DISTANCE
from cmdlab.corpora.scenes import Scene, SceneObject
from cmdlab.errors import InputError
from cmdlab.outputs import write_file

RAYS = 96  # directions of a scan, all around
RAY = 160  # samples of each: 10 ms
FAN = np.radians(75)  # from where the range finder looks, to either side
SENSORS = (  # x, y in pixels, and the direction in which it looks
    (-4.0, 32.0, 0.0),
    (68.0, 32.0, np.pi),
    (32.0, -4.0, np.pi / 2),
    (32.0, 68.0, -np.pi / 2),
    (-4.0, -4.0, np.pi / 4),
)
PLACES = ("left", "right", "top", "bottom", "top left corner")
STEP = 0.5  # pixels, of the map in which rays are followed
REACH = 100.0  # pixels that a ray goes at most
FIRST, PER_PIXEL = 10, 1.4  # samples of an echo's delay, and of each pixel of range
WIDTH = 2.0  # samples, the standard deviation of a pulse
HALF = 48.0  # pixels at which an echo is half as loud
NOISE = 0.004  # of full scale
UNSURE = 0.3  # pixels, the standard deviation of a range
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
PAPER = (250, 250, 245)


def make_variant(source: Path | str, folder: Path | str, kind: str) -> None:
    """Make the corpus `kind` ("scans" or "sketches") of SpokenScenes in `source`, in `folder`.

    The same source gives the same bytes. It is made in `<folder>.making` and renamed; a folder that
    holds this very corpus already is kept.
    Raises InputError for a source without ground truth, and where the folder holds anything else.
    """
    if kind not in KINDS:
        raise InputError(f"no kind {kind!r}; use one of {', '.join(KINDS)}")
    source, folder = Path(source), Path(os.path.abspath(folder))
    name, splits, write = KINDS[kind]
    corpora = [load_corpus(source, split) for split in splits]
    recipe = {"name": name, "of": corpora[0].content_hash, "maker_sha256": _own_hash()}
    if folder.exists():
        _check_made(folder, recipe)
        return
    making = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    listed: list[dict[str, str]] = []
    released: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for corpus in corpora:
        truth = read_ground_truth(corpus)
        if truth is None:
            raise InputError(f"{source}: has no ground truth; give a corpus of `corpus make`")
        part = released["train" if corpus.split == "train" else "val"]
        for entry in tqdm(
            write(corpus, truth, making),
            total=len(corpus.images),
            desc=f"{name}, {corpus.split}",
            unit=" images",
        ):
            place, _, file = entry["image"].rpartition("/")
            listed.append({"filepath": place, "filename": file, "split": corpus.split})
            part.append(entry)
    for part_name, entries in released.items():
        write_file(making / f"SpokenCOCO_{part_name}.json", json.dumps({"data": entries}))
    write_file(making / "dataset_coco.json", json.dumps({"images": listed}))
    identity = recipe | {"content_hash": content_hash(making)}
    write_file(making / "corpus.json", json.dumps(identity, indent=1) + "\n")
    os.replace(making, folder)


def _own_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _check_made(folder: Path, recipe: dict[str, str]) -> None:
    try:
        made = json.loads((folder / "corpus.json").read_bytes())
        same = {key: made[key] for key in recipe} == recipe
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise InputError(f"{folder}: holds something else; remove it or name another folder")


def _write_scans(corpus: Corpus, truth: GroundTruth, root: Path) -> Iterator[dict[str, Any]]:
    """An image's entry of the release files, one after another, when its files are written."""
    for image, captions, scene, boxes in _by_image(corpus, truth):
        _keep(corpus, image, root)
        entries = []
        for i, (caption, _) in enumerate(captions):
            place = i % len(SENSORS)
            wav = f"scans/{corpus.split}/{caption}.flac"
            samples = scan(scene, boxes, place, caption_seed(caption))
            content = io.BytesIO()
            soundfile.write(content, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            _write(root / wav, content.getvalue())
            said = {"text": f"a scan from the {PLACES[place]}", "speaker": PLACES[place]}
            entries.append({"uttid": caption, "wav": wav, **said})
        yield {"image": image, "captions": entries}


def _write_sketches(corpus: Corpus, truth: GroundTruth, root: Path) -> Iterator[dict[str, Any]]:
    """As `_write_scans`."""
    said = {caption.id: caption for caption in corpus.captions}
    for image, captions, scene, boxes in _by_image(corpus, truth):
        content = io.BytesIO()
        Picture.fromarray(sketch(scene, boxes)).save(content, "PNG")
        _write(root / image, content.getvalue())
        entries = []
        for caption, wav in captions:
            _keep(corpus, wav, root)
            told = {"text": said[caption].text, "speaker": said[caption].speaker}
            entries.append({"uttid": caption, "wav": wav, **told})
        yield {"image": image, "captions": entries}


KINDS: dict[str, tuple[str, tuple[Split, ...], Callable[..., Iterator[dict[str, Any]]]]] = {
    "scans": ("RangeScans", SPLITS, _write_scans),
    "sketches": ("SketchedScenes", ("test",), _write_sketches),
}


def _by_image(
    corpus: Corpus, truth: GroundTruth
) -> Iterator[tuple[str, list[tuple[str, str]], Scene, np.ndarray]]:
    """Each image with the ids and files of its captions, its scene and boxes."""
    captions: dict[str, list[tuple[str, str]]] = {image.id: [] for image in corpus.images}
    for caption in corpus.captions:
        wav = caption.audio.relative_to(corpus.root).as_posix()
        captions[caption.image_id].append((caption.id, wav))
    for image, scene, boxes in zip(corpus.images, truth.scenes, truth.boxes, strict=True):
        yield image.id, captions[image.id], scene, boxes


def _keep(corpus: Corpus, file: str, root: Path) -> None:
    """The source's own file in the new corpus, without a copy of its bytes where that can be."""
    target = root / file
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(corpus.root / file, target)
    except OSError:  # another file system
        shutil.copyfile(corpus.root / file, target)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def scan(scene: Scene, boxes: np.ndarray, place: int, seed: int) -> np.ndarray:
    """What the range finder at SENSORS[place] hears, float32 [96 · 160] within [-1, 1].

    boxes: float32 [objects, 4], as in `GroundTruth`. `seed` decides the noise.
    """
    rng = np.random.default_rng(seed)
    x, y, looks = SENSORS[place]
    directions = 2 * np.pi * np.arange(RAYS) / RAYS
    off = np.abs((directions - looks + np.pi) % (2 * np.pi) - np.pi)
    along = np.arange(0, REACH, STEP)
    objects = _map_of_objects(scene, boxes)
    columns = np.floor((x + along * np.cos(directions)[:, None]) / STEP).astype(int)
    rows = np.floor((y + along * np.sin(directions)[:, None]) / STEP).astype(int)
    inside = (columns >= 0) & (columns < len(objects)) & (rows >= 0) & (rows < len(objects))
    last = len(objects) - 1
    met = np.where(inside, objects[rows.clip(0, last), columns.clip(0, last)], -1)
    met[off > FAN] = -1
    rays = np.flatnonzero((met >= 0).any(1))
    first = (met[rays] >= 0).argmax(1)
    distance = along[first] + rng.normal(0, UNSURE, len(rays))
    light = np.array([np.dot(RGB[item.colour], LUMINANCE) / 255 for item in scene.objects])
    loudness = 0.9 * light[met[rays, first]] / (1 + distance / HALF)
    late = np.arange(RAY) - (FIRST + PER_PIXEL * distance)[:, None]
    samples = rng.normal(0, NOISE, (RAYS, RAY))
    samples[rays] += loudness[:, None] * np.exp(-0.5 * (late / WIDTH) ** 2)
    return samples.ravel().clip(-1, 1).astype(np.float32)


def _map_of_objects(scene: Scene, boxes: np.ndarray) -> np.ndarray:
    """Which object covers each half pixel, or -1; int [128, 128]."""
    places = np.arange(STEP / 2, IMAGE_SIZE, STEP)
    x, y = np.meshgrid(places, places)
    covered = np.full(x.shape, -1)
    for i, (item, box) in enumerate(zip(scene.objects, boxes, strict=True)):
        covered[_distance(item, box, x, y) < 0] = i
    return covered


def _distance(item: SceneObject, box: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pixels from the object's edge, negative inside; upright in the middle of its box."""
    radius = RADIUS[item.size]
    u, v = (x - (box[0] + box[2]) / 2) / radius, (y - (box[1] + box[3]) / 2) / radius
    return SIGNED_DISTANCE[item.shape](u, v) * radius


def sketch(scene: Scene, boxes: np.ndarray) -> np.ndarray:
    """The scene by another hand, uint8 [64, 64, 3]. boxes: float32 [objects, 4]."""
    places = np.arange(IMAGE_SIZE) + 0.5
    x, y = np.meshgrid(places, places)
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3))
    picture[:] = PAPER
    for item, box in zip(scene.objects, boxes, strict=True):
        distance = _distance(item, box, x, y)
        inked = {
            "plain": np.zeros_like(x, bool),
            "striped": y % 4 < 1.5,
            "dotted": np.hypot(x % 4 - 2, y % 4 - 2) < 1.1,
            "checked": (x // 3 + y // 3) % 2 == 0,
        }[item.texture]
        inside = np.clip(0.5 - distance, 0, 1)[..., None]
        line = np.clip(1.3 - np.abs(distance + 0.8), 0, 1)[..., None]
        surface = np.array(RGB[item.colour]) * np.where(inked, 0.4, 1.0)[..., None]
        picture = picture * (1 - inside) + surface * inside * (1 - line)
    return picture.clip(0, 255).astype(np.uint8)
