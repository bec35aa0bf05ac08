"""A study as its records tell it: arms, seeds, axes, and the comparisons drawn from their ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cmdlab import records
from cmdlab.errors import InputError
from cmdlab.evaluation import (
    Comparison,
    Interval,
    RankTable,
    Voices,
    compare,
    holm,
    interval,
    retrieval_metrics,
)

HEADLINE = "mean_R@1"
BASELINE = "contrastive"  # where no sweep names one
NOT_AN_AXIS = {"seed", "smoke", "run_folder"}
DATA = ("corpus", "test_corpus", "images", "snr_db", "without_words")  # parameters, not a method's


@dataclass(frozen=True)
class Run:
    """One finished cell: its folder, its record, and the rank of every test query.

    `voices` is None for records of before voices were kept.
    """

    folder: Path
    record: dict[str, Any]
    ranks: RankTable
    voices: Voices | None = None

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def arm(self) -> str:
        return str(self.record["arm"])

    @property
    def seed(self) -> int:
        return int(self.record["seed"])


@dataclass(frozen=True)
class LostCell:
    """A cell that gave no result: `status` is failed or missing, `reason` says why."""

    id: str
    arm: str
    seed: int
    status: str
    reason: str


@dataclass(frozen=True)
class ArmComparison:
    """An arm against the baseline on one metric; `result` is None where `reason` says why not.

    `adjusted_p` is Holm's over the arms of the same family (planned, or the others).
    """

    arm: str
    planned: bool
    seeds: tuple[int, ...]
    result: Comparison | None = None
    adjusted_p: float = 1.0
    reason: str = ""

    @property
    def separated(self) -> bool:
        return self.result is not None and self.adjusted_p < 0.05


@dataclass(frozen=True)
class Study:
    """Finished runs and lost cells of one sweep, the baseline first among the arms.

    `ceilings` are arms that no method can be, as perfect hearing: shown last, compared with none.
    `pairs` are comparisons of two arms beside those with the baseline, by family.
    """

    title: str
    baseline: str
    arms: tuple[str, ...]
    runs: tuple[Run, ...]
    lost: tuple[LostCell, ...]
    planned: frozenset[str]
    axis_base: str | None
    axis_names: tuple[str, ...]
    chosen_arms: frozenset[str]
    ceilings: frozenset[str]
    pairs: dict[str, list[tuple[str, str]]]

    def of(self, arm: str) -> list[Run]:
        """The finished runs of an arm, in the order of their seeds."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    @cached_property
    def finished_arms(self) -> list[str]:
        return [arm for arm in self.arms if self.of(arm)]

    @cached_property
    def compared_arms(self) -> list[str]:
        """The finished arms that stand against the baseline: not the ceilings, nor an arm of other
        data for which the sweep asks for a pair of its own."""
        paired = {arm for pairs in self.pairs.values() for pair in pairs for arm in pair}
        data = {
            arm: [parameters.get(name) for name in DATA]
            for arm, parameters in self.parameters.items()
        }
        return [
            arm
            for arm in self.finished_arms
            if arm not in {self.baseline, *self.ceilings}
            and not (arm in paired and data[arm] != data.get(self.baseline))
        ]

    def rival(self, arm: str) -> str | None:
        """What an arm stands against: the baseline, or the second arm of its own pair."""
        if arm in self.compared_arms:
            return self.baseline
        pairs = [pair for family in self.pairs.values() for pair in family]
        own = {first: second for first, second in pairs if first != self.baseline}
        return own.get(arm)

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def interval(self, arm: str, metric: str = HEADLINE) -> Interval:
        """Mean and 95 % interval over seeds and images of the test gallery."""
        if (arm, metric) not in self._intervals:
            self._intervals[arm, metric] = interval([run.ranks for run in self.of(arm)], metric)
        return self._intervals[arm, metric]

    @cached_property
    def _intervals(self) -> dict[tuple[str, str], Interval]:
        return {}

    def validation(self, arm: str) -> float:
        """Mean R@1 on the validation set, averaged over the seeds."""
        values = [run.record["metrics"]["validation"]["mean_R@1"] for run in self.of(arm)]
        return float(np.mean(values))

    @cached_property
    def best_on_validation(self) -> str | None:
        """The arm, other than the baseline, with the highest mean R@1 on the validation set."""
        return max(self.compared_arms, key=self.validation, default=None)

    @cached_property
    def parameters(self) -> dict[str, dict[str, Any]]:
        return {
            arm: {
                name: value
                for name, value in self.of(arm)[0].record["parameters"].items()
                if name not in NOT_AN_AXIS
            }
            for arm in self.finished_arms
        }

    @cached_property
    def axes(self) -> dict[str, list[tuple[Any, str]]]:
        """Parameter → (value, arm) for the arms that differ from the base arm in it alone."""
        base = self.axis_base
        if base not in self.parameters:
            return {}
        axes: dict[str, list[tuple[Any, str]]] = {}
        for arm, parameters in self.parameters.items():
            own = self.parameters[base]
            names = sorted(parameters.keys() | own.keys())
            changed = [name for name in names if parameters.get(name) != own.get(name)]
            if len(changed) == 1:
                name = changed[0]
                axes.setdefault(name, [(own.get(name), base)]).append((parameters.get(name), arm))
        for points in axes.values():
            if all(isinstance(value, int | float) for value, _ in points):
                points.sort(key=lambda point: point[0])
        named = {name: place for place, name in enumerate(self.axis_names)}
        return dict(sorted(axes.items(), key=lambda axis: named.get(axis[0], len(named))))

    def comparisons(self, metric: str = HEADLINE) -> list[ArmComparison]:
        """Every arm of `compared_arms` against the baseline: same seeds, same queries."""
        found = [self._compare(arm, metric) for arm in self.compared_arms]
        adjusted: dict[str, float] = {}
        for planned in (True, False):
            family = [one for one in found if one.planned == planned and one.result is not None]
            p_values = [one.result.p_value for one in family if one.result is not None]
            names = [one.arm for one in family]
            adjusted |= dict(zip(names, holm(p_values) if p_values else [], strict=True))
        return [replace(one, adjusted_p=adjusted.get(one.arm, 1.0)) for one in found]

    def _compare(self, arm: str, metric: str) -> ArmComparison:
        planned = arm in self.planned
        pairs = self.paired(arm, self.baseline)
        seeds = tuple(own.seed for own, _ in pairs)
        if reason := incomparable(pairs):
            return ArmComparison(arm, planned, seeds, reason=reason)
        result = compare([own.ranks for own, _ in pairs], [of.ranks for _, of in pairs], metric)
        return ArmComparison(arm, planned, seeds, result)

    def paired(self, arm: str, other: str) -> list[tuple[Run, Run]]:
        """The runs of both arms at the seeds that both have, in the order of their seeds."""
        others = {run.seed: run for run in self.of(other)}
        return [(run, others[run.seed]) for run in self.of(arm) if run.seed in others]


