"""What users of the page said of its answers: one line of JSON each, in the index's folder."""

import json
import math
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmdlab.errors import InputError
from cmdlab.search.index import Index

LOG = "verdicts.jsonl"
HOW = ("recorded", "file", "typed")


@dataclass(frozen=True)
class Verdict:
    """One query and how far down its picture was.

    how: one of HOW. seconds: of speech. gallery: the pictures in the index. rank: from 1; None
    where the picture was not found. picture: its path in the index where it was pointed at.
    """

    how: str
    seconds: float
    gallery: int
    rank: int | None
    picture: str | None = None


def log_verdict(folder: Path, verdict: Verdict) -> None:
    """Add a line to the log. One write, so that two pages at once do not mix their lines."""
    line = {"at": datetime.now(UTC).isoformat(timespec="seconds")} | asdict(verdict)
    log = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        os.write(log, (json.dumps(line) + "\n").encode())
    finally:
        os.close(log)


def read_verdicts(folder: Path) -> list[Verdict]:
    """The log's lines. Raises InputError that names file and line."""
    file = folder / LOG
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(
            f"{file}: nothing was said on the page yet; run `cmdlab serve`, or give --queries"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); mend it or give --queries") from error
    return [_verdict(f"{file}: line {number}", line) for number, line in enumerate(lines, 1)]


def rank_of(index: Index, vector: NDArray[np.float32], row: int) -> int:
    """The place of a picture in the answer to a vector [D], from 1; those that score the same come
    before it."""
    scores, rows = index.gallery.nearest(vector, len(index), impl="reference")
    return int((scores >= scores[rows == row]).sum())


def _verdict(place: str, line: str) -> Verdict:
    try:
        value: Any = json.loads(line)
        del value["at"]
        verdict = Verdict(**value)
        sound = (
            verdict.how in HOW
            and isinstance(verdict.picture, str | None)
            and isinstance(verdict.seconds, float | int)
            and math.isfinite(verdict.seconds)
            and verdict.seconds >= 0
            and type(verdict.gallery) is int
            and (verdict.rank is None or type(verdict.rank) is int)
            and 1 <= (1 if verdict.rank is None else verdict.rank) <= verdict.gallery
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{place}: is no line of the page's log; remove it") from error
    if not sound:
        raise InputError(f"{place}: holds values that the page does not write; remove it")
    return verdict
