"""The ceiling against what it stands for: the all-knowing system, tried out and counted out."""

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdlab.corpora.ceiling import CUTOFFS, ceiling, images_told_of
from cmdlab.corpora.scenes import Scene, caption_is_true, sample_captions, sample_scene


def gallery(
    seed: int, images: int, captions: int, *, plain: bool = True
) -> tuple[list[dict], np.ndarray, list[Scene]]:
    """Facts, the image of each caption, scenes; in a plain world many captions fit many scenes."""
    rng = np.random.default_rng(seed)
    scenes = []
    for _ in range(images):
        scene = sample_scene(rng, int(rng.integers(2, 4)) if plain else None)
        if plain:
            same = {"size": "small", "texture": "plain", "shape": "star", "row": "top"}
            objects = tuple(
                replace(item, colour=("red", "blue")[i % 2], **same)
                for i, item in enumerate(scene.objects)
            )
            scene = Scene(objects)
        scenes.append(scene)
    facts = [c.facts for scene in scenes for c in sample_captions(scene, rng)[:captions]]
    return facts, np.repeat(np.arange(images), captions), scenes


def all_knowing_scores(facts: list[dict], scenes: list[Scene]) -> np.ndarray:
    """float [captions, images]: 1 / (number of images that it is true of), or 0."""
    true = np.array([[caption_is_true(one, scene) for scene in scenes] for one in facts])
    return true / true.sum(1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_the_images_told_of_are_those_that_the_definition_names(seed, plain):
    facts, _, scenes = gallery(seed, 8, 3, plain=plain)
    for one, told in zip(facts, images_told_of(facts, scenes), strict=True):
        assert told.tolist() == [i for i, s in enumerate(scenes) if caption_is_true(one, s)]


def test_two_images_that_nobody_can_tell_apart():
    scene = gallery(0, 1, 1)[2][0]
    facts = {"mentions": [{"shape": "star"}], "relations": []}
    found = ceiling([facts, facts], np.array([0, 1]), [scene, scene])
    assert found["speech_to_image"] == {"R@1": 50.0, "R@5": 100.0, "R@10": 100.0}
    assert found["image_to_speech"] == {"R@1": 50.0, "R@5": 100.0, "R@10": 100.0}


def test_a_caption_of_one_image_alone_is_always_found():
    facts = [{"mentions": [{"colour": colour}], "relations": []} for colour in ("red", "blue")]
    red, blue = (
        Scene((replace(gallery(0, 1, 1)[2][0].objects[0], colour=colour),))
        for colour in ("red", "blue")
    )
    found = ceiling(facts, np.array([0, 1]), [red, blue])
    assert found["speech_to_image"]["R@1"] == found["image_to_speech"]["R@1"] == 100.0


@pytest.mark.parametrize("seed", range(3))
def test_every_order_of_equal_scores_counted_out(seed):
    """A gallery so small that all ways to break ties can be gone through: the mean is exact."""
    facts, owner, scenes = gallery(seed, 3, 2)
    scores = all_knowing_scores(facts, scenes)
    found = ceiling(facts, owner, scenes)
    own = owner[:, None] == np.arange(len(scenes))
    for direction, query_scores, right in (
        ("speech_to_image", scores, own),
        ("image_to_speech", scores.T, own.T),
    ):
        for k in CUTOFFS:
            hits = [
                right[query][sorted(order, key=lambda i, q=query: -query_scores[q][i])[:k]].any()
                for query, order in product(
                    range(len(right)), list(permutations(range(right.shape[1])))
                )
            ]
            assert found[direction][f"R@{k}"] == pytest.approx(100 * np.mean(hits), abs=1e-9)


def test_the_all_knowing_system_tried_out():
    facts, owner, scenes = gallery(5, 14, 3)
    scores = all_knowing_scores(facts, scenes)
    found = ceiling(facts, owner, scenes)
    rng = np.random.default_rng(0)
    draws = 3000
    for direction, query_scores, right in (
        ("speech_to_image", scores, owner[:, None] == np.arange(14)),
        ("image_to_speech", scores.T, np.arange(14)[:, None] == owner),
    ):
        recalls = np.zeros((draws, len(CUTOFFS)))
        for draw in range(draws):
            tie_break = rng.random(query_scores.shape)
            order = np.lexsort((tie_break, -query_scores), axis=1)
            ordered = np.take_along_axis(right, order, axis=1)
            recalls[draw] = [100 * ordered[:, :k].any(1).mean() for k in CUTOFFS]
        error = recalls.std(0) / draws**0.5
        expected = [found[direction][f"R@{k}"] for k in CUTOFFS]
        assert 5 < expected[0] < 95  # so that there are ties to break
        assert (np.abs(recalls.mean(0) - expected) <= 5 * error + 1e-9).all()
