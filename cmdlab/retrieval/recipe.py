"""A recipe's parameters: what `cmdlab train --help` and the notebook's cell say of each, once."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from cmdlab.errors import InputError


@dataclass(frozen=True)
class Parameter:
    """A field of a recipe: its default, what it is in a few words, and its choices, if any."""

    name: str
    default: Any
    text: str
    choices: tuple[str, ...]

    @property
    def line(self) -> str:
        return f"{self.text}: {', '.join(self.choices)}" if self.choices else self.text


def parameter(default: Any, text: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with what is told of it; `check_choices` holds it to its choices."""
    return field(default=default, metadata={"text": text, "choices": choices})


def parameters_of(recipes: Iterable[Any]) -> list[Parameter]:
    """The parameters of some dataclasses, in their order; other fields are left out."""
    return [
        Parameter(one.name, one.default, **one.metadata)
        for recipe in recipes
        for one in fields(recipe)
        if one.metadata
    ]


def check_choices(recipe: Any) -> None:
    """Raise InputError where a field holds none of its choices."""
    for one in fields(recipe):
        value, choices = getattr(recipe, one.name), one.metadata.get("choices")
        if choices and value not in choices:
            raise InputError(f"{one.name}: {value!r} is none of {', '.join(choices)}")