def incomparable(pairs: Sequence[tuple[Run, Run]]) -> str:
    """Why runs in pairs are not to be compared; empty where they are."""
    if not pairs:
        return "no seed in common with the other arm"
    runs = [run for pair in pairs for run in pair]
    corpora = {run.record["corpus"]["content_hash"] for run in runs}
    queries = runs[0].ranks.speech_image
    if len(corpora) > 1 or not all(np.array_equal(queries, r.ranks.speech_image) for r in runs):
        return "other test queries than the other arm"
    return ""


def read_study(sources: Sequence[Path], *, title: str | None = None) -> Study:
    """The study in `sources`: sweep listings, folders of runs, or run folders, as `load_records`.

    The first listing gives title, baseline and axes, and may hold `planned`, `ceilings` and
    `chosen_on_validation`, lists of arms, and `pairs`, lists of two arms by family. Without
    `planned` every comparison is a planned one.
    Raises InputError where the baseline has no finished run, ranks contradict their record, or two
    different runs stand for one arm and seed.
    """
    found = records.load_records(sources)
    listing = found.sweeps[0] if found.sweeps else {}
    baseline = str(listing.get("baseline") or BASELINE)
    runs: dict[str, Run] = {}
    for run in found.done:
        if run.record["id"] not in runs:  # a cell of two sweeps bears the arm of the first
            runs[run.record["id"]] = _run(run)
    lost = {
        run.record["id"]: LostCell(
            run.record["id"],
            run.record["arm"],
            run.record["seed"],
            "failed",
            f"{run.record['error']['type']}: {run.record['error']['message']}",
        )
        for run in found.failed
    } | {
        cell["id"]: LostCell(cell["id"], cell["arm"], cell["seed"], "missing", "no record")
        for cell in found.missing
    }
    places: dict[tuple[str, int], str] = {}
    cells: list[Run | LostCell] = [*runs.values(), *lost.values()]
    for one in cells:
        other = places.setdefault((one.arm, one.seed), one.id)
        if other != one.id:
            raise InputError(
                f"{one.id}: {one.arm}, seed {one.seed}, is also the place of {other}; "
                "report one sweep at a time"
            )
    if not any(run.arm == baseline for run in runs.values()):
        raise InputError(
            f"{', '.join(map(str, sources))}: no finished run of the baseline, {baseline}; run its "
            "cells, or name another arm as the sweep's baseline"
        )
    listed = [str(cell["arm"]) for sweep in found.sweeps for cell in sweep["cells"]]
    ceilings = frozenset(map(str, listing.get("ceilings") or []))
    arms = dict.fromkeys([baseline, *listed, *(arm for arm, _ in places)])
    return Study(
        title=title or listing.get("title") or "Ablation report",
        baseline=baseline,
        arms=tuple(sorted(arms, key=lambda arm: arm in ceilings)),
        runs=tuple(runs.values()),
        lost=tuple(lost.values()),
        planned=frozenset(map(str, listing.get("planned", arms))),
        axis_base=_axis_base(listing.get("axes") or {}),
        axis_names=tuple(listing.get("axes") or ()),
        chosen_arms=frozenset(map(str, listing.get("chosen_on_validation") or [])),
        ceilings=ceilings,
        pairs={
            str(family): [(str(arm), str(other)) for arm, other in asked]
            for family, asked in (listing.get("pairs") or {}).items()
        },
    )


