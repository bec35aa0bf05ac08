"""The report's tables: every row names the records that it is drawn from."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from cmdlab.reporting.numbers import ABSENT, count, number, p_value, signed, value_label
from cmdlab.reporting.page import Column, Row, Table
from cmdlab.reporting.study import ArmComparison, Run, Study, wilson

DIRECTIONS = {"speech_to_image": "Speech → image", "image_to_speech": "Image → speech"}
RECALLS = ("R@1", "R@5", "R@10")


def main_table(study: Study) -> Table:
    """Each arm's retrieval results on the test gallery, and the two ceilings."""
    columns = [Column("Arm", numeric=False), Column("Mean R@1")]
    for direction, heading in DIRECTIONS.items():
        sizes = {run.record["metrics"]["test"][direction]["gallery"] for run in study.runs}
        gallery = " or ".join(f"{size:,}" for size in sorted(sizes))
        group = f"{heading}, gallery of {gallery}"
        columns += [Column(name, group) for name in (*RECALLS, "Median", "MRR")]
    columns.append(Column("Seeds"))
    rows = []
    for arm in study.finished_arms:
        runs = study.of(arm)
        cells: list[str] = [
            arm_label(study, arm),
            _with_interval(study, arm, "mean_R@1", bold=True),
        ]
        for direction in DIRECTIONS:
            cells += [_with_interval(study, arm, f"{direction}/{name}") for name in RECALLS]
            results = [run.record["metrics"]["test"][direction] for run in runs]
            cells.append(number(np.mean([result["median_rank"] for result in results])))
            cells.append(f"{np.mean([result['MRR'] for result in results]):.3f}")
        links = Markup('<span class="interval">{}</span>').format(record_links(runs))
        cells.append(Markup("{}{}").format(len(runs), links))
        rows.append(Row(cells, _kind(study, arm)))
    ceilings = [
        *_ceiling_rows(study, "ceiling", "All-knowing system (corpus ceiling)"),
        *_ceiling_rows(study, "text_ceiling", "Text ceiling: text → image, same frozen encoder"),
    ]
    return Table(
        "results-table",
        "Retrieval on the test gallery. Recalls in percent, mean over the seeds with the 95 % "
        "interval below it; the pessimistic rank, which counts every tie against the system.",
        columns,
        [*rows, *ceilings],
        "Intervals take the variance of seeds and of images together. Median: the median rank; "
        "MRR: the mean reciprocal rank; both are means over the seeds. Below the number of seeds "
        "each seed leads to its record. "
        + ("† best arm on the validation set. " if study.best_on_validation else "")
        + _ties(study),
    )


def comparison_table(study: Study, comparisons: Sequence[ArmComparison]) -> Table:
    """Mean R@1 of each arm minus the baseline's."""
    rows: list[Row] = []
    for one in comparisons:
        kind = "planned" if one.planned else "exploratory"
        head = Markup('{}<span class="interval">{}</span>')
        cells: list[str] = [head.format(arm_label(study, one.arm), kind)]
        if one.result is None:
            cells += [*[ABSENT] * 4, f"not compared: {one.reason}", ABSENT]
        else:
            cells += [
                signed(one.result.difference),
                f"{signed(one.result.low)} to {signed(one.result.high)}",
                p_value(one.result.p_value),
                p_value(one.adjusted_p),
                Markup('<span class="verdict">{}</span>').format(_verdict(one)),
                number(one.result.detectable),
            ]
        runs = [run for run in study.of(one.arm) if run.seed in one.seeds]
        per_seed = [] if one.result is None else [signed(value) for value in one.result.per_seed]
        rows.append(Row([*cells, record_links(runs, per_seed)]))
    return Table(
        "differences-table",
        f"Mean R@1 on the test set, each arm minus {study.baseline}, in percentage points.",
        [
            Column("Arm", numeric=False),
            Column("Difference"),
            Column("95 % interval"),
            Column("p"),
            Column("p (Holm)"),
            Column("Against zero", numeric=False),
            Column("Detectable"),
            Column("Each seed", numeric=False),
        ],
        rows,
        "p (Holm) is adjusted for all comparisons of the same kind, planned or exploratory, and "
        "decides at 5 % whether a difference is separated from zero. Intervals are not adjusted. "
        "Detectable: the smallest true difference that would be found at 5 % in about 80 % of the "
        "cases if it were tested alone, before Holm's correction. Each seed's difference leads to "
        "the arm's record; the baseline's are in the table of results.",
    )


