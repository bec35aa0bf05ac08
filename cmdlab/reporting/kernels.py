"""The report on the kernels' speed, drawn from the CSV files that `cmdlab bench` writes."""

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cmdlab.errors import InputError
from cmdlab.reporting.numbers import ABSENT, count
from cmdlab.reporting.page import (
    Column,
    Figure,
    Row,
    Section,
    Table,
    bullets,
    paragraph,
    write_page,
)
from cmdlab.reporting.panels import ARM, BASELINE, GRID, INK, MUTED, PAPER, Panel

OURS = "cmdlab"  # how the names of our own providers begin
OPERATIONS = {  # the title of each, and our provider that its peers are compared with
    "retrieval_ranks": ("Retrieval ranks", "cmdlab_kernels"),
    "denoising_attention": ("Denoising attention", "cmdlab_kernels"),
    "info_nce": ("InfoNCE", "cmdlab_kernels"),
    "nearest": ("Nearest vectors", "cmdlab.search scan"),
}
MACHINE = ("threads", "driver", "torch", "triton", "git_sha")
LINE = 40  # height of a row of a ranking
MARKERS = "osDv^<>pX*"


@dataclass(frozen=True)
class Timing:
    """One line of a CSV: a provider's seconds, or for the operation "ceiling" what is reached.

    A number that the file leaves out is NaN.
    """

    operation: str
    provider: str
    mode: str
    dtype: str
    shape: str
    metric: str
    device: str
    threads: str
    driver: str
    torch: str
    triton: str
    git_sha: str
    p20: float
    p50: float
    p80: float
    flops: float
    bytes: float
    fraction_of_floor: float
    peak_memory_bytes: float
    precisions: str = ""  # which older files lack

    @property
    def is_ours(self) -> bool:
        """Whether it is the one that its operation's peers are compared with."""
        return self.provider == OPERATIONS.get(self.operation, ("", None))[1]

    @property
    def is_peer(self) -> bool:
        """Whether it does all that the operation does: a bare product does not."""
        return not self.provider.startswith((OURS, "bare ")) and "captions" not in self.provider


def write_kernel_report(files: Sequence[Path], output: Path) -> None:
    """Draw the report of some CSV files, one section each, and put it in place of `output`.

    The same files give the same bytes. Raises InputError that names file, line and column.
    """
    runs = _named([read_timings(file) for file in files])
    devices = list(dict.fromkeys(timings[0].device for timings in runs.values()))
    titles = _titles(timing for timings in runs.values() for timing in timings)
    sections = [Section("found", "What was found", [_found(runs.values())])]
    for index, (name, timings) in enumerate(runs.items()):
        sections.append(Section(f"device-{index}", name, _run_blocks(timings, f"d{index}")))
    sections += [_method(), Section("origin", "Provenance", [_origin_table(runs)])]
    write_page(
        Path(output),
        title="The kernels against their peers",
        kicker="Cross-Modal Denoising · kernel benchmarks",
        lead=f"{', '.join(titles)} on {', '.join(devices)}",
        sections=sections,
        footer="Drawn by cmdlab report from the benchmarks' CSV files. The page holds no script "
        "and makes no request.",
    )


