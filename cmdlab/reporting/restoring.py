"""The report's section on why: what restoring draws from the other side, and where it pulls."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from cmdlab.reporting.numbers import ABSENT
from cmdlab.reporting.page import Column, Row, Section, Table, paragraph
from cmdlab.reporting.study import Run, Study
from cmdlab.reporting.tables import arm_label, record_links


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
        own = np.array([_restoration(run)["own"] for run in runs])
        other = np.array([_restoration(run)["other"] for run in runs])
        cosines = [cosine for run in runs if (cosine := _cosines(run))]
        rows.append(
            Row(
                [
                    arm_label(study, arm),
                    *(_mean_and_range(values) for values in (own, other, other - own)),
                    _mean([one[0] for one in cosines]),
                    _mean([one[-1] for one in cosines]),
                    record_links(runs),
                ]
            )
        )
    losses, pull = "Restoration loss, validation", "Cosine of the gradients"
    return Table(
        "restoring-table",
        "What restoring draws from the other side, mean over the seeds.",
        [
            Column("Arm", numeric=False),
            Column("own context", group=losses),
            Column("another's", group=losses),
            Column("drawn", group=losses),
            Column("first", group=pull),
            Column("last", group=pull),
            Column("Records", numeric=False),
        ],
        rows,
        "Drawn: another's minus own. Below each loss the seeds' range. First and last: of the "
        "validations during training. Arms with another target or another loss have losses of "
        "another kind.",
    )


def _restoration(run: Run) -> dict[str, float]:
    return run.record.get("restoration") or {}


def _cosines(run: Run) -> list[float]:
    found = (point.get("gradient_cosine") for point in run.record["learning_curve"])
    return [cosine for cosine in found if cosine is not None]


def _mean(values: Sequence[float]) -> str:
    return _shown(float(np.mean(values)), 2) if values else ABSENT


def _mean_and_range(values: np.ndarray) -> Markup:
    mean, low, high = (_shown(float(one), 3) for one in (values.mean(), values.min(), values.max()))
    return Markup('{}<span class="interval">{}–{}</span>').format(mean, low, high)


def _shown(value: float, places: int) -> str:
    return f"{value:.{places}f}".replace("-", "−")