def axes_table(study: Study) -> Table:
    """The points of the dose–response figure."""
    rows: list[Row] = []
    for axis, points in study.axes.items():
        for index, (value, arm) in enumerate(points):
            cells = [
                axis.replace("_", " "),
                value_label(value),
                arm_label(study, arm),
                _with_interval(study, arm, "mean_R@1"),
                record_links(study.of(arm), map(number, study.interval(arm).per_seed)),
            ]
            rows.append(Row(cells, "break" if index == 0 and rows else ""))
    return Table(
        "axes-table",
        "Mean R@1 on the test set at each value of each axis, in percent.",
        [
            Column("Axis", numeric=False),
            Column("Value", numeric=False),
            Column("Arm", numeric=False),
            Column("Mean R@1"),
            Column("Each seed", numeric=False),
        ],
        rows,
        "Each seed's value leads to its record.",
    )


def cost_table(study: Study) -> Table:
    """What each arm costs in training, and what it costs at retrieval time."""
    rows = []
    counted = any("training_flops" in run.record["cost"] for run in study.runs)
    for arm in study.finished_arms:
        runs = study.of(arm)
        costs = [run.record["cost"] for run in runs]
        rows.append(
            Row(
                [
                    arm_label(study, arm),
                    spread(costs, "training_seconds", number),
                    *([spread(costs, "training_flops", count)] if counted else []),
                    spread(costs, "steps", lambda steps: f"{steps:,.0f}"),
                    spread(costs, "peak_memory_bytes", lambda size: f"{size / 2**20:,.0f}"),
                    spread(costs, "trainable_parameters", count),
                    spread(costs, "denoiser_parameters", count),
                    spread(costs, "inference_parameters", count),
                    spread(costs, "inference_flops", count),
                    spread(costs, "inference_ms", lambda ms: f"{ms:.2f}"),
                    record_links(runs),
                ],
                _kind(study, arm),
            )
        )
    training = (
        "time, s",
        *(["FLOPs"] if counted else []),
        "steps",
        "memory, MiB",
        "parameters",
        "denoiser",
    )
    inference = ("parameters", "FLOPs", "latency, ms")
    return Table(
        "cost-table",
        "Cost of each arm: mean over the seeds, and the range below it where seeds differ.",
        [
            Column("Arm", numeric=False),
            *(Column(name, group="Training") for name in training),
            *(Column(name, group="Retrieval") for name in inference),
            Column("Records", numeric=False),
        ],
        rows,
        "Denoiser: those of the parameters that are used in training alone. Memory: the peak, "
        "memory-mapped features included. "
        f"FLOPs and latency{' at retrieval' * counted} are of one caption. "
        "Time, memory and latency were measured on the machine named under Provenance, with "
        "whatever else it ran.",
    )


def retrieval_cost_table(study: Study) -> Table:
    """Accuracy beside what ranking the gallery costs a query, cheapest first."""
    costs = {
        arm: [run.record["cost"] for run in study.of(arm)]
        for arm in arms_with_retrieval_cost(study)
    }
    flops = {
        arm: float(np.mean([cost["retrieval_flops_per_query"] for cost in ones]))
        for arm, ones in costs.items()
    }
    rows = [
        Row(
            [
                arm_label(study, arm),
                _with_interval(study, arm, "mean_R@1"),
                spread(costs[arm], "retrieval_flops_per_query", count),
                f"{flops[arm] / flops[study.baseline]:,.0f}" if study.baseline in flops else ABSENT,
                spread(costs[arm], "retrieval_ms_per_query", lambda ms: f"{ms:.2g}"),
                record_links(study.of(arm)),
            ],
            _kind(study, arm),
        )
        for arm in sorted(costs, key=lambda arm: flops[arm])
    ]
    return Table(
        "retrieval-cost-table",
        "Mean R@1 on the test set, in percent, and the cost of ranking the gallery for a caption.",
        [
            Column("Arm", numeric=False),
            Column("Mean R@1"),
            Column("FLOPs a query"),
            Column(f"Times {study.baseline}"),
            Column("Latency, ms"),
            Column("Records", numeric=False),
        ],
        rows,
        "Of a caption of median length, once its head has been computed, with a gallery that is at "
        "hand as the arm needs it. FLOPs: those of products of matrices.",
    )


