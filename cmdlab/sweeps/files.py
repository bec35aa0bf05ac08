"""A sweep file becomes cells: its arms and axes at each seed, checked against the notebook."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cmdlab.errors import InputError, check_seed
from cmdlab.records import SCHEMA, source_sha256
from cmdlab.sweeps.notebooks import Notebook, read_notebook

KEYS = (
    *("notebook", "title", "baseline", "planned", "ceilings", "pairs"),
    *("fixed", "seeds", "arms", "axes", "grid"),
)
OWN_PARAMETERS = ("seed", "smoke", "run_folder")  # the sweep itself sets them


@dataclass(frozen=True)
class Cell:
    """One arm at one seed. `id` is the hash of all that can change its result."""

    id: str
    sweep: str
    arm: str
    seed: int
    parameters: dict[str, Any]
    notebook: Path
    notebook_sha256: str
    source_sha256: str


def read_sweep(
    file: Path, *, smoke: bool = False, overrides: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[Cell]]:
    """A sweep file's listing, every cell "missing", and its cells, seed by seed.

    Seed by seed means that an interrupted sweep has whole seeds to compare.
    Raises InputError, which names file and entry, for anything that cannot be run.
    """
    plan = _read_plan(file)
    notebook = _find_notebook(file, plan["notebook"])
    for name in OWN_PARAMETERS:
        if name not in notebook.parameters:
            raise InputError(
                f"{notebook.path}: its parameters cell lacks {name!r}, which a sweep sets; add it"
            )
    arms, axes = _arms(file, plan, notebook, dict(overrides or {}))
    baseline = plan.get("baseline")
    if baseline is not None and baseline not in arms:
        raise InputError(f"{file}: baseline {baseline!r} is no arm; the arms are {', '.join(arms)}")
    planned, ceilings = plan.get("planned", list(arms)), plan.get("ceilings", [])
    for key, value in (("planned", planned), ("ceilings", ceilings)):
        if not isinstance(value, list) or not set(map(repr, value)) <= set(map(repr, arms)):
            raise InputError(f"{file}: {key} is {value!r}; give a list of arms")
    if baseline in ceilings:
        raise InputError(f"{file}: ceilings: {baseline!r} is the baseline; take another arm")
    pairs = _pairs(file, plan, arms)
    name = file.stem + ("-smoke" if smoke else "")
    seeds = plan["seeds"][:1] if smoke else plan["seeds"]
    source = source_sha256()
    hashes: dict[tuple[Any, bool], str | None] = {}

    def corpus_hash(point: Mapping[str, Any], name: str) -> str | None:
        at = point.get(name), point.get("skip_bad", False)
        if at not in hashes:
            hashes[at] = _corpus_hash(file, *at)
        return hashes[at]

    cells = []
    for seed, (arm, point) in itertools.product(seeds, arms.items()):
        parameters = point | {"seed": seed, "smoke": smoke}
        identity = {
            "parameters": parameters,
            "notebook": notebook.sha256,
            "source": source,
            "corpus": corpus_hash(point, "corpus"),
            "test_corpus": corpus_hash(point, "test_corpus") if point.get("test_corpus") else None,
            "weights": _weights_hashes(file, point),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        cells.append(
            Cell(digest[:16], name, arm, seed, parameters, notebook.path, notebook.sha256, source)
        )
    listing = {
        "schema": SCHEMA,
        "sweep": name,
        "title": plan.get("title", name),
        "notebook": notebook.path.name,
        "smoke": smoke,
        "baseline": baseline,
        "planned": planned,
        "ceilings": ceilings,
        "pairs": pairs,
        "axes": axes,
        "cells": [
            {"id": cell.id, "arm": cell.arm, "seed": cell.seed, "status": "missing"}
            for cell in cells
        ],
    }
    return listing, cells


def _read_plan(file: Path) -> dict[str, Any]:
    try:
        plan = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such sweep file; mend the path") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{file}: is not readable YAML ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(plan, dict):
        raise InputError(f"{file}: is not a mapping; it may have the keys {', '.join(KEYS)}")
    for key in plan:
        if key not in KEYS:
            raise InputError(f"{file}: key {key!r} is unknown; the keys are {', '.join(KEYS)}")
    for key, kind in {"notebook": str, "title": str, "baseline": str}.items():
        if key in plan and not isinstance(plan[key], kind):
            raise InputError(f"{file}: {key} is {plan[key]!r}; give it as text")
    for key in ("fixed", "arms", "axes", "grid", "pairs"):
        if not isinstance(plan.get(key, {}), dict):
            raise InputError(f"{file}: {key} is {plan[key]!r}; give it as a mapping")
    if "notebook" not in plan:
        raise InputError(f"{file}: notebook is missing; name the notebook that a cell runs")
    seeds = plan.get("seeds")
    if not isinstance(seeds, list) or not seeds or len(set(map(repr, seeds))) != len(seeds):
        raise InputError(f"{file}: seeds is {seeds!r}; give a list of different whole numbers")
    if any(type(seed) is not int for seed in seeds):
        raise InputError(f"{file}: seeds is {seeds!r}; give whole numbers")
    for seed in seeds:
        try:
            check_seed(seed)
        except InputError as error:
            raise InputError(f"{file}: seeds: {error}") from error
    if not plan.get("arms") and not plan.get("grid"):
        raise InputError(f"{file}: has no arms; give 'arms' or 'grid'")
    return plan


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error and not the last one's."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key!r} is given twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def _find_notebook(file: Path, name: str) -> Notebook:
    """The notebook of this name beside the sweep file, or one folder up."""
    for folder in (file.absolute().parent, file.absolute().parent.parent):
        if (folder / name).is_file():
            return read_notebook(folder / name)
    raise InputError(f"{file}: notebook {name!r} is neither beside this file nor one folder up")


def _arms(
    file: Path, plan: dict[str, Any], notebook: Notebook, overrides: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Each arm's full parameters by its name, and for each axis its values with their arms."""
    arms: dict[str, dict[str, Any]] = {}

    def add(arm: str, values: dict[str, Any], entry: str) -> None:
        point = plan.get("fixed", {}) | values | overrides
        for name in OWN_PARAMETERS:
            if name in point:
                raise InputError(f"{file}: {entry}: {name!r} is set by the sweep; leave it out")
        point = notebook.fill(point, where=f"{file}: {entry}")
        point = {name: value for name, value in point.items() if name not in OWN_PARAMETERS}
        same = next((other for other, known in arms.items() if known == point), None)
        if same is not None or arm in arms:
            raise InputError(
                f"{file}: {entry}: arm {arm!r} is the same as {same or arm!r}; leave one out"
            )
        arms[arm] = point

    for arm, values in plan.get("arms", {}).items():
        if not isinstance(arm, str) or not isinstance(values or {}, dict):
            raise InputError(f"{file}: arms: {arm!r} is not a name with a mapping of parameters")
        add(arm, values or {}, f"arms: {arm}")
    grid = _lists(file, plan, "grid")
    for values in itertools.product(*grid.values()) if grid else ():
        point = dict(zip(grid, values, strict=True))
        add(", ".join(f"{name}={value}" for name, value in point.items()), point, "grid")
    axes: dict[str, Any] = {}
    if plan.get("axes"):
        base = plan["axes"].get("base")
        if base not in plan.get("arms", {}):
            raise InputError(f"{file}: axes: base is {base!r}; name one of the arms")
        for name, values in _lists(file, plan, "axes").items():
            entry = f"axes: {name}"
            if name in OWN_PARAMETERS:
                raise InputError(f"{file}: {entry}: is set by the sweep; leave it out")
            filled = [notebook.fill({name: v}, where=f"{file}: {entry}")[name] for v in values]
            own = arms[base][name]
            axes[name] = [] if own in filled else [{"value": own, "arm": base}]
            for value in filled:
                arm = base if value == own else f"{base}, {name}={value}"
                if arm != base:
                    add(arm, (plan["arms"][base] or {}) | {name: value}, entry)
                axes[name].append({"value": value, "arm": arm})
    return arms, axes


