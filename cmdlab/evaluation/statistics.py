"""How sure a retrieval result is: intervals, paired comparisons, Holm's correction.

A result varies for two reasons: another random seed trains another model, and another test set
holds other images. The seeds and the images are crossed (every model answers the same queries), so
the model is one of random effects, two ways: result(seed, image) = mean + seed + image + rest. This
is the multi-reader multi-case problem of diagnostic radiology, with seeds for readers and images
for cases, and it is solved as there (Obuchowski and Rockette 1995, Communications in Statistics:
Simulation and Computation 24, 285-308). With S seeds and M images

    variance of the mean over the seeds = V = max(s² / S, r / S) + c

where s² is the sample variance of the S results, c the mean covariance of two seeds' results when
the images are drawn again, not less than 0, and r what the mean variance of one seed's result then
exceeds c by. c is the image's part. s² holds the seed's part and the rest, so unlike a sum of two
separate bootstraps V counts the rest once; and r, which is the rest alone, is the least that s² can
be expected to be, so two or three seeds that agree by luck do not make an interval too narrow (this
last bound is ours). c and r come from a bootstrap of images with all their captions, since the
captions of an image are no independent draws (Davison and Hinkley 1997, Bootstrap Methods and their
Application, 3.8), times M / (M - 1), by which a bootstrap variance is too small.

Three to five seeds are too few for a bootstrap of seeds, whose interval is far too narrow, and for
the normal distribution. So intervals and p-values come from Student's t, with the degrees of
freedom of Satterthwaite (1946, Biometrics Bulletin 2, 110-114),

    V² / ((s² / S)² / (S - 1) + (V - s² / S)² / (M - 1)),

which for many images are those that Hillis (2007, Statistics in Medicine 26, 596-619) derives and
finds best. Seeds that differ much give about S - 1, seeds that agree many more. With one seed V is
the bootstrap variance of its result: the interval then speaks of that one trained model.
`tests/evaluation/test_statistics.py` draws data from the model and counts how often the intervals
hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cmdlab.errors import InputError
from cmdlab.evaluation.ranks import CUTOFFS, RankTable

DIRECTIONS = ("speech_to_image", "image_to_speech")
SCREEN = 12  # pictures that a user sees at once

# The median rank is not among them: it moves in whole steps, and a bootstrap of it is all lumps.
METRICS = (
    "mean_R@1",
    *(f"{direction}/R@{k}" for direction in DIRECTIONS for k in CUTOFFS),
    *(f"{direction}/MRR" for direction in DIRECTIONS),
    f"speech_to_image/R@{SCREEN}",
    "speech_to_image/mean_rank",  # pictures looked at, the right one among them
)


@dataclass(frozen=True)
class Interval:
    """A metric's mean over the seeds and its 95 % interval; R@K in percent, MRR from 0 to 1, ranks
    from 1."""

    mean: float
    low: float
    high: float
    per_seed: list[float]


@dataclass(frozen=True)
class Comparison:
    """Treatment minus control, in the metric's unit (R@K: percentage points).

    low, high: 95 % interval of the difference. p_value: two-sided. per_seed: one difference a seed.
    detectable: the smallest true difference that this design finds at 5 % with a power of 80 %. It
    is estimated from the spread seen, so it is good for five seeds and rough for three (in
    simulations the power at it came to 71-81 % and 60-80 %).
    """

    difference: float
    low: float
    high: float
    p_value: float
    per_seed: list[float]
    detectable: float


def interval(
    tables: Sequence[RankTable],
    metric: str,
    *,
    captions: np.ndarray | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean and 95 % interval of a metric over trained models, one table a seed.

    metric: one of METRICS. seed: of the bootstrap; the same seed gives the same interval.
    captions: bool [N], the queries to count, of a speech_to_image metric; default: all. Images
    without any of them are left out of the bootstrap, and ranked against as ever.
    The method is told in the docstring of this module. An interval is cut at the metric's bounds.
    Raises InputError if the tables are not of the same queries, or hold fewer than two images.
    """
    results, resampled, images = _bootstrap(tables, metric, captions, resamples, seed)
    estimate = _estimate(results, resampled, images)
    low, high = estimate.interval()
    measure = metric.split("/")[-1]
    worst, best = {"MRR": (0.0, 1.0), "mean_rank": (1.0, np.inf)}.get(measure, (0.0, 100.0))
    return Interval(estimate.mean, max(low, worst), min(high, best), results.tolist())