def arms_with_retrieval_cost(study: Study) -> list[str]:
    """The finished arms all of whose records tell the cost of a query; older ones do not."""
    names = ("retrieval_flops_per_query", "retrieval_ms_per_query")
    return [
        arm
        for arm in study.finished_arms
        if all(run.record["cost"].get(name, 0) > 0 for run in study.of(arm) for name in names)
    ]


def alignment_table(study: Study) -> Table:
    """Pointing game and foil of each arm that was measured."""
    rows = []
    for arm in study.finished_arms:
        pointing = [(run, _alignment(run, "pointing")) for run in study.of(arm)]
        foil = [(run, _alignment(run, "foil")) for run in study.of(arm)]
        measured = [run for run in study.of(arm) if run.record["alignment"]]
        words = [part for _, part in pointing if part and part["words"]]
        pairs = [part for _, part in foil if part and part["pairs"]]
        cells: list[str] = [arm_label(study, arm)]
        if words:
            chance = float(np.mean([part["chance"] for part in words]))
            cells += [
                _proportion([(part["hits"], part["words"]) for part in words]),
                f"{100 * chance:.1f}",
                f"{np.mean([part['words'] for part in words]):,.0f}",
            ]
        else:
            cells += ["not measured", ABSENT, ABSENT]
        cells += _foil_cells(pairs)
        rows.append(Row([*cells, record_links(measured)]))
    rows += _text_foil_rows(study)
    pointing_group, foil_group = "Pointing game", "Foil"
    return Table(
        "alignment-table",
        "Fine alignment on the test set, in percent, with Wilson's 95 % interval.",
        [
            Column("Arm", numeric=False),
            Column("hits", group=pointing_group),
            Column("chance", group=pointing_group),
            Column("words", group=pointing_group),
            Column("wins", group=foil_group),
            Column("chance", group=foil_group),
            Column("ties", group=foil_group),
            Column("pairs", group=foil_group),
            Column("Records", numeric=False),
        ],
        rows,
        "Every seed answers the same words and pairs, so the interval is that of one seed's number "
        "of them, about the mean over the seeds. It covers neither other seeds nor that the words "
        "of a caption go together. A tie is not counted as a win.",
    )


def _foil_cells(foils: Sequence[dict[str, int]]) -> list[str]:
    """Wins, chance, ties and pairs of the foil tests of some runs."""
    if not foils:
        return ["not measured", ABSENT, ABSENT, ABSENT]
    ties = float(np.mean([100 * part["ties"] / part["pairs"] for part in foils]))
    return [
        _proportion([(part["wins"], part["pairs"]) for part in foils]),
        "50.0",
        f"{ties:.1f}",
        f"{np.mean([part['pairs'] for part in foils]):,.0f}",
    ]


def _text_foil_rows(study: Study) -> list[Row]:
    """One row for each different foil test of a text encoder; older records do not hold it."""
    different = {
        json.dumps(foil, sort_keys=True): (foil, run.record["encoders"]["image"]["name"])
        for run in study.runs
        if (foil := (run.record["text_ceiling"] or {}).get("foil")) and foil["pairs"]
    }
    label = "Text ceiling: the captions' text, same frozen encoder"
    labels = [f"{label}{f', {name}' * (len(different) > 1)}" for _, name in different.values()]
    return [
        Row([label, *[ABSENT] * 3, *_foil_cells([foil]), ABSENT], "reference first")
        for label, (foil, _) in zip(labels, different.values(), strict=True)
    ]


def arm_label(study: Study, arm: str) -> str:
    """The arm's name, with a dagger on the best of the validation set, or said to be a ceiling."""
    if arm in study.ceilings:
        return f"{arm} (ceiling)"
    chosen = arm == study.best_on_validation or arm in study.chosen_arms
    return f"{arm} †" if chosen else arm


