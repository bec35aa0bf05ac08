"""The Recall@K of an all-knowing system on a gallery of SpokenScenes, exactly, from the facts.

A caption can be true of several images of the gallery, so no system can always tell which one was
meant. The all-knowing one gives a pair the score 1 / (number of images that the caption is true
of) if the caption is true of the image, else 0, and breaks ties at random: the expectation of its
Recall@K is computed in closed form.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import reduce
from math import comb
from typing import Any

import numpy as np

from cmdlab.corpora.scenes import ATTRIBUTES, VALUES, Scene, caption_is_true

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

    Agrees with `scenes.caption_is_true`, which is the definition, and asks it only of the scenes
    that have an object for each of the caption's mentions: one in a hundred or so.
    """
    most = max(len(scene.objects) for scene in scenes)
    is_so = {  # bool [objects, scenes] for each attribute and value; False where there is no object
        (name, value): np.zeros((most, len(scenes)), bool)
        for name in ATTRIBUTES
        for value in VALUES[name]
    }
    for i, scene in enumerate(scenes):
        for j, item in enumerate(scene.objects):
            for name in ATTRIBUTES:
                is_so[name, getattr(item, name)][j, i] = True
    is_there = reduce(np.logical_or, (is_so["shape", shape] for shape in VALUES["shape"]))
    told_of = []
    for caption in facts:
        fits = [
            reduce(np.logical_and, (is_so[stated] for stated in mention.items()), is_there).any(0)
            for mention in caption["mentions"]
        ]
        candidates = np.flatnonzero(reduce(np.logical_and, fits)).tolist()
        true = [image for image in candidates if caption_is_true(caption, scenes[image])]
        told_of.append(np.array(true, np.int64))
    return told_of


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
