"""Captions in which two objects have exchanged what belongs to each: false, of the same words.

A system that knows which words were said, and not what they belong to, cannot tell them from the
true ones (Yuksekgonul et al. 2023).
"""

from cmdlab.corpora.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SpokenText,
    caption_is_true,
)

EXCHANGED = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}


def exchange(caption: SpokenText, scene: Scene, attribute: str) -> str | None:
    """The caption's text with one attribute of its first two mentions exchanged; articles follow.

    attribute: a key of EXCHANGED. Returns None where there is no such text: the attribute is not
    stated of both, or not by a word of its own, or the same, or the exchanged text is true too.
    """
    mentions = [dict(mention) for mention in caption.facts["mentions"]]
    values = [mention.get(attribute) for mention in mentions[:2]]
    if len(values) < 2 or None in values or values[0] == values[1]:
        return None
    words = caption.text.split()
    places = []
    for mention, value in zip(caption.mentioned[:2], values, strict=True):
        said = [
            place
            for place, (word, of) in enumerate(zip(words, caption.word_objects, strict=True))
            if of == mention and word in EXCHANGED[attribute][str(value)]
        ]
        if not said:
            return None
        places.append(said[0])
    first, second = places
    words[first], words[second] = words[second], words[first]
    mentions[0][attribute], mentions[1][attribute] = mentions[1][attribute], mentions[0][attribute]
    facts = {"mentions": mentions, "relations": caption.facts["relations"]}
    if caption_is_true(facts, scene):
        return None
    for place, word in enumerate(words[:-1]):
        if word in ("a", "an"):  # a foil must not be known by its article
            words[place] = "an" if words[place + 1][0] in "aeio" else "a"
    return " ".join(words)
