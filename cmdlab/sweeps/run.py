"""Sweeps: every cell of a sweep file is run once, whatever happens, and leaves its record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cmdlab.errors import InputError
from cmdlab.records import read_record, write_listing
from cmdlab.sweeps.cells import is_done, remove_stale
from cmdlab.sweeps.engines import Engine, LocalEngine
from cmdlab.sweeps.files import read_sweep


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep did: `done` cells ran now, `resumed` ones had run before, `failed` ones failed.

    `listing` is the file that `cmdlab.records.records.load_records` takes.
    """

    name: str
    listing: Path
    done: int
    resumed: int
    failed: int

    def refuse_failures(self) -> None:
        """Raises InputError, with the remedy, where any cell failed."""
        if self.failed:
            raise InputError(
                f"{self.listing}: {self.failed} runs failed; see record.json in their folders, "
                "mend the cause, and give the same command again"
            )


def run_sweep(
    file: Path,
    *,
    runs: Path,
    workers: int | None = None,
    smoke: bool = False,
    overrides: Mapping[str, Any] | None = None,
    engine: Callable[[Path, int | None], Engine] = LocalEngine,
) -> SweepSummary:
    """Run the cells of a sweep file that have no valid record with status "ok" in `runs` yet.

    A failed cell leaves its record, its executed notebook and its traceback; the sweep goes on.
    It is tried again by the next sweep, as are cells that a killed sweep was running. Two sweeps
    may share `runs`: a cell that the other one runs is waited for.
    `engine` says where cells run, as `choose_engine` gives it, and `workers` how many at once
    (default: what the engine finds). What cells need must be where they run.
    `smoke` sets the parameter `smoke` in every cell and keeps the first seed only; its listing is
    named NAME-smoke. `overrides` replace parameters of every cell.
    Raises InputError for a sweep file that cannot be run, or when the source changes meanwhile.
    """
    runs = Path(runs)
    listing, cells = read_sweep(Path(file), smoke=smoke, overrides=overrides)
    (runs / "sweeps").mkdir(parents=True, exist_ok=True)
    remove_stale(runs)
    path = runs / "sweeps" / f"{listing['sweep']}.json"
    _write_listing(path, listing, runs)
    todo = [cell for cell in cells if not is_done(runs, cell.id)]
    counts = {"ok": 0, "failed": 0, "resumed": len(cells) - len(todo)}
    if todo:
        place = engine(runs, workers)
        try:
            with tqdm(
                total=len(cells), initial=counts["resumed"], desc=listing["sweep"], unit="cell"
            ) as bar:
                running = {place.submit(cell): cell for cell in todo}
                while running:
                    finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                    for future in finished:
                        cell, outcome = running.pop(future), future.result()
                        counts[outcome.status] += 1
                        if outcome.status == "failed":
                            at = f"{cell.arm}, seed {cell.seed}"
                            bar.write(f"failed: {at}: {outcome.error}", file=sys.stderr)
                        _write_listing(path, listing, runs)
                        bar.set_postfix_str(cell.arm, refresh=False)
                        bar.update()
                    if sys.stderr.isatty():
                        bar.refresh()  # the time goes on between two cells
        finally:
            place.stop()
    return SweepSummary(listing["sweep"], path, counts["ok"], counts["resumed"], counts["failed"])


def _write_listing(path: Path, listing: dict[str, Any], runs: Path) -> None:
    """The listing with the status of each cell as its record now has it."""
    cells = []
    for cell in listing["cells"]:
        try:
            status = read_record(runs / cell["id"])["status"]
        except InputError:
            status = "missing"
        cells.append(cell | {"status": status})
    write_listing(path, listing | {"cells": cells})