def read_timings(file: Path) -> list[Timing]:
    """The lines of a benchmark's CSV, checked. Raises InputError."""
    try:
        with Path(file).open(newline="", encoding="utf-8") as content:
            reader = csv.DictReader(content)
            names = [field.name for field in fields(Timing) if field.default is MISSING]
            missing = [name for name in names if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{file}: lacks the column {missing[0]}; run `cmdlab bench` again")
            timings = [_timing(file, reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: is no readable CSV ({error})") from error
    if not any(timing.is_ours for timing in timings):
        raise InputError(f"{file}: holds no timing of {OURS}; run `cmdlab bench` again")
    if len({timing.device for timing in timings}) > 1:
        raise InputError(f"{file}: holds timings of several devices; give each its own file")
    return timings


def _named(runs: Sequence[list[Timing]]) -> dict[str, list[Timing]]:
    """Each file's timings by the device, and where several are of one, what was timed there."""
    devices = [timings[0].device for timings in runs]
    named = {}
    for number, (device, timings) in enumerate(zip(devices, runs, strict=True), 1):
        name = device if devices.count(device) == 1 else f"{device}: {', '.join(_titles(timings))}"
        named[f"{name} ({number})" if name in named else name] = timings
    return named


def _titles(timings: Iterable[Timing]) -> list[str]:
    timed = {timing.operation for timing in timings}
    return [title for operation, (title, _) in OPERATIONS.items() if operation in timed]


def _timing(file: Path, number: int, line: dict[str, str]) -> Timing:
    values: dict[str, Any] = {}
    for field in fields(Timing):
        text = line.get(field.name) or ""
        try:
            values[field.name] = text if field.type is str else float(text or "nan")
        except ValueError:
            place = f"{file}: line {number}: {field.name}"
            raise InputError(f"{place} is {text!r}, which is no number") from None
    timing = Timing(**values)
    if not 0 < timing.p20 <= timing.p50 <= timing.p80 < math.inf:
        raise InputError(f"{file}: line {number}: p20, p50, p80 are no positive, ordered numbers")
    return timing


def _groups(timings: Sequence[Timing], operation: str) -> dict[tuple[str, str], list[Timing]]:
    """The timings of an operation by mode and shape; a bare product belongs to every mode."""
    own = [timing for timing in timings if timing.operation == operation]
    modes = dict.fromkeys(timing.mode for timing in own if timing.is_ours)
    shapes = dict.fromkeys(timing.shape for timing in own)
    return {
        (mode, shape): [
            timing
            for timing in own
            if timing.shape == shape and timing.mode in (mode, "one direction")
        ]
        for mode in modes
        for shape in shapes
    }


def _largest(timings: Sequence[Timing], operation: str) -> dict[str, tuple[str, list[Timing]]]:
    """For each mode the largest shape and its timings: sizes come in ascending order."""
    return {m: (shape, group) for (m, shape), group in _groups(timings, operation).items()}


def _found(runs: Iterable[Sequence[Timing]]) -> Markup:
    """One sentence for the largest size of each operation and mode of a run."""
    sentences = []
    for timings in runs:
        for operation, (title, _) in OPERATIONS.items():
            for mode, (_, group) in _largest(timings, operation).items():
                ours = next(timing for timing in group if timing.is_ours)
                peers = sorted((t for t in group if t.is_peer), key=lambda timing: timing.p50)
                if not peers:
                    continue
                ratio = peers[0].p50 / ours.p50
                sentences.append(
                    Markup(
                        "{}, {}, {}, on {}: {} with {}; the fastest peer, {}, takes {}, {}."
                    ).format(
                        Markup("<b>{}</b>").format(title),
                        _written(ours.shape),
                        mode,
                        ours.device,
                        seconds(ours.p50),
                        ours.provider,
                        peers[0].provider,
                        seconds(peers[0].p50),
                        f"{ratio:.2f} times as long" if ratio >= 1 else f"only {ratio:.2f} of that",
                    )
                )
    return bullets(sentences)


def _run_blocks(timings: Sequence[Timing], prefix: str) -> list[Markup | Table | Figure]:
    reached = {t.provider: t.p50 for t in timings if t.operation == "ceiling"}
    stated = ", ".join(
        f"{name} {count(value)}{'B/s' if name == 'copy' else 'FLOP/s'}"
        for name, value in reached.items()
    )
    blocks: list[Markup | Table | Figure] = [
        paragraph("Ceilings measured in the same run: {}.", stated),
        _roofline(timings, reached, f"{prefix}-roofline"),
    ]
    for operation, (title, _) in OPERATIONS.items():
        groups = _groups(timings, operation)
        if not groups:
            continue
        blocks.append(Markup("<h3>{}</h3>").format(title))
        for number, mode in enumerate(dict.fromkeys(mode for mode, _ in groups)):
            own = {shape: group for (m, shape), group in groups.items() if m == mode}
            blocks.append(_figure(title, mode, own, f"{prefix}-{operation}-{number}"))
        blocks.append(_table(operation, groups, f"{prefix}-{operation}-table"))
    return blocks


def _figure(title: str, mode: str, by_shape: dict[str, list[Timing]], name: str) -> Figure:
    panels = [_against_size(mode, by_shape, f"{name}-size")]
    panels += [
        _ranking(f"{_written(shape)}, time", group, "p50", f"{name}-seconds-{index}")
        for index, (shape, group) in enumerate(by_shape.items())
    ]
    shape, group = list(by_shape.items())[-1]
    measured = [timing for timing in group if timing.peak_memory_bytes > 0]
    if measured:
        panels.append(
            _ranking(
                f"{_written(shape)}, peak memory", measured, "peak_memory_bytes", f"{name}-memory"
            )
        )
    return Figure(
        name,
        f"{title}, {mode}: seconds against size, then each size, fastest first (median; line: 20th "
        "to 80th percentile), and the peak of the memory above the inputs. All scales are "
        f"logarithmic. Filled: {OURS}'s own. Open: peers.",
        panels,
    )


def _against_size(mode: str, by_shape: dict[str, list[Timing]], name: str) -> Markup:
    timings = [timing for group in by_shape.values() for timing in group]
    leading = next(timing.provider for timing in timings if timing.is_ours)
    providers = dict.fromkeys(timing.provider for timing in timings)
    height = 230 + 17 * len(providers)
    panel = Panel(name, height, margins=(52, 12, 46, 50 + 17 * len(providers)))
    described = []
    for index, provider in enumerate(providers):
        points = {
            place: timing.p50
            for place, group in enumerate(by_shape.values())
            for timing in group
            if timing.provider == provider
        }
        ours = provider.startswith(OURS)
        panel.axes.plot(
            list(points),
            list(points.values()),
            color=ARM if ours else BASELINE,
            linewidth=2.2 if provider == leading else 1.1,
            alpha=1 if ours else 0.75,
            marker=MARKERS[index % len(MARKERS)],
            markersize=6,
            markerfacecolor=ARM if ours else PAPER,
            label=provider,
        )
        described.append(f"{provider}: {', '.join(seconds(value) for value in points.values())}")
    panel.axes.set_yscale("log")
    _label_ticks(panel.axes.yaxis, seconds)
    panel.axes.set_xticks(range(len(by_shape)), [_short(shape) for shape in by_shape])
    panel.axes.set_xlim(-0.25, len(by_shape) - 0.75)
    _legend_below(panel.axes, -0.2, -30 / 134)
    panel.labels("Against size", "", "seconds")
    return panel.svg(f"Seconds against size, {mode}", "; ".join(described) + ".")


def _ranking(title: str, group: Sequence[Timing], key: str, name: str) -> Markup:
    """Providers from the least to the most, each with its name and value above its mark."""
    ordered = sorted(group, key=lambda timing: getattr(timing, key))
    panel = Panel(name, 56 + LINE * len(ordered), margins=(6, 8, 26, 30))
    axes = panel.axes
    axes.set_xscale("log", base=10 if key == "p50" else 4)
    axes.set_ylim(len(ordered), 0)
    low, high = getattr(ordered[0], key), getattr(ordered[-1], key)
    axes.set_xlim(low / 1.6, high * 1.6)
    show = seconds if key == "p50" else mebibytes
    _label_ticks(axes.xaxis, show)
    for index, timing in enumerate(ordered):
        ours = timing.provider.startswith(OURS)
        text: dict[str, Any] = {
            "va": "center",
            "fontsize": 11,
            "transform": axes.get_yaxis_transform(),
        }
        weight = "bold" if ours else "normal"
        axes.text(0, index + 0.25, timing.provider, color=INK, weight=weight, **text)
        axes.text(1, index + 0.25, show(getattr(timing, key)), color=INK, ha="right", **text)
        if key == "p50":
            ends = [timing.p20, timing.p80]
            axes.plot(ends, [index + 0.7] * 2, color=ARM if ours else MUTED, linewidth=2)
        face = ARM if ours else PAPER
        edge = ARM if ours else BASELINE
        axes.plot(getattr(timing, key), index + 0.7, "o", markersize=7, mfc=face, mec=edge, mew=1.5)
        axes.axhline(index + 1, color=GRID, linewidth=0.8, zorder=0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    panel.labels(title, "", "")
    described = "; ".join(f"{timing.provider}: {show(getattr(timing, key))}" for timing in ordered)
    return panel.svg(title, f"{described}.")


def _roofline(timings: Sequence[Timing], reached: dict[str, float], name: str) -> Figure:
    """Operations a second against operations a byte, at the largest size of each operation."""
    points = []
    for operation, (title, _) in OPERATIONS.items():
        for mode, (shape, group) in _largest(timings, operation).items():
            ours = next(timing for timing in group if timing.is_ours)
            peer = min((t for t in group if t.is_peer), key=lambda t: t.p50, default=None)
            points.append((f"{title}, {mode}, {_written(shape)}", ours, peer))
    legend = 17 * len(points)
    panel = Panel(name, 350 + legend, width=620, margins=(58, 14, 46, 62 + legend))
    axes = panel.axes
    axes.set_xscale("log")
    axes.set_yscale("log")
    _label_ticks(axes.xaxis, lambda value: f"{value:,.0f}")
    _label_ticks(axes.yaxis, count)
    intensities = [ours.flops / ours.bytes for _, ours, _ in points]
    span = [min(intensities) / 3, max(intensities) * 3]
    steps = [span[0] * (span[1] / span[0]) ** (i / 100) for i in range(101)]
    for dtype, rate in reached.items():
        if dtype == "copy":
            continue
        roof = [min(rate, step * reached["copy"]) for step in steps]
        axes.plot(steps, roof, color=MUTED, linewidth=1.2, dashes=(4, 2.5))
        axes.text(span[1], rate, f"{dtype} ", color=MUTED, fontsize=11, ha="right", va="bottom")
    described = []
    for (label, ours, peer), intensity, marker in zip(
        points, intensities, MARKERS * len(points), strict=False
    ):
        achieved = ours.flops / ours.p50
        axes.plot(intensity, achieved, marker, color=ARM, markersize=8, label=label)
        described.append(f"{label}: {count(achieved)}FLOP/s")
        if peer is not None:
            rate = peer.flops / peer.p50
            axes.plot(intensity, rate, marker, mfc=PAPER, mec=BASELINE, mew=1.4, markersize=8)
    _legend_below(axes, -0.1, -48 / 242)
    axes.set_xlim(*span)
    panel.labels("Roofline", "operations a byte that must be moved", "operations a second")
    return Figure(
        name,
        "What is reached, against the measured ceilings (dashed) and the bandwidth of a copy. "
        f"Filled: {OURS}'s own. Open: the fastest peer. Every figure counts the operations that "
        "the task needs, so a kernel that multiplies in a smaller type can rise above a larger "
        "type's roof, and what a peer computes in vain does not count for it.",
        [panel.svg("Roofline", "; ".join(described) + ".")],
        wide=True,
    )


def _table(operation: str, groups: dict[tuple[str, str], list[Timing]], name: str) -> Table:
    title, leading = OPERATIONS[operation]
    rows: list[Row] = []
    for (_, shape), group in groups.items():
        ours = next(timing for timing in group if timing.is_ours)
        for index, timing in enumerate(sorted(group, key=lambda one: one.p50)):
            kind = " ".join(
                ["break"] * (index == 0 and bool(rows)) + ["baseline"] * (timing is ours)
            )
            floor, memory = timing.fraction_of_floor, timing.peak_memory_bytes
            rows.append(
                Row(
                    [
                        timing.provider,
                        timing.mode,
                        _written(shape),
                        timing.precisions or timing.dtype,
                        seconds(timing.p50),
                        f"{seconds(timing.p20)}–{seconds(timing.p80)}",
                        f"{timing.p50 / ours.p50:.2f}",
                        ABSENT if math.isnan(floor) else f"{100 * floor:.0f} %",
                        ABSENT if math.isnan(memory) else f"{memory / 2**20:,.1f}",
                    ],
                    kind,
                )
            )
    return Table(
        name,
        f"{title}: every provider, fastest first.",
        [
            Column("Provider", numeric=False),
            Column("Task", numeric=False),
            Column("Shape", numeric=False),
            Column("Type", numeric=False),
            Column("Median"),
            Column("20–80 %"),
            Column(f"Times {leading}"),
            Column("Of the floor"),
            Column("Memory, MiB"),
        ],
        rows,
        "Type: of the inputs, or how much of the work took which, where that depends on the data. "
        "Of the floor: the least time that the ceilings "
        "measured in the same run allow for the operations and bytes of the task, over the median. "
        "Memory: the peak above the inputs.",
    )


def _method() -> Section:
    return Section(
        "method",
        "How it was measured, and its limits",
        [
            bullets(
                [
                    "Before anything is timed, every provider's answer is compared with the "
                    "reference; one that differs gets no speed.",
                    "Providers take turns within one process, so that a change in the machine's "
                    "load meets them all. Medians, with the 20th and 80th percentiles.",
                    "A bare product computes the scores of one matrix and nothing of the ranks; "
                    "it is a yardstick, and no peer.",
                    "The machine is used as it was found. Ratios within one run mean more than "
                    "seconds.",
                ]
            )
        ],
    )


def _origin_table(runs: dict[str, list[Timing]]) -> Table:
    rows = []
    for run, timings in runs.items():
        for name in MACHINE:
            shown = ", ".join(dict.fromkeys(getattr(t, name) or "none" for t in timings))
            rows.append(Row([run, name.replace("_", " "), shown]))
    columns = [Column(name, numeric=False) for name in ("Device", "Entry", "Value")]
    return Table("origin-table", "Where the timings come from.", columns, rows)


def seconds(value: float) -> str:
    """With the unit that leaves one to three digits before the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB" if value < 2**30 else f"{value / 2**30:,.1f} GiB"


def _label_ticks(axis: Any, show: Callable[[float], str]) -> None:
    """Powers of ten as the page writes numbers; matplotlib would write them as formulas."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axis.set_minor_formatter(NullFormatter())


def _legend_below(axes: Any, x: float, y: float) -> None:
    """One entry a line, its upper left corner at (x, y) in parts of the axes."""
    axes.legend(
        frameon=False,
        labelcolor=INK,
        fontsize=10.5,
        loc="upper left",
        bbox_to_anchor=(x, y),
        borderaxespad=0,
        labelspacing=0.35,
    )


def _written(shape: str) -> str:
    return re.sub(r"\d{4,}", lambda found: f"{int(found[0]):,}", shape).replace("x", " × ")


def _short(shape: str) -> str:
    """The part of a shape that grows: its first number."""
    return _written(shape).split()[0]