def _axis_base(axes: dict[str, list[dict[str, Any]]]) -> str | None:
    """The arm that every axis starts from; the other arms of an axis bear its name and value."""
    for name, points in axes.items():
        for point in points:
            if not str(point["arm"]).endswith(f", {name}={point['value']}"):
                return str(point["arm"])
    return None


def _run(run: records.Run) -> Run:
    ranks = RankTable.load(run.folder / "ranks.npz")
    recorded = run.record["metrics"]["test"]["mean_R@1"]
    counted = retrieval_metrics(ranks)["mean_R@1"]
    if not math.isclose(recorded, counted, abs_tol=1e-3):
        raise InputError(
            f"{run.folder / 'record.json'}: metrics/test/mean_R@1 is {recorded}, but ranks.npz "
            f"gives {counted:.4f}; run the cell again"
        )
    return Run(run.folder, run.record, ranks, _voices(run.folder, len(ranks.speech_image)))


def _voices(folder: Path, captions: int) -> Voices | None:
    path = folder / "voices.npz"
    if not path.exists():
        return None
    voices = Voices.load(path)
    if len(voices.of_caption) != captions:
        raise InputError(
            f"{path}: of_caption has {len(voices.of_caption)} captions, but ranks.npz {captions}; "
            "run the cell again"
        )
    return voices


def wilson(hits: float, trials: float) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927), as fractions; `trials` must be positive."""
    z = 1.959963984540054
    centre = (hits + z * z / 2) / (trials + z * z)
    spread = z / (trials + z * z) * math.sqrt(hits * (trials - hits) / trials + z * z / 4)
    return max(0.0, centre - spread), min(1.0, centre + spread)
