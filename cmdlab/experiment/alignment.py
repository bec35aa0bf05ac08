"""Fine alignment: does a spoken word fall on its object, does a caption beat its own foil?

A word's map is the product of its mean frame token and every patch, both projected into the shared
space. It needs no denoiser, so it is measured alike on every arm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmdlab.corpora import COLOURS, IMAGE_SIZE, SHAPES, GroundTruth, TimedWord
from cmdlab.encoders import Features
from cmdlab.retrieval import RetrievalModel

BATCH = 250  # pairs
TELLING = {word for table in (SHAPES, COLOURS) for words in table.values() for word in words}


@dataclass(frozen=True)
class Aligned:
    """One caption and its image in the shared space, piece by piece."""

    frames: Tensor  # [tokens, D] of the speech
    patches: Tensor  # [P, D], in row order, without what all of them share
    tokens_per_second: float | None  # of the frames; None where each is a word

    def word_maps(self, words: list[TimedWord]) -> Tensor:
        """How well each of the caption's words fits each patch, float32 [words, P]; higher is
        better."""
        if self.tokens_per_second is None:
            return self.frames @ self.patches.T
        maps = []
        for word in words:
            first = min(int(word.start * self.tokens_per_second), len(self.frames) - 1)
            last = max(first + 1, min(round(word.end * self.tokens_per_second), len(self.frames)))
            maps.append(self.patches @ self.frames[first:last].mean(0))
        return torch.stack(maps)


@torch.inference_mode()
def align(model: RetrievalModel, features: Features, captions: Sequence[int]) -> Iterator[Aligned]:
    """Each caption with its image."""
    head = model.image_head
    project = head.projection if head.pools_patches else features.image.encoder.open().project
    rate = features.speech.description.tokens_per_second
    for first in range(0, len(captions), BATCH):
        batch = captions[first : first + BATCH]
        states, lengths = features.speech.tokens(batch)
        images = features.image_index[torch.as_tensor(batch)]
        images, image_of = images.unique(return_inverse=True)  # several captions may share one
        patches = features.image.patches(images.tolist())
        patches = project(head(patches, features.image.embeddings[images])[0])
        patches = patches - patches.mean(1, keepdim=True)
        frames = model.speech_head.projection(model.speech_head(states, lengths)[0])
        for i, length in enumerate(lengths.tolist()):
            yield Aligned(frames[i, :length], patches[image_of[i]], rate)


def pointing_game(
    model: RetrievalModel, features: Features, truth: GroundTruth, captions: range
) -> dict[str, Any] | None:
    """Of the words that name a shape or a colour, how many have their best patch on their object.

    A hit: the centre of the best patch lies in the object's box (Zhang et al. 2016). `chance` is
    the mean fraction of patches that would be one. Returns None where no word names any.
    """
    x, y = features.image.description.patch_centres(IMAGE_SIZE, IMAGE_SIZE)
    hits, chance = [], []
    for caption, aligned in zip(captions, align(model, features, captions), strict=True):
        boxes = truth.boxes[int(features.image_index[caption])]
        words = truth.words[caption]
        best = aligned.word_maps(words).argmax(1)
        for word, patch in zip(words, best.tolist(), strict=True):
            if word.object is None or word.word not in TELLING:
                continue
            x0, y0, x1, y1 = boxes[word.object]
            inside = ((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1))
            hits.append(bool(inside.flat[patch]))
            chance.append(float(inside.mean()))
    if not hits:
        return None
    return {"hits": sum(hits), "words": len(hits), "chance": float(np.mean(chance))}


def foil_test(said: Tensor, foil: Tensor, image: Tensor) -> dict[str, int]:
    """How often an image scores higher with its caption than with the caption's foil.

    said, foil, image: embeddings [foils, D] of a caption, of the same caption with its first two
    colours exchanged, in the same voice, and of the caption's image.
    """
    own, other = (said * image).sum(1), (foil * image).sum(1)
    wins, ties = int((own > other).sum()), int((own == other).sum())
    return {"wins": wins, "ties": ties, "pairs": len(foil)}
