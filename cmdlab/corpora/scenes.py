"""Scenes of SpokenScenes and the captions that speak of them.

A scene is a set of objects on a 3 × 3 grid. A caption is an English sentence with the facts it
states: what objects there are, where they stand, and how two of them lie to each other. Every
caption is true of its scene; whether it is true of another one is decided by `caption_is_true`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import Any

import numpy as np

# Each attribute value with the words that may name it; the first is the plain one.
SHAPES = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "pyramid"),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
    "moon": ("moon", "crescent"),
    "arrow": ("arrow", "pointer"),
    "hexagon": ("hexagon",),
    "drop": ("drop", "tear"),
}
COLOURS = {
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "brown": ("brown", "chestnut"),
    "white": ("white", "snowy"),
}
SIZES = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium",),
    "large": ("large", "big", "huge"),
}
TEXTURES = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "chequered"),
}
TEXTURES_AFTER_THE_NOUN = {
    "striped": ("with stripes", "with bands"),
    "dotted": ("with dots", "with spots"),
    "checked": ("with checks", "with little squares"),
}
ANY_SHAPE = ("thing", "shape", "object")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
# Words for a place; None leaves the row or the column open.
PLACES: dict[tuple[str | None, str | None], tuple[str, ...]] = {
    ("top", None): ("at the top", "along the upper edge", "up high"),
    ("bottom", None): ("at the bottom", "along the lower edge", "down low"),
    (None, "left"): ("on the left", "at the left hand side"),
    (None, "right"): ("on the right", "at the right hand side"),
    ("middle", "centre"): ("in the centre", "in the very middle"),
    ("top", "left"): ("in the top left corner", "in the upper left"),
    ("top", "right"): ("in the top right corner", "in the upper right"),
    ("bottom", "left"): ("in the bottom left corner", "in the lower left"),
    ("bottom", "right"): ("in the bottom right corner", "in the lower right"),
    ("top", "centre"): ("in the middle of the top row", "top centre"),
    ("bottom", "centre"): ("in the middle of the bottom row", "bottom centre"),
    ("middle", "left"): ("halfway down the left side", "middle left"),
    ("middle", "right"): ("halfway down the right side", "middle right"),
}
RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "lower than"),
}
OPENINGS = (
    "there is",
    "we see",
    "i can see",
    "this picture shows",
    "look at",
    "the image has",
    "here is",
    "somebody drew",
)
VERBS_OF_A_SENTENCE = ("is", "sits", "lies", "stands", "stays")
VERBS_AFTER_AN_OPENING = ("", "", "that is", "placed")
JOINERS = ("and", "and also", "along with", "then")

EXCHANGED = ("colour", "colour", "shape", "texture")  # between twins; colours twice as often
ATTRIBUTES = ("shape", "colour", "size", "texture", "row", "column")
VALUES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "texture": tuple(TEXTURES),
    "row": ROWS,
    "column": COLUMNS,
}


@dataclass(frozen=True)
class SceneObject:
    """One object: its shape, colour, size and texture, and its cell of the 3 × 3 grid."""

    shape: str
    colour: str
    size: str
    texture: str
    row: str
    column: str


@dataclass(frozen=True)
class Scene:
    """Two to five objects, each in a cell of its own."""

    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class SpokenText:
    """A caption's words and what they state.

    `word_objects[i]` is the index of the scene's object that word i of `text.split()` speaks of,
    or None. `facts` is {"mentions": [{attribute: value}], "relations": [[i, relation, j]]}, where
    i and j count mentions; `mentioned[i]` is the index of the object that mention i means.
    """

    text: str
    facts: dict[str, Any]
    word_objects: tuple[int | None, ...]
    mentioned: tuple[int, ...]


Words = list[tuple[str, int | None]]


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A scene of `count` objects (by default 2 to 5), one a cell, attributes independent."""
    if count is None:
        count = int(rng.choice((2, 3, 4, 5), p=(0.1, 0.3, 0.35, 0.25)))
    cells = rng.permutation(9)[:count]
    return Scene(
        tuple(
            SceneObject(
                **{name: _pick(rng, VALUES[name]) for name in ATTRIBUTES[:4]},
                row=ROWS[cell // 3],
                column=COLUMNS[cell % 3],
            )
            for cell in cells
        )
    )


def sample_twins(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Two scenes of the same places, shapes, colours, sizes and textures, that differ in what
    belongs to what: two objects have exchanged their colours, shapes or textures."""
    while True:
        scene = sample_scene(rng)
        pairs = list(combinations(range(len(scene.objects)), 2))
        exchanges = [(pair, name) for pair in pairs for name in EXCHANGED]
        for place in rng.permutation(len(exchanges)):
            (i, j), name = exchanges[place]
            objects = list(scene.objects)
            first, second = getattr(objects[i], name), getattr(objects[j], name)
            objects[i] = replace(objects[i], **{name: second})
            objects[j] = replace(objects[j], **{name: first})
            if first != second:
                return scene, Scene(tuple(objects))


def sample_captions(scene: Scene, rng: np.random.Generator, count: int = 5) -> list[SpokenText]:
    """`count` true captions, each of another choice of objects while there are choices left."""
    indices = range(len(scene.objects))
    pairs: list[tuple[int, ...]] = list(combinations(indices, 2))
    if len(scene.objects) <= 2:  # one pair at most: each object by itself is a part as well
        pairs += [(index,) for index in indices]
    triples: list[tuple[int, ...]] = list(combinations(indices, 3))
    parts = [pairs[i] for i in rng.permutation(len(pairs))]
    if triples and rng.random() < 0.4:
        parts.insert(int(rng.integers(3)), triples[int(rng.integers(len(triples)))])
    captions: list[SpokenText] = []
    texts: set[str] = set()
    while len(captions) < count:
        part = parts[len(captions) % len(parts)]
        caption = _sample_caption(scene, [part[i] for i in rng.permutation(len(part))], rng)
        if caption.text not in texts:
            texts.add(caption.text)
            captions.append(caption)
    return captions


def swap_colours(caption: SpokenText, scene: Scene) -> SpokenText | None:
    """The caption's foil: the colours of its first two mentions exchanged, all else as it was.

    Returns None where no foil exists: a colour not stated, both the same, or the foil true too.
    """
    mentions = [dict(mention) for mention in caption.facts["mentions"]]
    colours = [mention.get("colour") for mention in mentions[:2]]
    if len(colours) < 2 or None in colours or colours[0] == colours[1]:
        return None
    spoken: dict[int, tuple[int, str]] = {}  # mention -> place and word of its colour in the text
    words = caption.text.split()
    for place, (word, of) in enumerate(zip(words, caption.word_objects, strict=True)):
        for mention in (0, 1):
            if of == caption.mentioned[mention] and word in COLOURS[str(colours[mention])]:
                spoken[mention] = (place, word)
    words[spoken[0][0]], words[spoken[1][0]] = spoken[1][1], spoken[0][1]
    mentions[0]["colour"], mentions[1]["colour"] = mentions[1]["colour"], mentions[0]["colour"]
    facts = {"mentions": mentions, "relations": caption.facts["relations"]}
    if caption_is_true(facts, scene):
        return None
    return SpokenText(" ".join(words), facts, caption.word_objects, caption.mentioned)


def mend_articles(text: str) -> str:
    """The text with "a" and "an" as the words after them want it: a foil must not be known by an
    article that was left of the word before."""
    words = text.split()
    for place, following in enumerate(words[1:]):
        if words[place] in ("a", "an"):
            words[place] = _article(following)
    return " ".join(words)


def caption_is_true(facts: dict[str, Any], scene: Scene) -> bool:
    """Whether different objects of the scene can be found for all mentions and relations."""
    return any(
        all(
            getattr(scene.objects[index], name) == value
            for index, mention in zip(chosen, facts["mentions"], strict=True)
            for name, value in mention.items()
        )
        and all(
            relation_holds(scene.objects[chosen[i]], relation, scene.objects[chosen[j]])
            for i, relation, j in facts["relations"]
        )
        for chosen in permutations(range(len(scene.objects)), len(facts["mentions"]))
    )


def relation_holds(first: SceneObject, relation: str, second: SceneObject) -> bool:
    """Whether `first` lies `relation` (a key of RELATIONS) `second`, judged by their cells."""
    rows = ROWS.index(first.row) - ROWS.index(second.row)
    columns = COLUMNS.index(first.column) - COLUMNS.index(second.column)
    return {
        "left of": columns < 0,
        "right of": columns > 0,
        "above": rows < 0,
        "below": rows > 0,
    }[relation]


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted."""
    phrases = [*ANY_SHAPE, *OPENINGS, *VERBS_OF_A_SENTENCE, *VERBS_AFTER_AN_OPENING, *JOINERS]
    phrases += ["a", "an", "the", "coloured"]
    tables: Sequence[Mapping[Any, Sequence[str]]] = (
        SHAPES,
        COLOURS,
        SIZES,
        TEXTURES,
        TEXTURES_AFTER_THE_NOUN,
        PLACES,
        RELATIONS,
    )
    for table in tables:
        phrases += [phrase for phrases_of in table.values() for phrase in phrases_of]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def _sample_caption(scene: Scene, part: list[int], rng: np.random.Generator) -> SpokenText:
    """One caption of the objects `part`: the first two may be related, each may get a place."""
    mentions: list[dict[str, str]] = []
    phrases: list[Words] = []
    for index in part:
        mention, phrase = _sample_mention(scene.objects[index], index, rng, alone=len(part) == 1)
        mentions.append(mention)
        phrases.append(phrase)
    placed = rng.random(len(part)) < (1.0 if len(part) == 1 else 0.4)
    relations: list[list[Any]] = []
    opening = _pick(rng, OPENINGS) if rng.random() < 0.4 else ""
    verbs = VERBS_AFTER_AN_OPENING if opening else VERBS_OF_A_SENTENCE
    words: Words = [(word, None) for word in opening.split()]
    for position, index in enumerate(part):
        item = scene.objects[index]
        true = [
            relation
            for relation in RELATIONS
            if position == 1 and relation_holds(scene.objects[part[0]], relation, item)
        ]
        if position == 1 and true and rng.random() < 0.6:
            relation = _pick(rng, true)
            relations.append([0, relation, 1])
            joint = f"{_pick(rng, verbs)} {_pick(rng, RELATIONS[relation])}"
            words += [(word, None) for word in joint.split()]
        elif position > 0:
            words += [(word, None) for word in _pick(rng, JOINERS).split()]
        words += phrases[position]
        if placed[position]:
            options = [
                place
                for place in PLACES
                if place[0] in (None, item.row) and place[1] in (None, item.column)
            ]
            row, column = options[int(rng.integers(len(options)))]
            if row is not None:
                mentions[position]["row"] = row
            if column is not None:
                mentions[position]["column"] = column
            words += [(word, index) for word in _pick(rng, PLACES[row, column]).split()]
    return SpokenText(
        " ".join(word for word, _ in words),
        {"mentions": mentions, "relations": relations},
        tuple(of for _, of in words),
        tuple(part),
    )


def _sample_mention(
    item: SceneObject, index: int, rng: np.random.Generator, *, alone: bool
) -> tuple[dict[str, str], Words]:
    """A noun phrase for `item` and the attributes it states."""
    says_shape, says_colour, says_size, says_texture = rng.random(4) < (
        (1.0, 1.0, 0.8, 0.9) if alone else (0.97, 0.97, 0.5, 0.75)
    )
    stated = {
        name: getattr(item, name)
        for name, says in (
            ("shape", says_shape),
            ("colour", says_colour or not says_shape),
            ("size", says_size),
            ("texture", says_texture),
        )
        if says
    }
    before: list[str] = []
    after: list[str] = []
    if "size" in stated:
        before.append(_pick(rng, SIZES[item.size]))
    if "texture" in stated:
        if item.texture in TEXTURES_AFTER_THE_NOUN and rng.random() < 0.35:
            after.append(_pick(rng, TEXTURES_AFTER_THE_NOUN[item.texture]))
        else:
            before.append(_pick(rng, TEXTURES[item.texture]))
    if "colour" in stated:
        colour = _pick(rng, COLOURS[item.colour])
        if rng.random() < 0.15:
            after.insert(0, f"coloured {colour}")
        else:
            before.append(colour)
    before = [before[i] for i in rng.permutation(len(before))]
    noun = _pick(rng, SHAPES[item.shape] if says_shape else ANY_SHAPE)
    phrase = " ".join([*before, noun, *after])
    article = _article(phrase)
    if rng.random() < 0.15:
        article = "the"
    return stated, [(word, index) for word in f"{article} {phrase}".split()]


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeio" else "a"  # no word here begins with a sounded "u"


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