def compare(
    treatment: Sequence[RankTable],
    control: Sequence[RankTable],
    metric: str,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Treatment minus control, in pairs: the same seeds in the same order, and the same queries.

    The differences of the pairs are treated as `interval` treats results. What an image or a seed
    does to both arms alike cancels; what it does to one of them is in the interval and in p_value.
    If nothing varies at all, p_value is 1 for no difference and 0 for any other.
    Raises InputError if the arms differ in the number of seeds or in the queries.
    """
    if len(treatment) != len(control):
        raise InputError(
            f"{len(treatment)} runs cannot be paired with {len(control)}; "
            "give both arms the same seeds"
        )
    results, resampled, images = _bootstrap([*treatment, *control], metric, None, resamples, seed)
    pairs = len(treatment)
    differences = results[:pairs] - results[pairs:]
    estimate = _estimate(differences, resampled[:, :pairs] - resampled[:, pairs:], images)
    return estimate.comparison(differences)


def compare_by_seed(treatment: Sequence[float], control: Sequence[float]) -> Comparison:
    """Treatment minus control of one number a seed, in pairs: Student's paired t test.

    For figures of which a run keeps no more than their mean; it holds for other seeds, on the very
    items that were measured. If nothing varies, p_value is as in `compare`.
    Raises InputError for arms of different numbers of seeds, or of fewer than two.
    """
    if len(treatment) != len(control) or len(treatment) < 2:
        raise InputError(
            f"{len(treatment)} and {len(control)} results cannot be compared in pairs; give both "
            "arms the same two seeds or more"
        )
    differences = np.subtract(treatment, control)
    error = float(differences.std(ddof=1)) / len(differences) ** 0.5
    estimate = _Estimate(float(differences.mean()), error, len(differences) - 1)
    return estimate.comparison(differences)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for the size of their family, in the order given.

    Holm 1979, Scandinavian Journal of Statistics 6, 65-70: the k-th smallest of n is multiplied by
    n - k + 1, none falls below a smaller one's, and none exceeds 1.
    Raises ValueError for values outside 0 to 1.
    """
    values = np.asarray(p_values, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values lie between 0 and 1, not {list(p_values)}")
    order = np.argsort(values)
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted.tolist()


class _Estimate(NamedTuple):
    mean: float
    error: float  # standard error
    freedom: float  # degrees of freedom

    # By scipy's special functions: to import scipy.stats, which calls them, takes a second.
    def interval(self) -> tuple[float, float]:
        from scipy import special

        half_width = float(special.stdtrit(self.freedom, 0.975)) * self.error
        return self.mean - half_width, self.mean + half_width

    def p_value(self) -> float:
        from scipy import special

        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * special.stdtr(self.freedom, -abs(self.mean) / self.error))

    def detectable(self) -> float:
        """The difference at which the t test, then noncentral t, rejects in 80 % of the cases."""
        from scipy import special

        critical = special.stdtrit(self.freedom, 0.975)
        return float(special.nctdtrinc(self.freedom, 0.2, critical)) * self.error

    def comparison(self, per_seed: np.ndarray) -> Comparison:
        return Comparison(
            self.mean, *self.interval(), self.p_value(), per_seed.tolist(), self.detectable()
        )


def _estimate(results: np.ndarray, resampled: np.ndarray, images: int) -> _Estimate:
    """results [S], resampled [resamples, S]: the formulas of this module's docstring."""
    seeds = len(results)
    covariance = np.cov(resampled, rowvar=False).reshape(seeds, seeds) * images / (images - 1)
    one_seed = float(covariance.trace()) / seeds
    if seeds == 1:
        by_seed, variance = 0.0, one_seed
    else:
        by_seed = float(results.var(ddof=1)) / seeds
        by_image = max(float(covariance.sum() - covariance.trace()) / (seeds * (seeds - 1)), 0.0)
        variance = max(by_seed, (one_seed - by_image) / seeds) + by_image
    spread = by_seed**2 / max(seeds - 1, 1) + (variance - by_seed) ** 2 / (images - 1)
    freedom = variance**2 / spread if spread else float(images - 1)
    return _Estimate(float(results.mean()), variance**0.5, freedom)


def _bootstrap(
    tables: Sequence[RankTable],
    metric: str,
    captions: np.ndarray | None,
    resamples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """The metric of each table [T], again on each resample of the images [resamples, T], and M.

    All tables see the same resamples, and the captions of an image stay together.
    """
    if not tables:
        raise InputError("no runs to draw an interval from; give at least one")
    queries, views = tables[0].speech_image, tables[0].image_of_view
    if any(
        not np.array_equal(table.speech_image, queries)
        or not np.array_equal(table.image_of_view, views)
        for table in tables
    ):
        raise InputError("the runs are of different test queries; give runs of one corpus")
    parts = [_by_image(tables, name, captions) for name in _directions(metric)]
    images = len(parts[0][1])
    if images < 2:
        raise InputError("one image tells nothing of the spread; evaluate on two or more")
    results = np.mean([sums.sum(0) / counts.sum() for sums, counts in parts], axis=0)

    resampled = []
    for drawn in _times_drawn(images, resamples, seed):
        weights = drawn.astype(float)
        blocks = [weights @ sums / (weights @ counts)[:, None] for sums, counts in parts]
        resampled.append(np.mean(blocks, axis=0))
    return results, np.concatenate(resampled), images


@lru_cache(maxsize=1)  # a report draws all its intervals from the same resamples
def _times_drawn(images: int, resamples: int, seed: int) -> list[np.ndarray]:
    """How often each resample drew each image: uint16 [resamples, images], in blocks of rows."""
    generator = np.random.default_rng(seed)
    rows = max(1, 2**20 // images)  # resamples at once, to bound the memory
    blocks = []
    for start in range(0, resamples, rows):
        block = min(rows, resamples - start)
        drawn = generator.integers(images, size=(block, images))
        drawn += images * np.arange(block)[:, None]  # one stretch of numbers a resample
        times = np.bincount(drawn.ravel(), minlength=block * images)
        blocks.append(times.reshape(block, images).astype(np.uint16))
    return blocks


def _directions(metric: str) -> list[str]:
    """The metrics of one direction whose mean the metric is."""
    if metric not in METRICS:
        raise InputError(f"{metric}: no such metric; choose from {', '.join(METRICS)}")
    if metric == "mean_R@1":
        return [f"{direction}/R@1" for direction in DIRECTIONS]
    return [metric]


def _by_image(
    tables: Sequence[RankTable], metric: str, captions: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Each image's sum of scores [M, T] and its number of queries [M], none of which is 0."""
    direction, measure = metric.split("/")
    images = tables[0].images
    places = {
        "speech_to_image": tables[0].speech_image,
        "image_to_speech": tables[0].image_of_view,
    }[direction]
    chosen = np.ones(len(places), bool)
    if captions is not None:
        if direction != "speech_to_image":
            raise ValueError(f"captions are no queries of {metric}")
        chosen = captions
    sums = []
    for table in tables:
        ranks = table.ranks(direction)[chosen]
        sums.append(np.bincount(places[chosen], weights=_scores(ranks, measure), minlength=images))
    counts = np.bincount(places[chosen], minlength=images).astype(float)
    asked = counts > 0
    return np.stack(sums, axis=1)[asked], counts[asked]


def _scores(ranks: np.ndarray, measure: str) -> np.ndarray:
    if measure == "mean_rank":
        return ranks
    return 1 / ranks if measure == "MRR" else 100.0 * (ranks <= int(measure[2:]))
