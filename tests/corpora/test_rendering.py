"""Pictures: what is drawn lies in its box, and what is said can be seen."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdlab.corpora.rendering import EXTENT, RADIUS, SIGNED_DISTANCE, render
from cmdlab.corpora.scenes import COLOURS, SHAPES, SIZES, TEXTURES, Scene, SceneObject, sample_scene

CENTRED = SceneObject("circle", "white", "large", "plain", "middle", "centre")


def painted(scene: Scene, index: int, seed: int) -> np.ndarray:
    """bool [64, 64]: where the object's colour can be seen, as a change of it changes the picture.

    All else that is random stays the same.
    """
    item = scene.objects[index]
    pictures = []
    for colour in ("white", "blue"):
        objects = list(scene.objects)
        objects[index] = replace(item, colour=colour)
        picture, _ = render(Scene(tuple(objects)), np.random.default_rng(seed))
        pictures.append(picture.astype(int))
    return np.abs(pictures[0] - pictures[1]).sum(-1) > 120


def test_the_seed_decides():
    scene = sample_scene(np.random.default_rng(3))
    first, boxes = render(scene, np.random.default_rng(4))
    again, _ = render(scene, np.random.default_rng(4))
    other, _ = render(scene, np.random.default_rng(5))
    assert first.dtype == np.uint8
    assert first.shape == (64, 64, 3)
    assert boxes.dtype == np.float32
    assert boxes.shape == (len(scene.objects), 4)
    assert (first == again).all()
    assert (first != other).any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_object_leaves_its_box(seed):
    scene = sample_scene(np.random.default_rng(seed))
    _, boxes = render(scene, np.random.default_rng(seed))
    assert (boxes >= 0).all()
    assert (boxes <= 64).all()
    for index, (x0, y0, x1, y1) in enumerate(boxes.astype(int)):
        rows, columns = np.nonzero(painted(scene, index, seed))
        assert len(rows) > 0
        # A box holds the pixels that are at least half covered; a fine point reaches beyond.
        assert rows.min() >= y0 - 2
        assert columns.min() >= x0 - 2
        assert rows.max() < y1 + 2
        assert columns.max() < x1 + 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_box_is_as_small_as_its_object(shape, size):
    scene = Scene((replace(CENTRED, shape=shape, size=size),))
    _, boxes = render(scene, np.random.default_rng(0))
    rows, columns = np.nonzero(painted(scene, 0, 0))
    drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert boxes[0] == pytest.approx(drawn, abs=2)


def test_no_two_shapes_cover_the_same_pixels():
    masks = [painted(Scene((replace(CENTRED, shape=shape),)), 0, 1) for shape in SHAPES]
    for one, other in combinations(masks, 2):
        assert (one & other).sum() / (one | other).sum() < 0.95


@pytest.mark.parametrize("name", ["colour", "texture"])
def test_every_colour_and_texture_can_be_seen(name):
    pictures = []
    for value in {"colour": COLOURS, "texture": TEXTURES}[name]:
        scene = Scene((replace(CENTRED, shape="square", **{name: value}),))
        picture, boxes = render(scene, np.random.default_rng(2))
        x0, y0, x1, y1 = boxes[0].astype(int)
        pictures.append(picture[y0:y1, x0:x1].astype(int))
    for one, other in combinations(pictures, 2):
        assert np.abs(one - other).mean() > 10  # of 255; the noise is the same in both


@settings(deadline=None)
@given(
    st.sampled_from(sorted(SIGNED_DISTANCE)),
    st.floats(0, 2 * np.pi),
    st.floats(EXTENT, 20.0),
)
def test_no_shape_reaches_out_of_its_window(shape, direction, away):
    """Half a pixel from its edge on an object covers nothing, and only its window is drawn."""
    smallest = 0.93 * min(RADIUS.values())
    u, v = (np.array([[away * turn(direction)]]) for turn in (np.cos, np.sin))
    assert SIGNED_DISTANCE[shape](u, v) * smallest >= 0.5
