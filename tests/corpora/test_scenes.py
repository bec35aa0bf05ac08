"""Scenes and captions: what is said is true, differs, and is what the facts say."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdlab.corpora.scenes import (
    ATTRIBUTES,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    VALUES,
    Scene,
    SceneObject,
    SpokenText,
    caption_is_true,
    mend_articles,
    relation_holds,
    sample_captions,
    sample_scene,
    sample_twins,
    swap_colours,
    vocabulary,
)
from cmdlab.encoders.pretraining import LONGEST_TEXT

seeds = st.integers(0, 2**32 - 1)
RED_CIRCLE = SceneObject("circle", "red", "small", "plain", "top", "left")
BLUE_SQUARE = SceneObject("square", "blue", "large", "striped", "bottom", "right")
SCENE = Scene((RED_CIRCLE, BLUE_SQUARE))


def sampled(seed: int, count: int | None = None) -> tuple[Scene, list[SpokenText]]:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, count)
    return scene, sample_captions(scene, rng)


def test_the_world_is_large_enough():
    assert len(SHAPES) >= 12
    assert len(COLOURS) >= 10
    assert len(vocabulary()) >= 100


def test_no_word_names_two_things():
    names = [w for table in (SHAPES, COLOURS, SIZES, TEXTURES) for v in table.values() for w in v]
    assert len(names) == len(set(names))


def test_every_word_of_the_vocabulary_is_spoken_and_no_other():
    said: set[str] = set()
    for seed in range(1500):
        for caption in sampled(seed)[1]:
            words = caption.text.split()
            assert len(words) <= LONGEST_TEXT
            said.update(words)
    assert said == set(vocabulary())


@given(seeds)
def test_a_scene_has_two_to_five_objects_each_in_its_own_cell(seed):
    scene, _ = sampled(seed)
    assert 2 <= len(scene.objects) <= 5
    assert len({(item.row, item.column) for item in scene.objects}) == len(scene.objects)
    for item in scene.objects:
        assert all(value in VALUES[name] for name, value in vars(item).items())


def test_the_seed_decides():
    assert sampled(7) == sampled(7)
    assert sampled(7)[0] != sampled(8)[0]


@settings(max_examples=200)
@given(seeds, st.sampled_from([None, 1, 2, 5]))
def test_five_captions_are_true_and_differ_and_name_different_parts(seed, count):
    scene, captions = sampled(seed, count)
    assert len({caption.text for caption in captions}) == 5
    parts = {frozenset(caption.mentioned) for caption in captions}
    assert len(parts) >= {1: 1, 2: 3, 3: 3}.get(len(scene.objects), 5)
    for caption in captions:
        assert caption_is_true(caption.facts, scene)


def test_no_caption_is_repeated_however_many_are_asked_for():
    rng = np.random.default_rng(0)
    captions = sample_captions(sample_scene(rng, 1), rng, 300)
    assert len({caption.text for caption in captions}) == 300


@settings(max_examples=200)
@given(seeds)
def test_the_facts_are_what_the_words_say(seed):
    scene, captions = sampled(seed)
    for caption in captions:
        assert len(caption.text.split()) == len(caption.word_objects)
        assert set(caption.word_objects) - {None} == set(caption.mentioned)
        for index, mention in zip(caption.mentioned, caption.facts["mentions"], strict=True):
            pairs = zip(caption.text.split(), caption.word_objects, strict=True)
            words = [word for word, of in pairs if of == index]
            for name, table in (("shape", SHAPES), ("colour", COLOURS)):
                said = {value for value, names in table.items() for w in words if w in names}
                assert said == {mention[name]} if name in mention else not said
            assert mention.items() <= vars(scene.objects[index]).items()


@given(seeds, seeds)
def test_a_caption_is_false_of_a_scene_that_lacks_a_colour_it_states(seed, choice):
    scene, captions = sampled(seed)
    caption = captions[choice % 5]
    stated = [mention["colour"] for mention in caption.facts["mentions"] if "colour" in mention]
    if not stated:
        return
    other = next(colour for colour in COLOURS if colour not in stated)
    recoloured = tuple(
        replace(item, colour=other) if item.colour == stated[0] else item for item in scene.objects
    )
    assert not caption_is_true(caption.facts, Scene(recoloured))


@pytest.mark.parametrize(
    ("mentions", "relations", "true"),
    [
        ([{"colour": "red"}], [], True),
        ([{"colour": "red", "shape": "square"}], [], False),
        ([{"colour": "red"}, {"shape": "circle"}], [], False),  # one object cannot be both
        ([{"colour": "red"}, {}], [], True),
        ([{}, {}, {}], [], False),
        ([{"row": "top"}, {"column": "right"}], [[0, "left of", 1]], True),
        ([{"colour": "blue"}, {"colour": "red"}], [[0, "left of", 1]], False),
        ([{"colour": "blue"}, {"colour": "red"}], [[0, "below", 1]], True),
        ([{"size": "large"}, {"texture": "plain"}], [[1, "above", 0]], True),
    ],
)
def test_truth_by_hand(mentions, relations, true):
    assert caption_is_true({"mentions": mentions, "relations": relations}, SCENE) is true


def test_objects_of_one_row_lie_neither_above_nor_below():
    beside = replace(BLUE_SQUARE, row="top")
    assert relation_holds(RED_CIRCLE, "left of", beside)
    assert relation_holds(beside, "right of", RED_CIRCLE)
    assert not relation_holds(RED_CIRCLE, "above", beside)
    assert not relation_holds(RED_CIRCLE, "below", beside)


@settings(max_examples=200)
@given(seeds)
def test_a_foil_is_false_and_differs_by_two_colours_that_changed_places(seed):
    scene, captions = sampled(seed)
    for caption in captions:
        foil = swap_colours(caption, scene)
        if foil is None:
            continue
        assert not caption_is_true(foil.facts, scene)
        words, swapped = caption.text.split(), foil.text.split()
        changed = [i for i in range(len(words)) if words[i] != swapped[i]]
        assert len(changed) == 2
        assert Counter(words) == Counter(swapped)
        assert {words[i] for i in changed} <= {word for table in COLOURS.values() for word in table}
        colours = [mention["colour"] for mention in caption.facts["mentions"][:2]]
        assert [mention["colour"] for mention in foil.facts["mentions"][:2]] == colours[::-1]
        assert foil.facts["mentions"][2:] == caption.facts["mentions"][2:]
        assert (foil.word_objects, foil.mentioned) == (caption.word_objects, caption.mentioned)


@settings(max_examples=200)
@given(seeds)
def test_twins_hold_the_same_things_in_the_same_places_and_differ_in_what_belongs_to_what(seed):
    first, second = sample_twins(np.random.default_rng(seed))
    changed = []
    for name in ATTRIBUTES:
        values = [[getattr(item, name) for item in scene.objects] for scene in (first, second)]
        assert Counter(values[0]) == Counter(values[1])
        if values[0] != values[1]:
            changed.append((name, sum(a != b for a, b in zip(*values, strict=True))))
    assert len(changed) == 1
    name, count = changed[0]
    assert (name in ("colour", "shape", "texture"), count) == (True, 2)


def test_articles_follow_the_words_after_them():
    assert mend_articles("an red ring and a orange arrow left of the an") == (
        "a red ring and an orange arrow left of the an"
    )


@given(seeds)
def test_what_is_said_of_a_scene_has_its_articles_right(seed):
    _, captions = sampled(seed)
    assert all(mend_articles(caption.text) == caption.text for caption in captions)


def test_most_captions_have_a_foil():
    scenes = [sampled(seed) for seed in range(100)]
    foils = [swap_colours(c, scene) is not None for scene, captions in scenes for c in captions]
    assert 0.6 < np.mean(foils) < 1


def test_no_foil_where_it_would_be_true_or_the_same_or_unsaid():
    facts = {"mentions": [{"colour": "red"}, {"colour": "blue"}], "relations": []}
    words = "a red thing and a blue thing"
    caption = SpokenText(words, facts, (0, 0, 0, None, 1, 1, 1), (0, 1))
    assert swap_colours(caption, SCENE) is None  # "a blue thing and a red thing"
    red = replace(caption, facts={"mentions": [{"colour": "red"}] * 2, "relations": []})
    assert swap_colours(red, SCENE) is None
    unsaid = replace(caption, facts={"mentions": [{"colour": "red"}, {}], "relations": []})
    assert swap_colours(unsaid, SCENE) is None
