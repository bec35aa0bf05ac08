"""Keeps the records of a study small enough to be published, and draws its report from them."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cmdlab.errors import InputError
from cmdlab.records import load_records, write_listing
from cmdlab.reporting.ablation import write_report
from cmdlab.reporting.study import read_study
from cmdlab.reporting.summary import write_summary


def publish(runs: Sequence[Path], folder: Path, output: Path) -> None:
    """Copy into the new `folder` what a report needs, and draw `output` from the copy.

    Every record, its ranks and its voices are kept; models and executed notebooks are not; examples
    are kept of the two runs that the report shows. summary.md and summary.svg are for a README.
    Raises InputError where `folder` is there already.
    """
    if folder.exists():
        raise InputError(f"{folder}: is there already; name another folder or remove it")
    study, loaded = read_study(runs), load_records(runs)
    shown = study.of(study.best_on_validation or study.baseline)[:1]
    shown += [run for run in study.of(study.baseline) if shown and run.seed == shown[0].seed]
    with_examples = {run.id for run in shown}
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "sweeps").mkdir(parents=True)
    for listing in loaded.sweeps:
        write_listing(aside / "sweeps" / f"{listing['sweep']}.json", listing)
    for run in (*loaded.done, *loaded.failed):
        kept = aside / run.record["id"]
        kept.mkdir(exist_ok=True)
        names = ["record.json", "ranks.npz", "voices.npz"]
        if run.record["id"] in with_examples:
            names.append("examples.json")
            if (run.folder / "examples").is_dir():
                shutil.copytree(run.folder / "examples", kept / "examples", dirs_exist_ok=True)
        for name in names:
            if (run.folder / name).exists():
                shutil.copyfile(run.folder / name, kept / name)
    write_summary(read_study([aside]), aside)
    os.replace(aside, folder)
    write_report([folder], output)
