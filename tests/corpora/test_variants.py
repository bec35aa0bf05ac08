"""The same scenes told by a range finder, and drawn by another hand."""

import json
import shutil

import numpy as np
import pytest

from cmdlab.corpora import (
    RAY,
    RAYS,
    check_corpus,
    content_hash,
    load_corpus,
    make_variant,
    read_audio,
    read_ground_truth,
    read_image,
)
from cmdlab.corpora.rendering import RADIUS, RGB
from cmdlab.corpora.scenes import Scene, SceneObject
from cmdlab.corpora.variants import FIRST, HALF, PER_PIXEL, scan, sketch
from cmdlab.errors import InputError


def alone(colour: str, shape: str = "circle") -> tuple[Scene, np.ndarray]:
    """One large object around the middle of the picture, and its box."""
    reach = RADIUS["large"]
    box = np.array([[32 - reach, 32 - reach, 32 + reach, 32 + reach]], np.float32)
    return Scene((SceneObject(shape, colour, "large", "plain", "middle", "centre"),)), box


@pytest.mark.parametrize(("place", "ray", "gap"), [(0, 0, 36.0), (1, 48, 36.0), (2, 24, 36.0)])
def test_an_echo_comes_after_the_way_to_the_object_and_back(place, ray, gap):
    scene, box = alone("white")
    rays = scan(scene, box, place, seed=1).reshape(RAYS, RAY)
    distance = gap - 0.92 * RADIUS["large"]  # from the range finder to the disc's edge
    assert abs(rays[ray].argmax() - (FIRST + PER_PIXEL * distance)) < 2.5
    bright = np.dot(RGB["white"], (0.299, 0.587, 0.114)) / 255
    assert rays[ray].max() == pytest.approx(0.9 * bright / (1 + distance / HALF), rel=0.1)
    hears = np.abs(rays).max(1) > 0.1
    half_angle = np.arcsin(0.92 * RADIUS["large"] / gap)
    assert hears.sum() == pytest.approx(2 * half_angle / (2 * np.pi / RAYS), abs=1.5)
    assert hears[(ray + np.arange(-2, 3)) % RAYS].all()


def test_what_is_nearer_hides_what_is_behind_it_and_bright_things_are_louder():
    near, far = (
        SceneObject("square", colour, "large", "plain", "middle", column)
        for colour, column in (("blue", "left"), ("white", "right"))
    )
    boxes = np.array([[4, 24, 20, 40], [44, 24, 60, 40]], np.float32)
    seen = scan(Scene((near, far)), boxes, 0, seed=1)
    only = scan(Scene((near,)), boxes[:1], 0, seed=1)
    assert np.array_equal(seen.reshape(RAYS, RAY)[:5], only.reshape(RAYS, RAY)[:5])
    loud = [scan(*alone(colour), 0, seed=1).max() for colour in ("blue", "green", "white")]
    assert loud == sorted(loud)


def test_a_sketch_shows_colour_shape_and_texture_where_they_were():
    scene, box = alone("red", "square")
    drawn = sketch(scene, box)
    assert drawn[32, 32].tolist() == list(RGB["red"])
    assert drawn[2, 2].min() > 200  # paper
    assert drawn[32, 24].max() < 120  # its line
    assert not np.array_equal(drawn, sketch(*alone("red", "circle")))


@pytest.mark.parametrize("kind", ["scans", "sketches"])
def test_a_variant_is_a_corpus_with_the_pairs_of_its_source(smoke_corpus, tmp_path, kind):
    make_variant(smoke_corpus, tmp_path / "one", kind)
    make_variant(smoke_corpus, tmp_path / "two", kind)
    source, test = (load_corpus(root, "test") for root in (smoke_corpus, tmp_path / "one"))
    assert content_hash(tmp_path / "one") == content_hash(tmp_path / "two") == test.content_hash
    assert [image.id for image in test.images] == [image.id for image in source.images]
    for ours, theirs in zip(test.captions, source.captions, strict=True):
        assert (ours.id, ours.image_id) == (theirs.id, theirs.image_id)
    same_picture = [
        np.array_equal(read_image(ours.path), read_image(theirs.path))
        for ours, theirs in zip(test.images, source.images, strict=True)
    ]
    same_sound = [
        ours.audio.read_bytes() == theirs.audio.read_bytes()
        for ours, theirs in zip(test.captions, source.captions, strict=False)
        if ours.audio.name == theirs.audio.name
    ]
    if kind == "scans":
        assert all(same_picture)
        assert {len(read_audio(caption.audio)) for caption in test.captions} == {RAY * RAYS}
        assert check_corpus(tmp_path / "one").ok
        assert read_ground_truth(test) is None  # its words are not said
    else:
        assert not any(same_picture)
        assert len(same_sound) == len(test.captions)
        assert all(same_sound)


def test_an_id_that_looks_like_a_path_leads_nowhere(smoke_corpus, tmp_path):
    source = shutil.copytree(smoke_corpus, tmp_path / "deep" / "er" / "source")
    [first, *_] = load_corpus(source, "test").captions
    for file in [*source.glob("*.json"), *source.glob("ground_truth/test*.jsonl")]:
        named = file.read_text().replace(f'"{first.id}"', '"../../../../escaped"')
        file.write_text(named)
    assert load_corpus(source, "test").captions[0].id == "../../../../escaped"
    make_variant(source, tmp_path / "deep" / "er" / "scans", "scans")
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"er"}
    assert load_corpus(tmp_path / "deep" / "er" / "scans", "test").captions[0].audio.is_file()


def test_what_is_in_the_way_stays_and_an_earlier_try_is_made_again(smoke_corpus, tmp_path):
    making = tmp_path / "sketches.making"
    making.mkdir()
    (making / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"sketches\.making: is in the way"):
        make_variant(smoke_corpus, tmp_path / "sketches", "sketches")
    assert (making / "mine.txt").read_text() == "mine"
    (making / "mine.txt").rename(making / "recipe.json")  # as a try that was killed leaves it
    make_variant(smoke_corpus, tmp_path / "sketches", "sketches")
    assert [path.name for path in tmp_path.iterdir()] == ["sketches"]


def test_a_variant_is_kept_and_nothing_else_is_overwritten(smoke_corpus, tmp_path):
    make_variant(smoke_corpus, tmp_path / "scans", "scans")
    identity = tmp_path / "scans" / "corpus.json"
    before = identity.stat().st_mtime_ns
    make_variant(smoke_corpus, tmp_path / "scans", "scans")
    assert identity.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="scans: holds something else"):
        make_variant(smoke_corpus, tmp_path / "scans", "sketches")
    with pytest.raises(InputError, match="scans: has no ground truth"):
        make_variant(tmp_path / "scans", tmp_path / "again", "scans")
    with pytest.raises(InputError, match="no kind 'smells'"):
        make_variant(smoke_corpus, tmp_path / "again", "smells")
    assert not (tmp_path / "again").exists()
    assert json.loads(identity.read_text())["name"] == "RangeScans"
