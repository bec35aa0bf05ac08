"""The record that a run leaves, and the listing that a sweep leaves: written, checked, gathered."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmdlab.errors import InputError
from cmdlab.outputs import write_file

SCHEMA = 1


@dataclass(frozen=True)
class Run:
    """One run: its folder, and the content of its record.json."""

    folder: Path
    record: dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """What a report is drawn from.

    `sweeps` are the listings, `missing` the listed cells without a record: dicts with `sweep`,
    `id`, `arm` and `seed`.
    """

    done: tuple[Run, ...]
    failed: tuple[Run, ...]
    missing: tuple[dict[str, Any], ...]
    sweeps: tuple[dict[str, Any], ...]


def load_records(sources: Iterable[Path]) -> Runs:
    """Gather the records of some sweeps or runs, in the listed order, each run of a sweep once.

    A source is a sweep's listing (runs/sweeps/NAME.json), a folder with `sweeps/` in it (every
    listing there), or the folder of one run. A cell can be in two sweeps, so `sweep` and `arm`
    are taken from the listing. Status too is read from the records: a listing can be older.
    Raises InputError for a source without records, or one that does not hold what it should.
    """
    runs: list[Run] = []
    missing, sweeps = [], []
    for source in map(Path, sources):
        if (source / "record.json").exists():
            runs.append(Run(source, read_record(source)))
            continue
        listings = [source] if source.is_file() else sorted((source / "sweeps").glob("*.json"))
        if not listings:
            raise InputError(
                f"{source}: holds neither record.json nor sweeps/*.json; name a run's folder, "
                "a folder of runs or a sweep's listing"
            )
        for path in listings:
            listing = read_listing(path)
            sweeps.append(listing)
            for cell in listing["cells"]:
                place = {"sweep": listing["sweep"], "arm": cell["arm"]}
                folder = path.parent.parent / cell["id"]
                if (folder / "record.json").exists():
                    runs.append(Run(folder, read_record(folder) | place))
                else:
                    missing.append(place | {"id": cell["id"], "seed": cell["seed"]})
    done = tuple(run for run in runs if run.record["status"] == "ok")
    failed = tuple(run for run in runs if run.record["status"] == "failed")
    return Runs(done, failed, tuple(missing), tuple(sweeps))


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `folder`/record.json in one step. Raises InputError for a record that is not valid."""
    _check(record, _record_form(record), folder / "record.json")
    write_json(folder / "record.json", record)


def read_record(folder: Path) -> dict[str, Any]:
    """The checked content of `folder`/record.json. Raises InputError naming file and entry."""
    path = folder / "record.json"
    record = _read_json(path)
    _check(record, _record_form(record), path)
    return record


def read_result(path: Path) -> dict[str, Any]:
    """The checked content of the result.json that a notebook writes. Raises InputError."""
    result = _read_json(path)
    _check(result, _RESULT, path)
    known = [key.removesuffix("?") for key in _RESULT]
    return {key: result[key] for key in known if key in result}


def write_listing(path: Path, listing: dict[str, Any]) -> None:
    """Write what a sweep consists of, in one step."""
    _check(listing, _LISTING, path)
    write_json(path, listing)


def read_listing(path: Path) -> dict[str, Any]:
    """The checked content of a sweep's listing. Raises InputError naming file and entry."""
    listing = _read_json(path)
    _check(listing, _LISTING, path)
    return listing


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1)
    # A path's bytes that are no UTF-8 are lone surrogates, which JSON can only escape.
    write_file(path, f"{text}\n".encode(errors="backslashreplace"))


def _read_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is not readable JSON ({error})") from error


