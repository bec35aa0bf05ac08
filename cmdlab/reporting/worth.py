"""The sheet that says what a search is worth: one page, drawn from figures that are handed over."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from cmdlab.reporting.numbers import ABSENT, duration, number
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
from cmdlab.reporting.panels import ARM, BASELINE, Panel

SEARCHES = (100, 1_000, 10_000)  # of which the cost of training is shared out


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Worth:
    """What was found of some queries by their users' own measure.

    found: share of the queries, 0 to 1, by how many pictures are looked at; `screen` is among
    those. looked_at: pictures a query, the right one among them. leafed_through: the same without a
    search, in no order. ranks: of all queries, ascending, infinity where nothing was found.
    """

    source: str
    queries: int
    pictures: int
    gallery: int
    not_found: int
    screen: int
    found: dict[int, Estimate]
    looked_at: Estimate
    median_rank: float
    leafed_through: float
    seconds_per_picture: float
    seconds_searching: Estimate
    seconds_saved: Estimate
    ranks: Sequence[float]


def draw_worth(worth: Worth, output: Path, *, price: float | None, currency: str) -> None:
    """Draw the sheet and put it in place of `output`. price: of an hour of training on one GPU.

    The same figures give the same bytes.
    """
    sections = [
        Section("found", "What was found", [_claim(worth), _found_table(worth)]),
        Section("looked", "Pictures looked at", [_looked(worth), _curve(worth)]),
        Section("time", "Time", [_time_table(worth)]),
    ]
    if price is not None:
        sections.append(
            Section("cost", "Cost", [_cost(price, currency), _cost_table(worth, price, currency)])
        )
    sections.append(Section("limits", "Limits", [_limits(worth)]))
    write_page(
        output,
        title="What the search is worth",
        kicker="Speak, and find the picture",
        lead=f"{worth.source}, among {worth.gallery:,} pictures",
        sections=sections,
        footer="Drawn by cmdlab worth. The page holds no script and makes no request.",
    )


def _claim(worth: Worth) -> Markup:
    screen, saved = worth.found[worth.screen], worth.seconds_saved
    if saved.low > 0:
        time = f"saves {duration(saved.mean)} a picture ({_range(saved, duration)})"
    elif saved.high < 0:
        time = f"costs {duration(-saved.mean)} a picture more than it saves"
    else:
        time = "is not shown to save time"
    text = (
        f"Of {worth.queries:,} queries, {_percent(screen.mean)} ({_range(screen, _percent)}) find "
        f"their picture on one screen of {worth.screen}. Against leafing through at "
        f"{worth.seconds_per_picture:g} s a picture the search {time}."
    )
    return Markup('<p class="claim">{}</p>').format(text)


def _found_table(worth: Worth) -> Table:
    rows = []
    for k, share in sorted(worth.found.items()):
        label = (
            f"one screen of {k}"
            if k == worth.screen
            else f"the first {k}"
            if k > 1
            else "the first"
        )
        chance = min(1.0, k / worth.gallery)
        rows.append(Row([label, _cell(share, _percent), _percent(chance)]))
    return Table(
        "found-table",
        "Queries whose picture is among the first shown (R@K), with the 95 % interval.",
        [Column("Found within"), Column("of the queries"), Column("by chance")],
        rows,
        f"{worth.queries:,} queries of {worth.pictures:,} different pictures; the intervals are of "
        "a bootstrap of pictures with all their queries. Pictures that score the same as the right "
        "one count as shown before it.",
    )


def _looked(worth: Worth) -> Markup:
    if math.isfinite(worth.median_rank):
        half = f"half of the queries have theirs by place {worth.median_rank:,.0f}"
    else:
        half = "half of the queries do not find theirs"
    return paragraph(
        "With the search {} pictures are looked at on average until the right one ({}); {}. "
        "Leafing through in no order takes {} on average.",
        number(worth.looked_at.mean),
        _range(worth.looked_at, number),
        half,
        number(worth.leafed_through),
    )


def _curve(worth: Worth) -> Figure:
    steps = sorted({*_places(worth.gallery), worth.screen})
    shares = [100 * sum(rank <= k for rank in worth.ranks) / worth.queries for k in steps]
    panel = Panel("curve", 250)
    panel.line(steps, shares, colour=ARM, label="by the search")
    chance = [100 * min(1.0, k / worth.gallery) for k in steps]
    panel.line(steps, chance, colour=BASELINE, dashed=True, label="in no order")
    panel.axes.set_xscale("log")
    panel.axes.set_xlim(1, max(steps))
    panel.axes.set_ylim(0, 102)
    panel.axes.set_xticks(ticks := [k for k in (1, 10, 100, 1_000, 10_000) if k <= max(steps)])
    panel.axes.set_xticklabels([f"{k:,}" for k in ticks])
    panel.axes.minorticks_off()
    panel.legend()
    panel.labels("Found so far", "pictures looked at", "queries, %")
    told = ", ".join(f"{share:.0f} % within {k:,}" for k, share in zip(steps, shares, strict=True))
    return Figure(
        "curve-figure",
        "Share of the queries whose picture has been seen after so many pictures.",
        [panel.svg("Queries found by pictures looked at", f"{told}.")],
    )


def _places(gallery: int) -> list[int]:
    """About ten places a decade, up to the gallery's size."""
    return sorted({min(gallery, round(10 ** (i / 10))) for i in range(10 * len(str(gallery)) + 1)})