def _pairs(file: Path, plan: dict[str, Any], arms: Mapping[str, Any]) -> dict[str, Any]:
    """The comparisons of two arms that are asked for beside those with the baseline, by family."""
    pairs: dict[str, Any] = plan.get("pairs", {})
    for family, asked in pairs.items():
        for pair in asked if isinstance(asked, list) else [asked]:
            if not isinstance(pair, list) or len(set(map(repr, pair))) != 2 or len(pair) != 2:
                raise InputError(
                    f"{file}: pairs: {family} holds {pair!r}; give a list of [arm, other arm]"
                )
            if unknown := [arm for arm in pair if arm not in arms]:
                raise InputError(
                    f"{file}: pairs: {family}: {unknown[0]!r} is no arm; the arms are "
                    f"{', '.join(arms)}"
                )
    return pairs


def _lists(file: Path, plan: dict[str, Any], key: str) -> dict[str, list[Any]]:
    lists = {name: values for name, values in plan.get(key, {}).items() if name != "base"}
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{file}: {key}: {name} is {values!r}; give a list of values")
    return lists


def _corpus_hash(file: Path, corpus: Any, skip_bad: bool) -> str | None:
    """The content hash of the corpus that the parameter `corpus` names; None without one."""
    if not isinstance(corpus, str):
        return None
    from cmdlab.corpora import SPLITS, UntrustedFolder, load_corpus, load_usable, read_identity

    if not Path(corpus).is_dir():
        raise InputError(
            f"{file}: corpus {corpus!r} is no folder; make it with `cmdlab corpus make {corpus}`, "
            "or `cmdlab corpus vary` where it is a variant of one"
        )
    if skip_bad:  # what is left depends on every file
        left = [load_usable(Path(corpus), split).content_hash for split in SPLITS]
        return hashlib.sha256("".join(left).encode()).hexdigest()
    if Path(corpus, "corpus.json").exists():
        return read_identity(UntrustedFolder(Path(corpus), skip_bad=False))[1]
    return load_corpus(Path(corpus), "test").content_hash


def _weights_hashes(file: Path, point: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each file or folder that a parameter named as `speech_weights` names."""
    from cmdlab.encoders import weights_sha256

    hashes = {}
    for name, value in point.items():
        if name.endswith("_weights") and isinstance(value, str) and value:
            try:
                hashes[name] = weights_sha256(Path(value))
            except InputError as error:
                raise InputError(f"{file}: {name}: {error}") from error
    return hashes
