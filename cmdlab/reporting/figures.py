"""The report's figures: paired differences, axes, learning curves, and word × patch maps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from cmdlab.evaluation import Comparison, Interval
from cmdlab.reporting.numbers import count, number, signed, value_label
from cmdlab.reporting.page import Figure
from cmdlab.reporting.panels import ARM, BASELINE, GRID, INK, MUTED, PAPER, SEED, Panel
from cmdlab.reporting.study import HEADLINE, ArmComparison, Study
from cmdlab.reporting.tables import arm_label, arms_with_retrieval_cost

METRIC_NAMES = {
    HEADLINE: "mean R@1",
    "speech_to_image/R@1": "speech → image R@1",
    "image_to_speech/R@1": "image → speech R@1",
}
LINE = 47  # height of a forest's row


class Difference(NamedTuple):
    """A row of a forest. dashed: exploratory. filled: separated from zero after correction."""

    name: str
    label: str
    result: Comparison
    dashed: bool
    filled: bool


def forest_figure(study: Study, by_metric: dict[str, list[ArmComparison]]) -> Figure:
    """Paired differences: one panel a metric, one row an arm."""
    shown = {
        metric: _differences(study, metric, comparisons)
        for metric, comparisons in by_metric.items()
    }
    limit = _forest_limit([one for ones in shown.values() for one in ones])
    exploratory = any(one.dashed for one in shown[HEADLINE])
    return Figure(
        "differences-figure",
        f"Each arm minus {study.baseline}, same seeds and same queries, in percentage points. "
        "Line: 95 % interval. Diamond: mean, filled where the difference in mean R@1 is separated "
        "from zero after Holm's correction. Open circles: single seeds. "
        + ("Dashed lines: exploratory comparisons. " if exploratory else "")
        + "Triangles point to what lies beyond the scale. "
        "The directions on their own were not tested.",
        [
            _forest(METRIC_NAMES[metric], rows, limit, f"forest-{index}")
            for index, (metric, rows) in enumerate(shown.items())
        ],
    )


def forest_panel(study: Study, metric: str, comparisons: list[ArmComparison]) -> Markup:
    """One panel of `forest_figure` by itself."""
    shown = _differences(study, metric, comparisons)
    return _forest(METRIC_NAMES[metric], shown, _forest_limit(shown), "forest")


def pairs_figure(name: str, family: str, by_measure: dict[str, list[Difference]]) -> Figure:
    """The pairs of a family: one panel a measure, each with a scale of its own."""
    return Figure(
        f"{name}-figure",
        f"{family}: the first arm of each pair minus the second, in percentage points. Line: 95 % "
        "interval. Diamond: mean, filled where it is separated from zero after Holm's correction. "
        "Open circles: single seeds. Triangles point to what lies beyond the scale.",
        [
            _forest(measure, rows, _forest_limit(rows), f"{name}-{index}")
            for index, (measure, rows) in enumerate(by_measure.items())
        ],
    )


def _differences(
    study: Study, metric: str, comparisons: Sequence[ArmComparison]
) -> list[Difference]:
    return [
        Difference(
            one.arm,
            arm_label(study, one.arm).removeprefix(f"{study.axis_base}, "),
            one.result,
            not one.planned,
            one.separated and metric == HEADLINE,
        )
        for one in comparisons
        if one.result is not None
    ]


def axes_figure(study: Study) -> Figure:
    """Dose–response: one panel an axis, mean R@1 against its values."""
    found = [study.interval(arm) for points in study.axes.values() for _, arm in points]
    centre = study.interval(study.baseline).mean
    usual = 4 * float(np.median([abs(value - centre) for one in found for value in _reach(one)]))
    values = [value for one in (*found, study.interval(study.baseline)) for value in _reach(one)]
    low, high = _limits([min(max(value, centre - usual), centre + usual) for value in values])
    panels = [
        _axis(study, name, points, (low, high), f"axis-{index}")
        for index, (name, points) in enumerate(study.axes.items())
    ]
    return Figure(
        "axes-figure",
        "Mean R@1 on the test set, in percent, along each axis, the other parameters as in "
        f"{study.axis_base} (square). Points with bars: mean and 95 % interval. Open circles: "
        f"single seeds. Dashed line: {study.baseline}, with its 95 % interval shaded. Values are "
        "evenly spaced, whatever their size; a line joins them where they are numbers. A triangle, "
        "with its mean, points to what lies beyond the scale.",
        panels,
    )


def curves_figure(study: Study) -> Figure:
    """Validation results during training: one panel an arm."""
    curves = {arm: _curves(study, arm, "validation_mean_R@1") for arm in study.finished_arms}
    values = [y for ones in curves.values() for _, ys in ones for y in ys]
    limits = _limits([0.0, *values])
    panels = []
    for index, (arm, ones) in enumerate(curves.items()):
        panel = Panel(f"curve-{index}", 200)
        if arm != study.baseline:
            panel.line(*_mean_curve(curves[study.baseline]), colour=BASELINE, dashed=True)
        for steps, ys in ones:
            panel.line(steps, ys, colour=ARM, faint=True)
        steps, ys = _mean_curve(ones)
        panel.line(steps, ys, colour=ARM)
        panel.axes.set_ylim(*limits)
        panel.labels(arm_label(study, arm), "step", "validation mean R@1, %")
        last = f"the mean over {len(ones)} seeds ends at {number(ys[-1])} %" if ys else "no points"
        panels.append(panel.svg(f"Learning curve of {arm}", f"Validation mean R@1: {last}."))
    galleries = dict.fromkeys(
        f"{run.record['metrics']['validation']['speech_to_image']['gallery']:,}"
        for run in study.runs
    )
    return Figure(
        "curves-figure",
        "Mean R@1 on the validation set during training, in percent. Faint: each seed. Bold: their "
        f"mean. Dashed: the mean of {study.baseline}. The validation set has a gallery of "
        f"{' or '.join(galleries)} images, so it is not to be compared with the test set.",
        panels,
    )


def time_figure(study: Study) -> Figure | None:
    """Validation against the seconds of training: one panel an arm that is compared; None where
    there is none, or a record does not tell the seconds."""
    arms = (study.baseline, *study.compared_arms)
    costs = [run.record["cost"] for arm in arms for run in study.of(arm)]
    if not study.compared_arms or not all("training_seconds_at" in cost for cost in costs):
        return None
    curves = {arm: _against_seconds(study, arm) for arm in arms}
    limits = _limits([0.0, *(y for _, ys in curves.values() for y in ys)])
    panels = []
    for index, arm in enumerate(study.compared_arms):
        panel = Panel(f"time-{index}", 200)
        panel.line(*curves[study.baseline], colour=BASELINE, dashed=True)
        panel.line(*curves[arm], colour=ARM)
        panel.axes.set_ylim(*limits)
        panel.labels(arm_label(study, arm), "seconds of training", "validation mean R@1, %")
        ends = [
            f"{one} ends at {number(ys[-1])} % after {seconds[-1]:,.0f} s"
            for one in (arm, study.baseline)
            for seconds, ys in [curves[one]]
            if ys
        ]
        panels.append(panel.svg(f"Time to accuracy of {arm}", f"{'; '.join(ends)}."))
    return Figure(
        "time-figure",
        "Time to accuracy: mean R@1 on the validation set against the seconds of training, the "
        f"mean over the seeds. Dashed: {study.baseline}. At equal cost arms are compared along a "
        "vertical line.",
        panels,
    )


def loss_figure(study: Study) -> Figure:
    """The two training losses of the baseline and of the best arm on the validation set."""
    arms = list(dict.fromkeys([study.baseline, study.best_on_validation or study.baseline]))
    styles: dict[str, dict[str, Any]] = {
        arm: {"colour": BASELINE if arm == study.baseline else ARM, "dashed": arm == study.baseline}
        for arm in arms
    }
    panels = []
    for name in ("contrastive", "denoising"):
        panel = Panel(f"loss-{name}", 220)
        ends = []
        for arm in arms:
            ones = _curves(study, arm, name)
            for steps, ys in ones:
                panel.line(steps, ys, **styles[arm], faint=True)
            steps, ys = _mean_curve(ones)
            if ys:
                panel.line(steps, ys, **styles[arm], label=arm)
                ends.append(f"{arm} ends at {ys[-1]:.3f}")
        if ends:
            panel.legend()
        panel.labels(f"{name.capitalize()} loss", "step", "training loss")
        described = "; ".join(ends) or "no values recorded"
        panels.append(panel.svg(f"{name.capitalize()} loss during training", f"{described}."))
    return Figure(
        "loss-figure",
        "Training losses, each seed faint and the mean bold; dashed is "
        f"{study.baseline}, which has no denoising loss.",
        panels,
    )


def retrieval_cost_figure(study: Study) -> Figure:
    """Accuracy against the cost of a query, in FLOPs and in milliseconds: one point an arm."""
    arms = arms_with_retrieval_cost(study)
    found = {arm: study.interval(arm) for arm in arms}
    limits = _limits([value for one in found.values() for value in (one.low, one.high)])
    panels = []
    for name, unit in (("flops_per_query", "FLOPs"), ("ms_per_query", "milliseconds")):
        costs = {
            arm: float(np.mean([run.record["cost"][f"retrieval_{name}"] for run in study.of(arm)]))
            for arm in arms
        }
        panels.append(_costs(study, costs, found, limits, f"retrieval-{name}", unit))
    return Figure(
        "retrieval-cost-figure",
        "Mean R@1 on the test set, in percent, against what ranking the gallery costs one caption; "
        "the scale of costs is logarithmic. Points with bars: mean and 95 % interval. Square: "
        f"{study.baseline}.",
        panels,
    )


def word_maps_svg(
    identifier: str, words: Sequence[dict[str, Any]], maps: dict[str, Any], photo: np.ndarray | None
) -> Markup:
    """Words on the time axis, each with how well it fits the image's patches below.

    maps: rows, columns, values [words][rows * columns]. photo: the image, uint8 [H, W, 3].
    """
    side, gap, left = 74, 10, 92
    width = left + len(words) * (side + gap) + 10
    panel = Panel(identifier, 196, width=width)
    axes = panel.axes
    axes.set_position((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(196, 0)
    axes.set_axis_off()
    end = max(word["end"] for word in words)
    span = width - left - gap
    best: list[str] = []
    axes.text(0, 34, "spoken at", color=MUTED, fontsize=11, va="center")
    axes.text(0, 122, "fits" if photo is None else "", color=MUTED, fontsize=11, va="center")
    if photo is not None:
        axes.imshow(photo, extent=(0, side, 84 + side, 84), interpolation="none", zorder=2)
        axes.text(0, 178, "the image", color=MUTED, fontsize=11, va="center")
    for index, (word, values) in enumerate(zip(words, maps["values"], strict=True)):
        start, stop = (left + span * word[key] / end for key in ("start", "end"))
        x = left + index * (side + gap)
        shade = (ARM, INK)[index % 2]
        axes.plot([start, stop], [34, 34], color=shade, linewidth=7, solid_capstyle="butt")
        axes.plot([(start + stop) / 2, x + side / 2], [40, 64], color=MUTED, linewidth=0.8)
        axes.text(x + side / 2, 74, word["word"], color=INK, fontsize=12, ha="center", va="center")
        grid = np.asarray(values, dtype=float).reshape(maps["rows"], maps["columns"])
        axes.imshow(grid, extent=(x, x + side, 84 + side, 84), cmap="cividis", interpolation="none")
        row, column = np.unravel_index(int(grid.argmax()), grid.shape)
        best.append(f"{word['word']} {row + 1}, {column + 1}")
        centre_x = x + (column + 0.5) * side / maps["columns"]
        centre_y = 84 + (row + 0.5) * side / maps["rows"]
        axes.plot(centre_x, centre_y, "x", color="#000000", markersize=7, markeredgewidth=1.6)
        clock = f"{word['start']:.2f}–{word['end']:.2f} s"
        axes.text(x + side / 2, 178, clock, color=MUTED, fontsize=10.5, ha="center", va="center")
    axes.plot([left, left + span], [24, 24], color=MUTED, linewidth=0.8)
    for second in range(int(end) + 1):
        x = left + span * second / end
        axes.plot([x, x], [20, 24], color=MUTED, linewidth=0.8)
        axes.text(x, 11, f"{second} s", color=MUTED, fontsize=10.5, ha="center", va="center")
    axes.set_xlim(0, width)
    axes.set_ylim(196, 0)
    axes.set_aspect("auto")
    spoken = " ".join(str(word["word"]) for word in words)
    return panel.svg(
        f"Which patches the words “{spoken}” fit",
        f"The patch that each word fits best, by row and column: {'; '.join(best)}.",
    )


def _forest(metric: str, rows: Sequence[Difference], limit: float, name: str) -> Markup:
    height = 62 + LINE * max(1, len(rows))
    panel = Panel(name, height, margins=(6, 6, 26, 40))
    axes = panel.axes
    axes.set_xlim(-limit, limit)
    axes.set_ylim(len(rows), 0)
    described = []
    for index, one in enumerate(rows):
        result = one.result
        figures = f"{signed(result.difference)} [{signed(result.low)}, {signed(result.high)}]"
        described.append(f"{one.name}: {figures}")
        place = axes.get_yaxis_transform()
        text: dict[str, Any] = {"va": "center", "fontsize": 11.5, "transform": place, "zorder": 4}
        axes.text(0, index + 0.2, _shorten(one.label, 24), color=INK, **text)
        axes.text(1, index + 0.2, figures, color=INK, ha="right", **text)
        y = index + 0.62
        dashes = (0, (2.5, 1)) if one.dashed else "-"
        ends = [result.low, result.high]
        axes.plot(ends, [y, y], color=ARM, linewidth=2.2, linestyle=dashes, zorder=2)
        axes.scatter(
            result.per_seed,
            [y] * len(result.per_seed),
            s=26,
            facecolors="none",
            edgecolors=SEED,
            linewidths=1.1,
            zorder=3,
        )
        face = ARM if one.filled else PAPER
        marker, x = "D", result.difference
        if abs(x) > limit:  # a far arm must not flatten the others
            marker, x = "<" if x < 0 else ">", 0.97 * float(np.sign(x)) * limit
        axes.plot(x, y, marker, markersize=7.5, mfc=face, mec=ARM, mew=1.8, zorder=4)
        axes.plot([0, 0], [index + 0.38, index + 0.9], color=INK, linewidth=1, zorder=1)
        axes.axhline(index + 1, color=GRID, linewidth=0.8, zorder=0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    panel.labels(_sentence(metric), "difference, percentage points", "")
    return panel.svg(f"Paired differences in {metric}", "; ".join(described) + ".")


def _forest_limit(shown: Sequence[Difference]) -> float:
    """The end of the scale: all intervals and seeds, but for arms far beyond the usual one."""
    reach = [max(map(abs, _reach(one.result))) for one in shown]
    return 1.08 * max(0.5, min(max(reach, default=0.0), 4 * float(np.median(reach or [0.0]))))


def _axis(
    study: Study,
    name: str,
    points: list[tuple[Any, str]],
    limits: tuple[float, float],
    identifier: str,
) -> Markup:
    panel = Panel(identifier, 250)
    axes = panel.axes
    base = study.interval(study.baseline)
    axes.axhspan(base.low, base.high, color=GRID, zorder=0, linewidth=0)
    axes.axhline(base.mean, color=BASELINE, linewidth=1.2, dashes=(5, 3), zorder=1)
    intervals = [study.interval(arm) for _, arm in points]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in points):
        axes.plot([one.mean for one in intervals], color=ARM, linewidth=1.4, zorder=2)
    described = []
    for x, ((value, arm), found) in enumerate(zip(points, intervals, strict=True)):
        axes.plot([x, x], [found.low, found.high], color=ARM, linewidth=2, zorder=3)
        marker, y = "s" if arm == study.axis_base else "o", found.mean
        if not limits[0] <= y <= limits[1]:
            below = y < limits[0]
            marker, y = ("v", limits[0]) if below else ("^", limits[1])
            y += (0.04 if below else -0.04) * (limits[1] - limits[0])
            axes.text(x + 0.12, y, number(found.mean), color=INK, fontsize=11, va="center")
        axes.plot(x, y, marker, markersize=7, mfc=ARM, mec=PAPER, mew=1, zorder=5)
        xs = x + 0.16 + 0.0 * np.asarray(found.per_seed)
        axes.scatter(
            xs, found.per_seed, s=20, facecolors="none", edgecolors=SEED, linewidths=1.1, zorder=4
        )
        span = f"{number(found.low)} to {number(found.high)}"
        described.append(f"{value_label(value)}: {number(found.mean)} ({span})")
    axes.set_xlim(-0.6, len(points) - 0.4)
    axes.set_ylim(*limits)
    labels = [_shorten(value_label(value), max(6, 40 // len(points))) for value, _ in points]
    axes.set_xticks(range(len(points)), labels)
    title = _sentence(name.replace("_", " "))
    panel.labels(title, "", "mean R@1, %")
    return panel.svg(f"Mean R@1 along the axis {name}", "; ".join(described) + ".")


def _costs(
    study: Study,
    costs: dict[str, float],
    found: dict[str, Interval],
    limits: tuple[float, float],
    identifier: str,
    unit: str,
) -> Markup:
    panel = Panel(identifier, 300)
    axes = panel.axes
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: _small_or_large(x))
    axes.xaxis.set_minor_formatter(lambda x, _: "")
    low, high = min(costs.values()), max(costs.values())
    axes.set_xlim(low / (high / low) ** 0.12, high * (high / low) ** 0.12)
    axes.set_ylim(*limits)
    gap = 0.075 * (limits[1] - limits[0])  # between two names, one above the other
    named: list[tuple[bool, float]] = []
    described = []
    for arm in sorted(costs, key=lambda arm: found[arm].mean):
        x, one = costs[arm], found[arm]
        axes.plot([x, x], [one.low, one.high], color=ARM, linewidth=2, alpha=0.6, zorder=3)
        marker, colour = ("s", BASELINE) if arm == study.baseline else ("o", ARM)
        axes.plot(x, one.mean, marker, markersize=7, mfc=colour, mec=PAPER, mew=1, zorder=5)
        left = x * x > low * high  # names of the costly half stand to the left
        below = [y for side, y in named if side == left]
        y = max([one.mean, *(y + gap for y in below)])
        named.append((left, y))
        axes.annotate(
            _shorten(arm, 18),
            (x, y),
            (-8 if left else 8, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=INK,
            fontsize=11,
        )
        described.append(f"{arm}: {number(one.mean)} at {_small_or_large(x)}")
    panel.labels(f"Cost of a query, {unit}", f"{unit} a query", "mean R@1, %")
    return panel.svg(f"Mean R@1 against {unit} a query", "; ".join(described) + ".")


def _curves(study: Study, arm: str, name: str) -> list[tuple[list[float], list[float]]]:
    """Steps and values of each seed; nothing for a seed that has none."""
    curves = []
    for run in study.of(arm):
        points = [point for point in run.record["learning_curve"] if point[name] is not None]
        if points:
            curves.append(([point["step"] for point in points], [point[name] for point in points]))
    return curves


def _against_seconds(study: Study, arm: str) -> tuple[list[float], list[float]]:
    """Seconds of training and validation's mean R@1 at each validation, means over the seeds."""
    steps, reached = _mean_curve(_curves(study, arm, "validation_mean_R@1"))
    points = [run.record["cost"]["training_seconds_at"] for run in study.of(arm)]
    curves = [([at["step"] for at in ones], [at["seconds"] for at in ones]) for ones in points]
    seconds = dict(zip(*_mean_curve(curves), strict=True))
    return [seconds[step] for step in steps], reached


def _mean_curve(curves: list[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """The mean at the steps that all seeds have."""
    if not curves:
        return [], []
    values = [dict(zip(steps, ys, strict=True)) for steps, ys in curves]
    common = sorted(set.intersection(*(set(one) for one in values)))
    return common, [float(np.mean([one[step] for one in values])) for step in common]


def _reach(found: Any) -> tuple[float, ...]:
    return (found.low, found.high, *found.per_seed)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The span of the values with a margin, the same for all panels of a figure."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 1.0
    return max(0.0, low - margin), high + margin


def _small_or_large(value: float) -> str:
    return count(value) if value >= 1000 else f"{value:.2g}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
