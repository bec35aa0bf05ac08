"""Pointing game and foil test, counted by hand on features that are made up."""

import numpy as np
import pytest
import torch

from cmdlab.corpora.ground_truth import GroundTruth, TimedWord
from cmdlab.experiment import alignment
from cmdlab.experiment.alignment import foil_test, pointing_game, word_maps
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


def test_a_map_weighs_every_patch_and_is_centred(features, model):
    maps = word_maps(model, features, 5, WORDS)
    assert maps.shape == (3, 64)
    assert torch.allclose(maps.sum(1), torch.zeros(3), atol=1e-4)
    assert (maps.std(1) > 0).all()


def test_a_word_beyond_the_sound_takes_its_last_frame(features, model):
    last = int(features.speech.lengths[5]) / alignment.TOKENS_PER_SECOND
    late = [TimedWord("red", 50, 51, 0), TimedWord("red", last - 0.08, last, 0)]
    maps = word_maps(model, features, 5, late)
    assert torch.equal(maps[0], maps[1])


def test_a_hit_is_a_best_patch_in_the_box(features, model):
    best = word_maps(model, features, 0, WORDS).argmax(1).tolist()
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


def test_a_foil_that_is_its_caption_ties(features, model):
    rows = list(range(8))
    found = foil_test(model, features, features.speech, rows)
    assert found == {"wins": 0, "ties": 8, "pairs": 8}


def test_wins_are_counted_over_all_batches(features, model, toy_features, monkeypatch):
    foils = toy_features(images=4, seed=5).speech
    rows = [3, 0, 7, 5, 1, 1, 6, 2]
    with torch.inference_mode():
        wins = 0
        for foil, caption in enumerate(rows):
            image = int(features.image_index[caption])
            patches = features.image.tokens([image])[0][:, 0]
            seen = model.image_head(patches, features.image.embeddings[[image]])[1]
            said = model.speech_head(*features.speech.tokens([caption]))[1]
            swapped = model.speech_head(*foils.tokens([foil]))[1]
            wins += bool((said * seen).sum() > (swapped * seen).sum())
    assert 0 < wins < 8
    for size in (250, 3):
        monkeypatch.setattr(alignment, "BATCH", size)
        found = foil_test(model, features, foils, rows)
        assert found == {"wins": wins, "ties": 0, "pairs": 8}
