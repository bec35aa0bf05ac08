"""Pointing game and foil test, counted by hand on features that are made up."""

import numpy as np
import pytest
import torch

from cmdlab.corpora.ground_truth import GroundTruth, TimedWord
from cmdlab.experiment import alignment
from cmdlab.experiment.alignment import align, foil_test, pointing_game
from cmdlab.retrieval.model import RetrievalModel, Shape

SHAPE = Shape(2, 16, 12, 8, image_head="patches")
WORDS = [TimedWord("red", 0.0, 0.1, 0), TimedWord("a", 0.1, 0.2, 0), TimedWord("star", 0.15, 9, 0)]


@pytest.fixture(scope="module")
def features(toy_features):
    return toy_features(images=4, patches=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    return RetrievalModel(SHAPE).eval()


def truth_with(boxes: list[list[float]], words: list[TimedWord]) -> GroundTruth:
    """Four images with these boxes, each with two captions of these words."""
    return GroundTruth([], [np.array(boxes, np.float32)] * 4, [], [words] * 8)


def box_around(patch: int) -> list[float]:
    row, column = divmod(patch, 8)
    return [8 * column, 8 * row, 8 * column + 8, 8 * row + 8]


def maps_of(model, features, caption, words):
    return next(align(model, features, [caption])).word_maps(words)


def test_a_map_weighs_every_patch_and_is_centred(features, model):
    maps = maps_of(model, features, 5, WORDS)
    assert maps.shape == (3, 64)
    assert torch.allclose(maps.sum(1), torch.zeros(3), atol=1e-4)
    assert (maps.std(1) > 0).all()


def test_a_word_beyond_the_sound_takes_its_last_frame(features, model):
    last = int(features.speech.lengths[5]) / features.speech.description.tokens_per_second
    late = [TimedWord("red", 50, 51, 0), TimedWord("red", last - 0.08, last, 0)]
    maps = maps_of(model, features, 5, late)
    assert torch.equal(maps[0], maps[1])


def test_a_hit_is_a_best_patch_in_the_box(features, model):
    best = maps_of(model, features, 0, WORDS).argmax(1).tolist()
    red = truth_with([box_around(best[0])], WORDS[:1])
    assert pointing_game(model, features, red, range(1)) == {
        "hits": 1,
        "words": 1,
        "chance": pytest.approx(1 / 64),
    }
    missed = truth_with([box_around((best[0] + 9) % 64)], WORDS[:1])
    assert pointing_game(model, features, missed, range(1))["hits"] == 0
    everywhere = truth_with([[0, 0, 64, 64]], WORDS)
    found = pointing_game(model, features, everywhere, range(8))
    assert found == {"hits": 16, "words": 16, "chance": 1.0}  # "a" names neither shape nor colour


def test_words_that_name_nothing_point_nowhere(features, model):
    silent = truth_with([[0, 0, 64, 64]], [TimedWord("a", 0.0, 0.1, 0)])
    assert pointing_game(model, features, silent, range(8)) is None


def test_a_box_holds_the_patches_whose_centres_it_holds(features, model):
    found = pointing_game(model, features, truth_with([[4, 4, 20.5, 13]], WORDS[:1]), range(1))
    assert found["chance"] == pytest.approx(3 * 2 / 64)  # centres at 4, 12, 20 and at 4, 12


def test_pairs_are_aligned_alike_in_batches_of_any_size(features, model, monkeypatch):
    alone = [maps_of(model, features, caption, WORDS) for caption in range(8)]
    monkeypatch.setattr(alignment, "BATCH", 3)
    for one, aligned in zip(alone, align(model, features, range(8)), strict=True):
        assert torch.allclose(aligned.word_maps(WORDS), one, atol=1e-5)


def test_a_foil_loses_wins_or_ties():
    image = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    said = torch.tensor([[0.5, 9.0], [0.25, 0.0], [0.75, -1.0], [-0.5, 0.0]])
    foil = torch.tensor([[0.25, 9.5], [0.25, 7.0], [1.0, 0.0], [-1.0, 1.0]])
    assert foil_test(said, foil, image) == {"wins": 2, "ties": 1, "pairs": 4}
