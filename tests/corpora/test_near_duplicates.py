"""Which pictures are nearly the same."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from cmdlab.corpora.near_duplicates import NEAR, STEPS, group_near_duplicates, perceptual_hash
from cmdlab.corpora.rendering import render
from cmdlab.corpora.scenes import sample_scene


def scene(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(render(sample_scene(rng), rng)[0])


def drawing(colour: str) -> Image.Image:
    """A disc on white."""
    picture = Image.new("RGB", (300, 280), "white")
    ImageDraw.Draw(picture).ellipse((40, 30, 250, 240), fill=colour)
    return picture


def line_drawing(seed: int) -> Image.Image:
    """Some black lines on white: nearly all of it is white."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (300, 280), "white")
    for _ in range(5):
        points = [tuple(map(int, rng.integers(20, 260, 2))) for _ in range(3)]
        ImageDraw.Draw(picture).line(points, fill="black", width=2)
    return picture


def saved_again(picture: Image.Image, quality: int) -> Image.Image:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=quality)
    return Image.open(content)


CHANGES = {
    "JPEG": lambda p: saved_again(p, 60),
    "smaller": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS),
    "larger": lambda p: p.resize((p.width * 3, p.height * 3), Image.Resampling.BICUBIC),
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_saved_again_is_of_one_group_with_it(change):
    pictures = [scene(seed) for seed in range(20)] + [line_drawing(seed) for seed in range(20)]
    pictures += [drawing("red"), drawing("green")]
    hashes = [perceptual_hash(one) for one in pictures]
    hashes += [perceptual_hash(CHANGES[change](one).convert("RGB")) for one in pictures]
    groups = group_near_duplicates(hashes)
    np.testing.assert_array_equal(groups[: len(pictures)], groups[len(pictures) :])


def test_pictures_of_one_style_are_no_duplicates():
    pictures = [scene(seed) for seed in range(40)] + [line_drawing(seed) for seed in range(20)]
    pictures += [drawing(colour) for colour in ("red", "green", "blue", "black")]
    pictures += [Image.new("RGB", (50, 50), colour) for colour in ("red", "green", "blue")]
    pictures += [Image.linear_gradient("L").rotate(90 * n).convert("RGB") for n in range(4)]
    groups = group_near_duplicates([perceptual_hash(one) for one in pictures])
    assert len(set(groups.tolist())) == len(pictures)


def test_groups_are_those_of_comparing_every_two_one_by_one():
    rng = np.random.default_rng(0)
    hashes = rng.integers(-90, 91, (40, 192)).astype(np.int8)
    limit = int(NEAR * STEPS)
    for new, old, steps in ((20, 3, limit), (21, 4, limit + 1), (22, 20, limit), (23, 5, 0)):
        hashes[new] = hashes[old] + steps
    groups = group_near_duplicates([one.tobytes() for one in hashes])
    label = list(range(len(hashes)))  # by hand: the smaller label spreads until nothing changes
    for _ in range(4):
        for i, one in enumerate(hashes.astype(int)):
            for j, other in enumerate(hashes.astype(int)):
                if np.sqrt(np.mean((one - other) ** 2)) <= NEAR * STEPS:
                    label[i] = min(label[i], label[j])
    assert [[a == b for a in groups] for b in groups] == [[a == b for a in label] for b in label]
    assert groups[3] == groups[20] == groups[22]  # by way of one another
    assert groups[4] != groups[21]
