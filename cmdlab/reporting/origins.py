"""The tables that trace a report: provenance, parameters, all records, and the lost cells."""

from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from cmdlab.reporting.numbers import value_label
from cmdlab.reporting.page import Column, Row, Table
from cmdlab.reporting.study import Study
from cmdlab.reporting.tables import arm_label


def provenance_table(study: Study) -> Table:
    """What the records say of where they come from; more than one value is shown as such."""
    rows = []
    for name, read in PROVENANCE.items():
        values: dict[str, int] = {}
        for run in study.runs:
            value = read(run.record)
            text = "not recorded" if value is None else value_label(value)
            values[text] = values.get(text, 0) + 1
        many = len(values) > 1
        lines = [
            Markup("<div>{}{}</div>").format(_code(text), f" in {times} records" if many else "")
            for text, times in sorted(values.items())[:8]
        ]
        if len(values) > 8:
            lines.append(Markup("<div>and {} more, in the records</div>").format(len(values) - 8))
        rows.append(Row([name, Markup("").join(lines)]))
    return Table(
        "provenance-table",
        f"Where the {len(study.runs)} finished runs come from.",
        [Column("Entry", numeric=False), Column("Value", numeric=False)],
        rows,
    )


def parameters_table(study: Study) -> Table:
    """The parameters in which arms differ; the others go into the note."""
    names = sorted({name for own in study.parameters.values() for name in own})
    values = {
        name: [value_label(own.get(name)) for own in study.parameters.values()] for name in names
    }
    varied = [name for name in names if len(set(values[name])) > 1]
    rows = [
        Row([arm_label(study, arm), *(values[name][index] for name in varied)])
        for index, arm in enumerate(study.parameters)
    ]
    same = ", ".join(f"{name} = {values[name][0]}" for name in names if name not in varied)
    return Table(
        "parameters-table",
        "The parameters in which arms differ.",
        [Column(name.replace("_", " "), numeric=False) for name in ("Arm", *varied)],
        rows,
        f"The same in all arms: {same}." if same else "",
    )


def records_table(study: Study) -> Table:
    """The appendix that every table's ids lead to."""
    rows = []
    for arm in study.finished_arms:
        for run in study.of(arm):
            test, cost = run.record["metrics"]["test"], run.record["cost"]
            rows.append(
                Row(
                    [
                        _code(run.id),
                        run.arm,
                        str(run.seed),
                        f"{test['mean_R@1']:.2f}",
                        f"{test['speech_to_image']['R@1']:.2f}",
                        f"{test['image_to_speech']['R@1']:.2f}",
                        f"{run.record['metrics']['validation']['mean_R@1']:.2f}",
                        f"{cost['training_seconds']:,.0f}",
                        run.record["provenance"]["started"],
                        _code(str(run.record["provenance"]["git_sha"] or "none")[:10]),
                    ],
                    id=f"record-{run.id}",
                )
            )
    return Table(
        "records",
        "Every finished run. Its folder bears the id, and holds record.json and ranks.npz. S → I "
        "and I → S: R@1 of the two directions.",
        [
            Column("Id", numeric=False),
            Column("Arm", numeric=False),
            Column("Seed"),
            Column("mean R@1", group="Test, %"),
            Column("S → I", group="Test, %"),
            Column("I → S", group="Test, %"),
            Column("mean R@1", group="Validation, %"),
            Column("Training, s"),
            Column("Started", numeric=False),
            Column("Git SHA", numeric=False),
        ],
        rows,
    )


def lost_table(study: Study) -> Table:
    """The cells that failed or were never run."""
    return Table(
        "lost-cells",
        "Cells of the sweep without a result.",
        [
            Column(name, numeric=name == "Seed")
            for name in ("Arm", "Seed", "Status", "Reason", "Id")
        ],
        [
            Row([cell.arm, str(cell.seed), cell.status, cell.reason[:300], _code(cell.id)])
            for cell in study.lost
        ],
    )


PROVENANCE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "Command": lambda record: record["provenance"]["command"],
    "Git SHA": lambda record: record["provenance"]["git_sha"],
    "Hash of what was not committed": lambda record: (
        record["provenance"]["uncommitted_sha256"] or "nothing uncommitted"
    ),
    "Hash of the source": lambda record: record["provenance"]["source_sha256"],
    "Hash of the notebook": lambda record: record["provenance"]["notebook_sha256"],
    "Hash of the lock file": lambda record: record["provenance"]["lock_sha256"],
    "Corpus": lambda record: record["corpus"]["name"],
    "Hash of the corpus": lambda record: record["corpus"]["content_hash"],
    "Image encoder": lambda record: " ".join(record["encoders"]["image"].values()),
    "Speech encoder": lambda record: " ".join(record["encoders"]["speech"].values()),
    "Python": lambda record: record["provenance"]["python"],
    "torch": lambda record: record["provenance"]["torch"],
    "triton": lambda record: record["provenance"]["triton"],
    "CUDA": lambda record: record["provenance"]["cuda"],
    "GPU driver": lambda record: record["provenance"]["driver"],
    "GPU": lambda record: record["provenance"]["gpu"] or "none",
    "CPU": lambda record: f"{record['provenance']['cpu']}, {record['provenance']['cores']} cores",
    "Seeds": lambda record: record["seed"],
    "Threads": lambda record: record["determinism"]["threads"],
    "Deterministic algorithms": lambda record: record["determinism"]["deterministic_algorithms"],
}


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)
