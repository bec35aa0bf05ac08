"""How the report writes numbers and parameters."""

import json
from typing import Any

ABSENT = "–"


def number(value: float) -> str:
    return f"{value:,.1f}"


def signed(value: float) -> str:
    """One decimal with its sign; the minus is the typographic one."""
    return f"{value:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(value: float) -> str:
    """Large counts with their magnitude: 1.34 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def value_label(value: Any) -> str:
    """A parameter's value as one would write it in a sweep file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