def rivals_of(study: Study) -> str:
    """What the arms stand against, in words."""
    rivals = {study.rival(arm) for arm in study.finished_arms} - {None, study.baseline}
    return f"{study.baseline}, or the second arm of its own pair" if rivals else study.baseline


def spread(costs: list[dict[str, Any]], key: str, show: Callable[[float], str]) -> str | Markup:
    """The mean of a value over some runs, and its range below where they differ."""
    values = [cost[key] for cost in costs if cost.get(key) is not None]
    if not values:
        return "not measured"
    mean, low, high = show(float(np.mean(values))), show(min(values)), show(max(values))
    if low == high:
        return mean
    return Markup('{}<span class="interval">{}–{}</span>').format(mean, low, high)


def _kind(study: Study, arm: str) -> str:
    """How an arm's row is set."""
    return "reference" if arm in study.ceilings else "baseline" if arm == study.baseline else ""


def record_links(runs: Iterable[Run], texts: Iterable[str] | None = None) -> Markup:
    """Links to the appendix, one a record; their texts are the seeds if no others are given."""
    runs = list(runs)
    shown = [str(run.seed) for run in runs] if texts is None else texts
    links = [
        Markup('<a href="#record-{0}" title="record {0}, seed {1}">{2}</a>').format(
            run.id, run.seed, text
        )
        for run, text in zip(runs, shown, strict=True)
    ]
    return Markup('<span class="records">{}</span>').format(Markup(" ").join(links) or ABSENT)


def _verdict(one: ArmComparison) -> str:
    if not one.separated or one.result is None:
        return "not separated"
    return "above" if one.result.difference > 0 else "below"


def _with_interval(study: Study, arm: str, metric: str, *, bold: bool = False) -> Markup:
    found = study.interval(arm, metric)
    mean = Markup("<b>{}</b>" if bold else "{}").format(number(found.mean))
    return mean + Markup('<span class="interval">{}–{}</span>').format(
        number(found.low), number(found.high)
    )


def _ceiling_rows(study: Study, key: str, label: str) -> list[Row]:
    """One row for each different ceiling among the records; usually one, else they name their
    image encoders."""
    different = {
        json.dumps(run.record[key], sort_keys=True): run.record["encoders"]["image"]["name"]
        for run in study.runs
    }
    rows: list[Row] = []
    for text, encoder in different.items():
        ceiling = json.loads(text)
        if ceiling is None:
            cells: list[str] = ["not measured", *[ABSENT] * 10]
        else:
            both = [ceiling[direction] for direction in DIRECTIONS]
            cells = [number(sum(part["R@1"] for part in both) / 2)]
            for part in both:
                cells += [*(number(part[name]) for name in RECALLS), ABSENT, ABSENT]
        kind = "reference" if rows or key != "ceiling" else "reference first"
        named = f"{label}, {encoder}" if len(different) > 1 else label
        rows.append(Row([named, *cells, ABSENT], kind))
    return rows


def _ties(study: Study) -> str:
    arms = []
    for arm in study.finished_arms:
        for direction, heading in DIRECTIONS.items():
            results = [run.record["metrics"]["test"][direction] for run in study.of(arm)]
            pessimistic = float(np.mean([result["R@1"] for result in results]))
            optimistic = float(np.mean([result["optimistic_R@1"] for result in results]))
            if number(pessimistic) != number(optimistic):
                arms.append(f"{arm}, {heading.lower()}: {number(optimistic)}")
    if not arms:
        return "Ties change no R@1 by as much as a tenth of a point."
    return f"The optimistic R@1, with ties counted as hits, differs for {'; '.join(arms)}."


def _alignment(run: Run, key: str) -> dict[str, Any] | None:
    return (run.record["alignment"] or {}).get(key)


def _proportion(parts: list[tuple[float, int]]) -> Markup:
    """The mean rate over the seeds in percent, with the interval of one seed's trials."""
    rate = float(np.mean([hits / trials for hits, trials in parts]))
    trials = float(np.mean([trials for _, trials in parts]))
    low, high = wilson(rate * trials, trials)
    return Markup('{}<span class="interval">{}–{}</span>').format(
        number(100 * rate), number(100 * low), number(100 * high)
    )
