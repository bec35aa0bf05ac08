"""The report's section on words that training never heard."""

import numpy as np
from markupsafe import Markup

from cmdlab.evaluation import compare_by_seed
from cmdlab.reporting.numbers import ABSENT, number, signed
from cmdlab.reporting.page import Column, Row, Section, Table, paragraph
from cmdlab.reporting.study import Run, Study
from cmdlab.reporting.tables import arm_label, record_links, rivals_of

KINDS = ("new", "known")


def words_section(study: Study) -> Section | None:
    """R@1 apart for captions with a word that was kept out of training; None where none was."""
    arms = {arm: [run for run in study.of(arm) if _words(run)] for arm in study.finished_arms}
    arms = {arm: runs for arm, runs in arms.items() if runs}
    if not arms:
        return None
    kept_out = sorted(
        {str(run.record["parameters"].get("without_words", "")) for run in study.runs}
    )
    text = paragraph(
        "Captions of the training split that hold one of these words were left out: {}. New: test "
        "captions that hold one; known: the others.",
        "; or ".join(words for words in kept_out if words),
    )
    rows = []
    for arm, runs in arms.items():
        cells: list[str] = [arm_label(study, arm)]
        for kind in KINDS:
            found = [_words(run)[kind] for run in runs]
            cells += [
                number(float(np.mean([one["R@1"] for one in found]))),
                _against(study, arm, kind),
                f"{found[0]['captions']:,}",
            ]
        rows.append(Row([*cells, record_links(runs)], "baseline" if arm == study.baseline else ""))
    table = Table(
        "words-table",
        "Speech → image R@1 on the test set, in percent, mean over the seeds.",
        [
            Column("Arm", numeric=False),
            *(
                Column(name, f"{kind} words".capitalize())
                for kind in KINDS
                for name in ("R@1", "difference", "captions")
            ),
            Column("Records", numeric=False),
        ],
        rows,
        f"Difference: minus {rivals_of(study)}. Below it its 95 % interval over seeds, on the very "
        "captions that were asked.",
    )
    return Section("words", "Words kept out of training", [text, table])


def _against(study: Study, arm: str, kind: str) -> str:
    rival = study.rival(arm)
    pairs = [
        (_words(own)[kind]["R@1"], _words(other)[kind]["R@1"])
        for own, other in (study.paired(arm, rival) if rival else [])
        if _words(own) and _words(other)
    ]
    if len(pairs) < 2:
        return ABSENT
    found = compare_by_seed(*zip(*pairs, strict=True))
    return Markup('{}<span class="interval">{} to {}</span>').format(
        signed(found.difference), signed(found.low), signed(found.high)
    )


def _words(run: Run) -> dict[str, dict[str, float]]:
    return run.record.get("new_words") or {}
