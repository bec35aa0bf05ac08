"""The report's section on comparisons of two arms that the sweep asks for, a family a table."""

import re
from collections.abc import Callable

from markupsafe import Markup

from cmdlab.evaluation import Comparison, compare, compare_by_seed, holm
from cmdlab.reporting.numbers import ABSENT, number, p_value, signed
from cmdlab.reporting.page import Column, Row, Section, Table, paragraph
from cmdlab.reporting.study import HEADLINE, Run, Study, incomparable
from cmdlab.reporting.tables import record_links

Pairs = list[tuple[Run, Run]]


def pairs_section(study: Study) -> Section | None:
    """None where the sweep asks for none."""
    if not study.pairs:
        return None
    text = paragraph(
        "The first arm minus the second, same seeds and same queries, by mean R@1 and, where it "
        "was measured, by the foil test: how often a caption scores higher with its image than its "
        "foil does. Holm's correction is over all tests of a family, of both measures together.",
    )
    tables = [_table(study, family) for family in study.pairs]
    return Section("pairs", "Comparisons asked for", [text, *tables])


def _table(study: Study, family: str) -> Table:
    asked = {pair: study.paired(*pair) for pair in study.pairs[family]}
    found: dict[tuple[tuple[str, str], str], Comparison] = {
        (pair, name): result
        for pair, runs in asked.items()
        if not incomparable(runs)
        for name, measure in MEASURES.items()
        if (result := measure(runs)) is not None
    }
    adjusted = holm([one.p_value for one in found.values()]) if found else []
    holms = dict(zip(found, adjusted, strict=True))
    rows = []
    for (arm, other), runs in asked.items():
        cells: list[str] = [f"{arm} minus {other}"]
        for name in MEASURES:
            key = ((arm, other), name)
            cells += _cells(found[key], holms[key]) if key in found else [ABSENT] * 4
        if reason := incomparable(runs):
            cells.append(f"not compared: {reason}")
        else:
            per_seed = map(signed, found[(arm, other), HEADLINE].per_seed)
            cells.append(record_links([run for run, _ in runs], per_seed))
        rows.append(Row(cells))
    return Table(
        f"pairs-{re.sub('[^a-z0-9]+', '-', family.lower())}-table",
        f"{family}: differences on the test set, in percentage points.",
        [
            Column("Pair", numeric=False),
            *(
                Column(label, heading)
                for heading in ("Mean R@1", "Foil test")
                for label in ("difference", "p", "p (Holm)", "detectable")
            ),
            Column("Mean R@1, each seed", numeric=False),
        ],
        rows,
        "The interval is below the difference and, as what is detectable in 80 % of the cases when "
        "tested alone, not adjusted. Mean R@1: seeds and images are both drawn again. Foil test: "
        "seeds alone, on the very foils that were measured, so a single seed gives none.",
    )


def _cells(found: Comparison, adjusted: float) -> list[str]:
    difference = Markup('{}<span class="interval">{} to {}</span>').format(
        signed(found.difference), signed(found.low), signed(found.high)
    )
    return [difference, p_value(found.p_value), p_value(adjusted), number(found.detectable)]


def _by_recall(runs: Pairs) -> Comparison:
    return compare([own.ranks for own, _ in runs], [other.ranks for _, other in runs], HEADLINE)


def _by_foils(runs: Pairs) -> Comparison | None:
    if len(runs) < 2 or any(_foil(run) is None for pair in runs for run in pair):
        return None
    own, other = ([_share_won(pair[side]) for pair in runs] for side in (0, 1))
    return compare_by_seed(own, other)


MEASURES: dict[str, Callable[[Pairs], Comparison | None]] = {
    HEADLINE: _by_recall,
    "foil": _by_foils,
}


def _foil(run: Run) -> dict[str, int] | None:
    return (run.record["alignment"] or {}).get("foil")


def _share_won(run: Run) -> float:
    """Foils that lose against their caption, in percent; a tie counts against the system."""
    foil = _foil(run)
    assert foil is not None
    return 100 * foil["wins"] / foil["pairs"]
