"""The report's section on comparisons of two arms that the sweep asks for, a family a table."""

import re
from collections.abc import Callable
from typing import NamedTuple

from markupsafe import Markup

from cmdlab.evaluation import Comparison, compare, compare_by_seed, holm
from cmdlab.reporting.figures import METRIC_NAMES, Difference, pairs_figure
from cmdlab.reporting.numbers import ABSENT, number, p_value, signed
from cmdlab.reporting.page import Column, Figure, Row, Section, Table, paragraph
from cmdlab.reporting.study import HEADLINE, Run, Study, incomparable
from cmdlab.reporting.tables import record_links

Pairs = list[tuple[Run, Run]]


class PairComparison(NamedTuple):
    """Two arms compared by one measure, and Holm's p over all tests of the family."""

    arm: str
    other: str
    measure: str  # HEADLINE or "foil"
    result: Comparison
    adjusted_p: float

    @property
    def separated(self) -> bool:
        return self.adjusted_p < 0.05


def compare_pairs(study: Study, family: str) -> list[PairComparison]:
    """All tests of a family that can be made, pair by pair."""
    found = [
        (arm, other, measure, result)
        for arm, other in study.pairs[family]
        if not incomparable(runs := study.paired(arm, other))
        for measure, compared in MEASURES.items()
        if (result := compared(runs)) is not None
    ]
    adjusted = holm([result.p_value for *_, result in found]) if found else []
    return [PairComparison(*one, p) for one, p in zip(found, adjusted, strict=True)]


def pairs_section(study: Study) -> Section | None:
    """None where the sweep asks for none."""
    if not study.pairs:
        return None
    text = paragraph(
        "The first arm minus the second, same seeds and same queries, by mean R@1 and, where it "
        "was measured, by the foil test: how often a caption scores higher with its image than its "
        "foil does. Holm's correction is over all tests of a family, of both measures together; "
        "the interval below a difference, and what is detectable in 80 % of the cases when tested "
        "alone, are not adjusted. For mean R@1 seeds and images are drawn again; for the foil test "
        "seeds alone, on the very foils that were measured, so that a single seed gives none.",
    )
    blocks: list[Markup | Figure | Table] = [text]
    for family, pairs in study.pairs.items():
        if any(other != study.baseline for _, other in pairs):  # else the figure above shows them
            blocks.append(_figure(study, family))
        blocks.append(_table(study, family))
    return Section("pairs", "Comparisons asked for", blocks)


def _figure(study: Study, family: str) -> Figure:
    rows: dict[str, list[Difference]] = {}
    for one in compare_pairs(study, family):
        title = METRIC_NAMES.get(one.measure, f"{one.measure} test")
        pair = f"{one.arm} minus {one.other}"
        rows.setdefault(title, []).append(
            Difference(pair, _label(one.arm, one.other), one.result, False, one.separated)
        )
    return pairs_figure(_name(family), family, rows)


def _label(arm: str, other: str) -> str:
    """What the names of both arms end with, after a comma: "5 dB" of "cmd, 5 dB"; else the pair."""
    own, others = (name.partition(", ")[2] for name in (arm, other))
    return own if own and own == others else f"{arm} − {other}"


def _name(family: str) -> str:
    return f"pairs-{re.sub('[^a-z0-9]+', '-', family.lower())}"


def _table(study: Study, family: str) -> Table:
    found = {(one.arm, one.other, one.measure): one for one in compare_pairs(study, family)}
    rows = []
    for arm, other in study.pairs[family]:
        cells: list[str] = [f"{arm} minus {other}"]
        for measure in MEASURES:
            one = found.get((arm, other, measure))
            cells += _cells(one) if one else [ABSENT] * 4
        runs = study.paired(arm, other)
        if reason := incomparable(runs):
            cells.append(f"not compared: {reason}")
        else:
            per_seed = map(signed, found[arm, other, HEADLINE].result.per_seed)
            cells.append(record_links([run for run, _ in runs], per_seed))
        rows.append(Row(cells))
    return Table(
        f"{_name(family)}-table",
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
    )


def _cells(one: PairComparison) -> list[str]:
    found = one.result
    difference = Markup('{}<span class="interval">{} to {}</span>').format(
        signed(found.difference), signed(found.low), signed(found.high)
    )
    return [
        difference,
        p_value(found.p_value),
        p_value(one.adjusted_p),
        number(found.detectable),
    ]


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