def _time_table(worth: Worth) -> Table:
    leafing = worth.leafed_through * worth.seconds_per_picture
    return Table(
        "time-table",
        f"Time to a picture, at {worth.seconds_per_picture:g} s for each that is looked at.",
        [Column("Way"), Column("mean"), Column("95 % interval")],
        [
            Row(["leafing through", duration(leafing), ""], "baseline"),
            Row(["speaking and looking", *_two(worth.seconds_searching)]),
            Row(["saved", *_two(worth.seconds_saved)]),
        ],
        "Speaking counts as long as the recording lasts. Where a picture was not found, all "
        "pictures count as looked at.",
    )


def _cost(price: float, currency: str) -> Markup:
    return paragraph(
        "An hour of training on one GPU costs {} at the price stated. Shared out over the searches "
        "made with what it trained:",
        f"{price:,.2f} {currency}",
    )


def _cost_table(worth: Worth, price: float, currency: str) -> Table:
    rows = []
    for searches in SEARCHES:
        hours = searches * worth.seconds_saved.mean / 3600
        shown = worth.seconds_saved.low > 0
        dear = f"{price / hours:,.2f}" if shown else ABSENT
        saved = f"{hours:,.1f} h" if shown else "not shown"
        rows.append(Row([f"{searches:,}", saved, f"{price / searches:,.4f}", dear]))
    return Table(
        "cost-table",
        f"The cost of one hour of training in {currency}, by how often it is made use of.",
        [
            Column("Searches"),
            Column("time saved"),
            Column("a search"),
            Column("an hour saved"),
        ],
        rows,
        "Time counts as saved where its interval leaves out zero.",
    )


def _limits(worth: Worth) -> Markup:
    return bullets(
        [
            f"It holds for a collection of {worth.gallery:,} pictures: in a larger one more "
            "pictures compete, and leafing through takes longer.",
            "Pairs that the model was trained with are found more easily than new ones.",
            "People who know the picture describe it better than people who look for one like it.",
            "What was said on the page is what somebody cared to say: searches that were given up "
            "without a word are not in it.",
            *[f"{n:,} queries were said to have found nothing." for n in [worth.not_found] if n],
            "The time of a look at a picture is stated by the user of this sheet, not measured.",
        ]
    )


def _cell(estimate: Estimate, show: Callable[[float], str]) -> Markup:
    return Markup('{}<span class="interval">{}</span>').format(
        show(estimate.mean),
        _range(estimate, show),
    )


def _two(estimate: Estimate) -> tuple[str, str]:
    return _signed(estimate.mean), _range(estimate, _signed)


def _range(estimate: Estimate, show: Callable[[float], str]) -> str:
    return f"{show(estimate.low)} to {show(estimate.high)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _signed(seconds: float) -> str:
    """A duration that may be below zero, with the typographic minus."""
    return f"−{duration(-seconds)}" if seconds < 0 else duration(seconds)
