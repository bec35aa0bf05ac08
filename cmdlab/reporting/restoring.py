"""The report's section on why: what restoring draws from the other side, and where it pulls."""

from collections.abc import Sequence

import numpy as np

from cmdlab.reporting.numbers import ABSENT
from cmdlab.reporting.page import Column, Row, Section, Table, paragraph
from cmdlab.reporting.study import Run, Study
from cmdlab.reporting.tables import arm_label, record_links, spread


def restoring_section(study: Study) -> Section | None:
    """Restoration by context and the cosine of the gradients, for the runs whose records hold them;
    None where no run's does."""
    arms = {arm: [run for run in study.of(arm) if _restoration(run)] for arm in study.finished_arms}
    arms = {arm: runs for arm, runs in arms.items() if runs}
    if not arms:
        return None
    text = paragraph(
        "The restoration loss on the validation set, with the own other side to attend to and, for "
        "the same trained denoiser and the same corrupted places, with another pair's. Where the "
        "loss hardly rises with another's, restoring draws nothing from the other side, and what "
        "an arm gains is no cross-modal denoising. The cosine is between the gradients of the two "
        "losses by the model's parameters, on a batch of training: above zero they pull the same "
        "way.",
    )
    heading = "What restoring draws from the other side"
    return Section("restoring", heading, [text, _table(study, arms)])


def _table(study: Study, arms: dict[str, list[Run]]) -> Table:
    rows = []
    for arm, runs in arms.items():
        losses = [one | {"drawn": one["other"] - one["own"]} for one in map(_restoration, runs)]
        cosines = [cosine for run in runs if (cosine := _cosines(run))]
        rows.append(
            Row(
                [
                    arm_label(study, arm),
                    *(spread(losses, name, _loss) for name in ("own", "other", "drawn")),
                    _mean([one[0] for one in cosines]),
                    _mean([one[-1] for one in cosines]),
                    record_links(runs),
                ]
            )
        )
    restored, pull = "Restoration loss, validation", "Cosine of the gradients"
    return Table(
        "restoring-table",
        "What restoring draws from the other side, mean over the seeds.",
        [
            Column("Arm", numeric=False),
            Column("own context", group=restored),
            Column("another's", group=restored),
            Column("drawn", group=restored),
            Column("first", group=pull),
            Column("last", group=pull),
            Column("Records", numeric=False),
        ],
        rows,
        "Drawn: another's minus own. Below each loss the range, where seeds differ. First and "
        "last: of the validations during training. Arms with another target or another loss have "
        "losses of another kind.",
    )


def _restoration(run: Run) -> dict[str, float]:
    return run.record.get("restoration") or {}


def _cosines(run: Run) -> list[float]:
    found = (point.get("gradient_cosine") for point in run.record["learning_curve"])
    return [cosine for cosine in found if cosine is not None]


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}".replace("-", "−") if values else ABSENT


def _loss(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")