# A form is a type (float means any finite number), a dict of forms by key (further keys are
# allowed, and one that ends with ? may be missing, as it is in older records), a list of the one
# form of every item, a set of the allowed values, a pattern, or a pair (form, None) where null is
# allowed.
_ID = re.compile("[0-9a-f]{16}")
_RECALLS = {"R@1": float, "R@5": float, "R@10": float}
_BOTH_RECALLS = {"speech_to_image": _RECALLS, "image_to_speech": _RECALLS}
_DIRECTION = _RECALLS | {
    "optimistic_R@1": float,
    "median_rank": float,
    "MRR": float,
    "queries": int,
    "gallery": int,
}
_FOIL = {"wins": int, "ties": int, "pairs": int}
_METRICS = {"speech_to_image": _DIRECTION, "image_to_speech": _DIRECTION, "mean_R@1": float}
_ASKED = {"R@1": float, "captions": int}
_RESULT: dict[str, Any] = {
    "metrics": {"validation": _METRICS, "test": _METRICS},
    "ceiling": (_BOTH_RECALLS, None),
    "text_ceiling": (_BOTH_RECALLS | {"mean_R@1": float, "foil?": (_FOIL, None)}, None),
    "learning_curve": [
        {
            "step": int,
            "loss": float,
            "contrastive": float,
            "denoising": (float, None),
            "temperature": (float, None),
            "validation_mean_R@1": (float, None),
            "gradient_cosine?": (float, None),
        }
    ],
    "new_words?": ({"new": _ASKED, "known": _ASKED}, None),
    "restoration?": ({"own": float, "other": float}, None),
    "cost": {
        "trainable_parameters": int,
        "denoiser_parameters": int,
        "inference_parameters": int,
        "inference_flops": (float, None),
        "inference_ms": (float, None),
        "training_seconds": float,
        "training_flops?": float,
        "training_seconds_at?": [{"step": int, "seconds": float}],
        "steps": int,
        "peak_memory_bytes": (float, None),
        "retrieval_flops_per_query?": float,
        "retrieval_ms_per_query?": float,
    },
    "alignment": (
        {
            "pointing": ({"hits": float, "words": int, "chance": float}, None),
            "foil": (_FOIL, None),
        },
        None,
    ),
    "corpus": {"name": str, "content_hash": str, "gallery": int, "captions": int},
    "encoders": {
        "image": {"name": str, "sha256": str},
        "speech": {"name": str, "sha256": str},
    },
    "determinism": {"seed": int, "threads": int, "deterministic_algorithms": bool},
}
_RECORD = {
    "schema": {SCHEMA},
    "status": {"ok", "failed"},
    "id": _ID,
    "sweep": str,
    "arm": str,
    "seed": int,
    "parameters": dict,
    "wall_seconds": float,
    "provenance": {
        "git_sha": (str, None),
        "uncommitted_sha256": (str, None),
        "source_sha256": str,
        "notebook_sha256": str,
        "lock_sha256": (str, None),
        "python": str,
        "torch": (str, None),
        "triton": (str, None),
        "cuda": (str, None),
        "driver": (str, None),
        "cpu": str,
        "gpu": (str, None),
        "cores": int,
        "command": str,
        "started": str,
    },
}
_FAILED = {"error": {"type": str, "message": str, "traceback": str}}
_LISTING = {
    "schema": {SCHEMA},
    "sweep": str,
    "title": str,
    "notebook": str,
    "smoke": bool,
    "baseline": (str, None),
    "axes": dict,
    "cells": [{"id": _ID, "arm": str, "seed": int, "status": {"ok", "failed", "missing"}}],
}


def _record_form(record: Any) -> dict[str, Any]:
    failed = isinstance(record, dict) and record.get("status") == "failed"
    return _RECORD | (_FAILED if failed else _RESULT)


def _check(value: Any, form: Any, path: Path, entry: str = "") -> None:
    """Raise InputError unless `value` has the form; `entry` is its place, as `metrics/test`."""
    match form:
        case (inner, None):
            if value is not None:
                _check(value, inner, path, entry)
            return
        case dict():
            fits, wanted = isinstance(value, dict), "an object"
        case [_]:
            fits, wanted = isinstance(value, list), "a list"
        case set():
            fits = any(type(value) is type(one) and value == one for one in form)
            wanted = " or ".join(map(repr, form))
        case re.Pattern():
            fits = isinstance(value, str) and form.fullmatch(value) is not None
            wanted = f"text of the form {form.pattern}"
        case _ if form is float:
            fits = type(value) in (int, float) and math.isfinite(value)
            wanted = "a finite number"
        case _:
            fits, wanted = type(value) is form, form.__name__
    if not fits:
        raise InputError(f"{path}: {entry or 'the file'} is {repr(value)[:80]}, and not {wanted}")
    if isinstance(form, list):
        for index, item in enumerate(value):
            _check(item, form[0], path, f"{entry}/{index}")
    if isinstance(form, dict):
        for key, inner in form.items():
            key, optional = key.removesuffix("?"), key.endswith("?")
            place = f"{entry}/{key}".lstrip("/")
            if key not in value and optional:
                continue
            if key not in value:
                raise InputError(f"{path}: {place} is missing")
            _check(value[key], inner, path, place)
