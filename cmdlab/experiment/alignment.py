"""Fine alignment: does a spoken word fall on its object, does a caption beat its own foil?

A word's map is the product of its mean frame token and every patch, both projected into the shared
space. It needs no denoiser, so it is measured alike on every arm.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmdlab.corpora import COLOURS, SHAPES, GroundTruth, TimedWord
from cmdlab.encoders import (
    IMAGE,
    IMAGE_GRID,
    TOKENS_PER_SECOND,
    Features,
    FeatureStore,
    tiny_encoder,
)
from cmdlab.retrieval import RetrievalModel

PATCH = 64 / IMAGE_GRID  # pixels
BATCH = 250  # pairs
TELLING = {word for table in (SHAPES, COLOURS) for words in table.values() for word in words}


@torch.inference_mode()
def word_maps(
    model: RetrievalModel, features: Features, caption: int, words: list[TimedWord]
) -> Tensor:
    """How well each word fits each patch, float32 [words, 64] in row order; higher is better."""
    states, lengths = features.speech.tokens([caption])
    tokens, _ = model.speech_head(states, lengths)
    frames = model.speech_head.projection(tokens[0, : int(lengths)])  # [tokens, D]
    patches, _ = features.image.tokens([int(features.image_index[caption])])
    patches, _ = model.image_head(patches[0], features.image.embeddings[:1])
    if model.image_head.pools_patches:
        projected = model.image_head.projection(patches[0])
    else:
        projected = tiny_encoder(IMAGE).project(patches[0])
    projected = projected - projected.mean(0)  # what all patches share points nowhere
    maps = []
    for word in words:
        first = min(int(word.start * TOKENS_PER_SECOND), len(frames) - 1)
        last = max(first + 1, min(round(word.end * TOKENS_PER_SECOND), len(frames)))
        maps.append(projected @ frames[first:last].mean(0))
    return torch.stack(maps)


def pointing_game(
    model: RetrievalModel, features: Features, truth: GroundTruth, captions: range
) -> dict[str, Any] | None:
    """Of the words that name a shape or a colour, how many have their best patch on their object.

    A hit: the centre of the best patch lies in the object's box (Zhang et al. 2016). `chance` is
    the mean fraction of patches that would be one. Returns None where no word names any.
    """
    centre = (np.arange(IMAGE_GRID) + 0.5) * PATCH
    hits, chance = [], []
    for caption in captions:
        boxes = truth.boxes[int(features.image_index[caption])]
        words = [word for word in truth.words[caption] if word.word in TELLING]
        words = [word for word in words if word.object is not None]
        if not words:
            continue
        best = word_maps(model, features, caption, words).argmax(1)
        for word, patch in zip(words, best.tolist(), strict=True):
            x0, y0, x1, y1 = boxes[word.object]
            inside = ((y0 <= centre) & (centre < y1))[:, None] & ((x0 <= centre) & (centre < x1))
            hits.append(bool(inside.flat[patch]))
            chance.append(float(inside.mean()))
    if not hits:
        return None
    return {"hits": sum(hits), "words": len(hits), "chance": float(np.mean(chance))}


@torch.inference_mode()
def foil_test(
    model: RetrievalModel, features: Features, foils: FeatureStore, caption_of_foil: list[int]
) -> dict[str, Any]:
    """How often an image scores higher with its caption than with the caption's foil.

    foils: the foils' speech; caption_of_foil: for each the caption (a row of `features.speech`)
    whose first two colours were exchanged, in the same voice.
    """
    wins = ties = 0
    for first in range(0, len(foils), BATCH):
        rows = range(first, min(first + BATCH, len(foils)))
        captions = [caption_of_foil[row] for row in rows]
        images = features.image_index[captions]
        patches, _ = features.image.tokens(images.tolist())
        _, image = model.image_head(patches[:, 0], features.image.embeddings[images])
        said = (model.speech_head(*features.speech.tokens(captions))[1] * image).sum(1)
        swapped = (model.speech_head(*foils.tokens(rows))[1] * image).sum(1)
        wins += int((said > swapped).sum())
        ties += int((said == swapped).sum())
    return {"wins": wins, "ties": ties, "pairs": len(foils)}
