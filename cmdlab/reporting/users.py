"""The report's section on what a result means for a user: pictures looked at, a screen, time.

The form below the table is computed by `users.js` in the page, for the reader's own collection.
"""

import json
from pathlib import Path

import numpy as np
from markupsafe import Markup

from cmdlab.evaluation import SCREEN, Interval, compare
from cmdlab.reporting.numbers import number, signed
from cmdlab.reporting.page import Column, Row, Section, Table, paragraph
from cmdlab.reporting.study import Study, incomparable
from cmdlab.reporting.tables import arm_label, record_links, rivals_of

SECONDS = 1.0  # that a look at a picture takes; stated, not measured
SEARCHES = 100  # a day, that the form begins with
SCRIPT = (Path(__file__).parent / "users.js").read_text(encoding="utf-8")


def users_section(study: Study) -> Section:
    """R@12, the mean rank and the time saved a query, and the form."""
    text = paragraph(
        "Somebody says what they look for, and looks through the pictures in the order of the "
        "search until the right one comes; {} s a picture is stated, not measured. A screen "
        "shows {} of them. The time saved is against {}, in pairs of seeds and queries.",
        f"{SECONDS:g}",
        SCREEN,
        rivals_of(study),
    )
    return Section("users", "What it means for a user", [text, _table(study), _form(study)])


def _table(study: Study) -> Table:
    rows = []
    for arm in study.finished_arms:
        looked_at = study.interval(arm, "speech_to_image/mean_rank")
        rows.append(
            Row(
                [
                    arm_label(study, arm),
                    _cell(study.interval(arm, f"speech_to_image/R@{SCREEN}"), " %"),
                    _cell(looked_at),
                    f"{SECONDS * looked_at.mean:.1f} s",
                    _saved(study, arm),
                    record_links(study.of(arm)),
                ],
                "baseline" if arm == study.baseline else "",
            )
        )
    galleries = sorted({run.record["corpus"]["gallery"] for run in study.runs})
    leafing = " or ".join(number((gallery + 1) / 2) for gallery in galleries)
    return Table(
        "users-table",
        "What a user meets on the test gallery, mean over the seeds with the 95 % interval.",
        [
            Column("Arm", numeric=False),
            Column(f"On one screen of {SCREEN}"),
            Column("Pictures looked at"),
            Column("Time a query"),
            Column("Saved a query"),
            Column("Records", numeric=False),
        ],
        rows,
        f"Leafing through in no order takes {leafing} pictures. A tie counts as shown before the "
        "right one.",
    )


def _cell(found: Interval, unit: str = "") -> Markup:
    return Markup('{}{}<span class="interval">{} to {}</span>').format(
        number(found.mean), unit, number(found.low), number(found.high)
    )


def _saved(study: Study, arm: str) -> str:
    """Seconds that the arm's rival takes longer, on the seeds that both have."""
    rival = study.rival(arm)
    if rival is None or incomparable(pairs := study.paired(arm, rival)):
        return ""
    found = compare(
        [of.ranks for _, of in pairs], [own.ranks for own, _ in pairs], "speech_to_image/mean_rank"
    )
    mean, low, high = (signed(SECONDS * x) for x in (found.difference, found.low, found.high))
    return Markup('{} s<span class="interval">{} to {}</span>').format(mean, low, high)


def _form(study: Study) -> Markup:
    """Fields for the reader's own numbers. `users.js` fills the table from the ranks given along,
    for each arm pairs of pictures ahead of the right one and the queries with so many."""
    arms = [study.baseline]
    if study.best_on_validation is not None:
        arms.append(study.best_on_validation)
    given = []
    for arm in arms:
        runs = study.of(arm)
        ahead = np.concatenate([run.ranks.ranks("speech_to_image") - 1 for run in runs])
        places, queries = np.unique(ahead, return_counts=True)
        pairs = np.stack([places, queries], 1).tolist()
        given.append({"gallery": runs[0].record["corpus"]["gallery"], "ahead": pairs})
    fields = Markup("").join(
        Markup(
            '<label>{} <input name="{}" type="number" min="{}" max="{}" step="{}" value="{}" '
            "required></label>"
        ).format(*field)
        for field in (
            ("Pictures in the collection", "pictures", 2, 10**9, 1, given[0]["gallery"]),
            ("Searches a day", "searches", 0, 10**9, 1, SEARCHES),
            ("Seconds a picture", "seconds", 0.1, 60, 0.1, SECONDS),
        )
    )
    rows = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            name, Markup('<td class="number"><output>–</output></td>') * 4
        )
        for name in [*arms, "leafing through"]
    )
    return Markup(
        "<h3>With your own numbers</h3>"
        '<form id="users-form" data-screen="{}" data-arms="{}"><p class="fields">{}</p>'
        '<div class="scroll" role="region" tabindex="0" aria-label="With your own numbers"><table>'
        "<caption><span>The baseline, the best arm on the validation set, and no search.</span>"
        "</caption>"
        '<thead><tr><th scope="col">Way</th><th scope="col" class="number">On one screen of {}</th>'
        '<th scope="col" class="number">Pictures looked at</th>'
        '<th scope="col" class="number">Time a query</th>'
        '<th scope="col" class="number">Hours a day</th></tr></thead>'
        "<tbody>{}</tbody></table></div></form>"
        '<p class="note">Computed in this page, and sent nowhere. It takes your pictures to be '
        "like those of the test gallery: each of them comes before the right one as often as one "
        "of the gallery does. A collection of other pictures, or other speakers, will differ."
        "</p>"
    ).format(SCREEN, json.dumps(given, separators=(",", ":")), fields, SCREEN, rows)
