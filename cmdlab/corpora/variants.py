"""Corpora made of a SpokenScenes corpus and its ground truth: the same scenes, told or shown anew.

`scans`: what a range finder tells takes the place of speech. It stands beside the scene at one of
five places and sends a pulse into each of 96 directions; a FLAC file holds 10 ms of echo for each,
one after another. An echo comes the later the farther the first object is, and is the louder the
brighter and nearer it is; beyond 75° from where it looks it hears noise alone.

`sketches`: the test pictures drawn by another hand: flat colours and black outlines on white paper,
upright, without light, noise or clutter. Only the test split is there, for `test_corpus`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cmdlab.corpora.audio import caption_seed
from cmdlab.corpora.content_hash import content_hash
from cmdlab.corpora.corpus import SPLITS, Caption, Corpus, Image, Split
from cmdlab.corpora.ground_truth import GroundTruth, read_ground_truth
from cmdlab.corpora.loading import load_corpus
from cmdlab.corpora.rendering import IMAGE_SIZE, RADIUS, RGB, SIGNED_DISTANCE
from cmdlab.corpora.scenes import Scene, SceneObject
from cmdlab.corpora.spoken_scenes import flac, png
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

    The same source gives the same bytes. It is made in `<folder>.making` and renamed; what is there
    of an earlier try is made again. A folder that holds this very corpus already is kept.
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
    marker, root = making / "recipe.json", making / "corpus"
    if making.exists():
        if not marker.is_file():
            raise InputError(f"{making}: is in the way; move it or remove it")
        shutil.rmtree(making)
    write_file(marker, json.dumps(recipe))
    listed: list[dict[str, str]] = []
    released: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for corpus in corpora:
        truth = read_ground_truth(corpus)
        if truth is None:
            raise InputError(f"{source}: has no ground truth; give a corpus of `corpus make`")
        part = released["train" if corpus.split == "train" else "val"]
        for entry in tqdm(
            write(corpus, truth, root),
            total=len(corpus.images),
            desc=f"{name}, {corpus.split}",
            unit=" images",
        ):
            place, _, file = entry["image"].rpartition("/")
            listed.append({"filepath": place, "filename": file, "split": corpus.split})
            part.append(entry)
    for part_name, entries in released.items():
        write_file(root / f"SpokenCOCO_{part_name}.json", json.dumps({"data": entries}))
    write_file(root / "dataset_coco.json", json.dumps({"images": listed}))
    identity = recipe | {"content_hash": content_hash(root)}
    write_file(root / "corpus.json", json.dumps(identity, indent=1) + "\n")
    os.replace(root, folder)
    shutil.rmtree(making)


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
    for number, (image, captions, scene, boxes) in enumerate(_by_image(corpus, truth)):
        _keep(corpus, image.path, root)
        entries = []
        for i, caption in enumerate(captions):
            place = i % len(SENSORS)
            # Numbers, since an id is a data set's text, and no name of a file.
            wav = f"scans/{corpus.split}/{number:06d}-{i}.flac"
            samples = scan(scene, boxes, place, caption_seed(caption.id))
            _write(root / wav, flac(samples))
            said = {"text": f"a scan from the {PLACES[place]}", "speaker": PLACES[place]}
            entries.append({"uttid": caption.id, "wav": wav, **said})
        yield {"image": image.id, "captions": entries}


def _write_sketches(corpus: Corpus, truth: GroundTruth, root: Path) -> Iterator[dict[str, Any]]:
    """As `_write_scans`."""
    for image, captions, scene, boxes in _by_image(corpus, truth):
        _write(root / image.path.relative_to(corpus.root), png(sketch(scene, boxes)))
        entries = []
        for caption in captions:
            wav = _keep(corpus, caption.audio, root)
            said = {"text": caption.text, "speaker": caption.speaker}
            entries.append({"uttid": caption.id, "wav": wav, **said})
        yield {"image": image.id, "captions": entries}


KINDS: dict[str, tuple[str, tuple[Split, ...], Callable[..., Iterator[dict[str, Any]]]]] = {
    "scans": ("RangeScans", SPLITS, _write_scans),
    "sketches": ("SketchedScenes", ("test",), _write_sketches),
}


def _by_image(
    corpus: Corpus, truth: GroundTruth
) -> Iterator[tuple[Image, list[Caption], Scene, np.ndarray]]:
    """Each image with its captions, its scene and boxes."""
    captions: dict[str, list[Caption]] = {image.id: [] for image in corpus.images}
    for caption in corpus.captions:
        captions[caption.image_id].append(caption)
    for image, scene, boxes in zip(corpus.images, truth.scenes, truth.boxes, strict=True):
        yield image, captions[image.id], scene, boxes


def _keep(corpus: Corpus, file: Path, root: Path) -> str:
    """The source's own file in the new corpus, without a copy of its bytes where that can be.
    Returns its place in either."""
    place = file.relative_to(corpus.root)
    target = root / place
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:  # another file system
        shutil.copyfile(file, target)
    return place.as_posix()


def _write(path: Path, content: bytes) -> None:
    """Not made durable one by one, as `write_file` does: the whole folder is renamed at last."""
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
