"""A report in a few lines for a README: the claim, a table in Markdown, and one figure."""

import re
from collections.abc import Sequence
from pathlib import Path

from cmdlab.outputs import write_file
from cmdlab.reporting.claim import claim
from cmdlab.reporting.figures import forest_panel
from cmdlab.reporting.numbers import number, signed
from cmdlab.reporting.panels import COLOURS, PAPER
from cmdlab.reporting.study import HEADLINE, ArmComparison, Study
from cmdlab.reporting.tables import DIRECTIONS

CEILINGS = {
    "text_ceiling": "*text instead of speech, same image encoder*",
    "ceiling": "*all-knowing system*",
}


def write_summary(study: Study, folder: Path) -> None:
    """Write `summary.md` and `summary.svg` of a study into its folder."""
    comparisons = study.comparisons()
    told = " ".join(str(claim(study, comparisons).striptags()).split())
    write_file(folder / "summary.md", f"{told}\n\n{_table(study, comparisons)}\n")
    write_file(folder / "summary.svg", _standalone(str(forest_panel(study, HEADLINE, comparisons))))


def _table(study: Study, comparisons: Sequence[ArmComparison]) -> str:
    found = {one.arm: one.result for one in comparisons}
    heads = [
        "arm",
        "mean R@1, %",
        *(f"{name.lower()} R@1" for name in DIRECTIONS.values()),
        f"minus {study.baseline} [95 %]",
        "seeds",
    ]
    rows = []
    for arm in study.finished_arms:
        values = [
            study.interval(arm, f"{one}R@1") for one in ("mean_", *(f"{d}/" for d in DIRECTIONS))
        ]
        result = found.get(arm)
        difference = (
            ""
            if result is None
            else (f"{signed(result.difference)} [{signed(result.low)}, {signed(result.high)}]")
        )
        rows.append([arm, *(number(v.mean) for v in values), difference, str(len(study.of(arm)))])
    record = study.of(study.baseline)[0].record
    for key, name in CEILINGS.items():
        if record[key]:
            both = [record[key][direction]["R@1"] for direction in DIRECTIONS]
            rows.append([name, number(sum(both) / 2), *map(number, both), "", ""])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines
    )


def _standalone(svg: str) -> str:
    """The element as a file of its own: in the page's light colours, on their background."""
    for colour, variable in COLOURS.items():
        svg = svg.replace(variable, colour)
    ground = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    svg = re.sub("<svg([^>]*)>", rf"<svg\1>{ground}", svg, count=1)
    return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + "\n"
