"""Which captions a step of training takes. The seed and the step's number decide it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cmdlab.corpora import Caption
from cmdlab.encoders import Features
from cmdlab.errors import InputError

ROWS = 1_000  # of the pictures' similarities that are held at a time


class Batches:
    """The captions of every step of a run.

    An epoch is a permutation of the captions, cut into batches; what is left over is dropped. With
    `hard_negatives` that part of a batch is replaced: by captions of the pictures that look most
    like those of as many others, judged by the frozen embedding. Whoever is to tell pictures apart
    that hold the same things must meet them side by side (Faghri et al. 2018).

    `size` is the captions of a batch, `count` the batches of an epoch.
    """

    def __init__(
        self,
        features: Features,
        *,
        seed: int,
        batch_size: int,
        images: int = 0,
        hard_negatives: float = 0.0,
        without_words: str = "",
    ) -> None:
        """images: how many pictures are used, drawn by the seed; of one seed, fewer are part of
        more; 0: all. hard_negatives: up to 0.5. without_words: captions that hold one of these are
        left out, see `holding`.

        Raises InputError for more pictures than there are, and where no caption is left.
        """
        there = len(features.image)
        if images > there:
            raise InputError(f"images: {images} are more than the {there} of the training split")
        drawn = np.arange(there)
        if images:
            drawn = np.random.default_rng([seed, 1 << 32]).permutation(there)[:images]
        self.seed = seed
        self.image_of = features.image_index.numpy()
        self.used = np.flatnonzero(np.isin(self.image_of, drawn))
        if without_words:
            self.used = self.used[~holding(features.corpus.captions, without_words)[self.used]]
        if not len(self.used):
            raise InputError(f"without_words: {without_words!r} leaves no caption to train with")
        self.size = min(batch_size, len(self.used))
        self.count = len(self.used) // self.size
        self.hard = int(hard_negatives * self.size)
        if self.hard:
            told_of = np.unique(self.image_of[self.used])
            self.alike = _most_alike(features.image.embeddings, told_of)
            order = self.used[np.argsort(self.image_of[self.used], kind="stable")]
            counts = np.bincount(self.image_of[order], minlength=there)
            self.captions_of = np.split(order, np.cumsum(counts)[:-1])

    def captions(self, step: int) -> Tensor:
        """int64 [size], rows of the captions."""
        epoch, within = divmod(step, self.count)
        order = self.used[np.random.default_rng([self.seed, epoch]).permutation(len(self.used))]
        captions = order[within * self.size : (within + 1) * self.size]
        if self.hard:
            alike = self.alike[self.image_of[captions[: self.hard]]]
            rng = np.random.default_rng([self.seed, 1 << 33, step])
            captions[-self.hard :] = [rng.choice(self.captions_of[image]) for image in alike]
        return torch.from_numpy(captions)


def holding(captions: Sequence[Caption], words: str) -> np.ndarray:
    """Which of the captions hold one of the words, which blanks part; bool [captions]."""
    sought = set(words.split())
    return np.array([not sought.isdisjoint(caption.text.split()) for caption in captions])


def _most_alike(embeddings: Tensor, images: np.ndarray) -> np.ndarray:
    """For each of the images the one among them with the nearest embedding, int64 [all images];
    whatever for those that are not among them."""
    chosen = embeddings[torch.from_numpy(images)]
    alike = np.zeros(len(embeddings), np.int64)
    for first in range(0, len(images), ROWS):
        rows = torch.arange(first, min(first + ROWS, len(images)))
        scores = chosen[rows] @ chosen.T
        scores[torch.arange(len(rows)), rows] = -torch.inf
        alike[images[rows.numpy()]] = images[scores.argmax(1).numpy()]
    return alike
