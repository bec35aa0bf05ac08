"""The one exception for input that a user must mend, and checks that several rooms share."""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any


class InputError(ValueError):
    """Bad input: its message is one line that names the file, the entry and the remedy.

    The command line prints the message and exits with 2.
    """


def check_types(recipe: Any) -> None:
    """Raise InputError where a dataclass holds a value of another type than the field's.

    A whole number will do where a float is asked for; a bool is no number.
    """
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        wanted = (int, float) if field.type is float else field.type
        if not isinstance(value, wanted) or (isinstance(value, bool) and field.type is not bool):  # type: ignore[arg-type]
            raise InputError(f"{field.name}: {value!r} is no {field.type.__name__}")  # type: ignore[union-attr]


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that is not within 0 to 2**63 - 1, which every generator takes
    and every record holds."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: {seed} is not within 0 to 2**63 - 1; choose another one")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like this one, as a question in a message; empty if none is."""
    alike = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {alike[0]!r}?)" if alike else ""
