"""The Recall@K of an all-knowing system on a gallery of SpokenScenes, exactly, from the facts.

A caption can be true of several images of the gallery, so no system can always tell which one was
meant. The all-knowing one gives a pair the score 1 / (number of images that the caption is true
of) if the caption is true of the image, else 0, and breaks ties at random: the expectation of its
Recall@K is computed in closed form.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations
from math import comb
from typing import Any

import numpy as np

from cmdlab.corpora.scenes import ATTRIBUTES, VALUES, Scene

CUTOFFS = (1, 5, 10)


def ceiling(
    facts: Sequence[dict[str, Any]], caption_image: np.ndarray, scenes: Sequence[Scene]
) -> dict[str, dict[str, float]]:
    """Expected Recall@1/5/10 in percent, both directions.

    facts: one for each of N captions; caption_image: int [N], the index of each caption's scene;
    scenes: the gallery.
    """
    true_images = images_told_of(facts, scenes)
    to_image = {
        f"R@{k}": 100 * float(np.mean([min(1.0, k / len(images)) for images in true_images]))
        for k in CUTOFFS
    }
    captions_of: dict[int, list[tuple[int, bool]]] = defaultdict(list)
    for caption, images in enumerate(true_images):
        for image in images:
            captions_of[int(image)].append((len(images), caption_image[caption] == image))
    galleries = sorted({int(image) for image in caption_image})
    to_speech = {
        f"R@{k}": 100 * float(np.mean([_chance_of_a_hit(captions_of[i], k) for i in galleries]))
        for k in CUTOFFS
    }
    return {"speech_to_image": to_image, "image_to_speech": to_speech}


def images_told_of(facts: Sequence[dict[str, Any]], scenes: Sequence[Scene]) -> list[np.ndarray]:
    """For each caption the indices of the scenes that it is true of, ascending.

    Agrees with `scenes.caption_is_true`, which is the definition; vectorised over the scenes.
    """
    most = max(len(scene.objects) for scene in scenes)
    coded = np.full((len(scenes), most, len(ATTRIBUTES)), -1, np.int8)  # -1: no such object
    for i, scene in enumerate(scenes):
        for j, item in enumerate(scene.objects):
            coded[i, j] = [VALUES[name].index(getattr(item, name)) for name in ATTRIBUTES]
    return [np.flatnonzero(_is_true(caption, coded)) for caption in facts]


def _is_true(facts: dict[str, Any], coded: np.ndarray) -> np.ndarray:
    """bool [scenes]; coded: int8 [scenes, objects, attributes]."""
    fits = []  # for each mention bool [scenes, objects]: the object has all that is said of it
    for mention in facts["mentions"]:
        fit = coded[..., 0] >= 0
        for name, value in mention.items():
            fit = fit & (coded[..., ATTRIBUTES.index(name)] == VALUES[name].index(value))
        fits.append(fit)
    true = np.zeros(len(coded), bool)
    for chosen in permutations(range(coded.shape[1]), len(fits)):
        holds = np.logical_and.reduce([fit[:, j] for fit, j in zip(fits, chosen, strict=True)])
        for i, relation, j in facts["relations"]:
            axis = ATTRIBUTES.index("column" if relation in ("left of", "right of") else "row")
            difference = coded[:, chosen[i], axis] - coded[:, chosen[j], axis]
            holds &= difference < 0 if relation in ("left of", "above") else difference > 0
        true |= holds
    return true


def _chance_of_a_hit(captions: list[tuple[int, bool]], k: int) -> float:
    """The chance that one of an image's own captions is among the first k.

    captions: for each caption true of the image, the number of images that it is true of (fewer
    comes first, equal ones in random order) and whether it is the image's own.
    """
    before = 0
    for spread in sorted({spread for spread, _ in captions}):
        group = [own for other, own in captions if other == spread]
        places = min(k - before, len(group))
        if places <= 0:
            return 0.0
        if any(group):  # a group after the first one with an own caption adds nothing
            miss = comb(len(group) - sum(group), places) / comb(len(group), places)
            return 1 - miss
        before += len(group)
    return 0.0
