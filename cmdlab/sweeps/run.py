"""Sweeps: every cell of a sweep file is run once, whatever happens, and leaves its record."""

from __future__ import annotations

import fcntl
import os
import queue
import secrets
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from cmdlab.errors import InputError
from cmdlab.records import (
    SCHEMA,
    collect_provenance,
    gpu_names,
    read_record,
    read_result,
    source_sha256,
    write_listing,
    write_record,
)
from cmdlab.sweeps.files import Cell, read_sweep
from cmdlab.sweeps.notebooks import NotebookError, Stopped, execute, read_notebook


@dataclass(frozen=True)
class Outcome:
    """How a cell ended; "resumed" when another sweep had run it. `error` says why it failed."""

    status: Literal["ok", "failed", "resumed"]
    error: str = ""


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


class Engine(Protocol):
    """Where cells run. `submit` calls `run_cell` in some process; `stop` ends what is running."""

    def submit(self, cell: Cell) -> Future[Outcome]: ...

    def stop(self) -> None: ...


def run_sweep(
    file: Path,
    *,
    runs: Path,
    workers: int | None = None,
    smoke: bool = False,
    overrides: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
) -> SweepSummary:
    """Run the cells of a sweep file that have no valid record with status "ok" in `runs` yet.

    A failed cell leaves its record, its executed notebook and its traceback; the sweep goes on.
    It is tried again by the next sweep, as are cells that a killed sweep was running. Two sweeps
    may share `runs`: a cell that the other one runs is waited for.
    `workers` processes run cells (default: one for each GPU, else for each core).
    `smoke` sets the parameter `smoke` in every cell and keeps the first seed only; its listing is
    named NAME-smoke. `overrides` replace parameters of every cell.
    Raises InputError for a sweep file that cannot be run, or when the source changes meanwhile.
    """
    runs = Path(runs)
    listing, cells = read_sweep(Path(file), smoke=smoke, overrides=overrides)
    (runs / "sweeps").mkdir(parents=True, exist_ok=True)
    _remove_stale(runs)
    path = runs / "sweeps" / f"{listing['sweep']}.json"
    _write_listing(path, listing, runs)
    todo = [cell for cell in cells if not _is_done(runs, cell.id)]
    counts = {"ok": 0, "failed": 0, "resumed": len(cells) - len(todo)}
    engine = engine or LocalEngine(runs, min(workers or _default_workers(), len(todo) or 1))
    try:
        with tqdm(
            total=len(cells), initial=counts["resumed"], desc=listing["sweep"], unit="cell"
        ) as bar:
            running = {engine.submit(cell): cell for cell in todo}
            while running:
                finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    cell, outcome = running.pop(future), future.result()
                    counts[outcome.status] += 1
                    if outcome.status == "failed":
                        place = f"{cell.arm}, seed {cell.seed}"
                        line = f"failed: {place}: {outcome.error} (see {runs / cell.id})"
                        bar.write(line, file=sys.stderr)
                    _write_listing(path, listing, runs)
                    bar.set_postfix_str(cell.arm, refresh=False)
                    bar.update()
                if sys.stderr.isatty():
                    bar.refresh()  # the time goes on between two cells
    finally:
        engine.stop()
    return SweepSummary(listing["sweep"], path, counts["ok"], counts["resumed"], counts["failed"])


class LocalEngine:
    """Runs cells on this machine, `workers` at a time, and one on each GPU where there are any."""

    def __init__(self, runs: Path, workers: int) -> None:
        self._runs = runs
        self._provenance = collect_provenance()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers)
        self._places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        gpus = _visible_gpus()
        for worker in range(workers):
            place = {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}
            self._places.put(place | ONE_THREAD)

    def submit(self, cell: Cell) -> Future[Outcome]:
        return self._pool.submit(self._run, cell)

    def stop(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, cell: Cell) -> Outcome:
        place = self._places.get()
        try:
            return run_cell(cell, self._runs, self._provenance, place, self._stop)
        finally:
            self._places.put(place)


# The number of threads changes the order of sums, and so low bits of results. It is therefore the
# same on every machine and for every number of workers.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def run_cell(
    cell: Cell,
    runs: Path,
    provenance: Mapping[str, Any],
    environment: Mapping[str, str],
    stop: threading.Event | None = None,
) -> Outcome:
    """Run one cell into `runs`/<id>/, unless it has been run meanwhile.

    The run is written under a temporary name; record.json comes last, then the folder is renamed.
    A run counts as "ok" only if papermill succeeded and the notebook left a valid result.json.
    Raises InputError when the source is no longer the one in the cell's id, Stopped when stopped.
    """
    stop = stop or threading.Event()
    with _claim(runs, cell.id, stop):
        if _is_done(runs, cell.id):
            return Outcome("resumed")
        if (
            source_sha256() != cell.source_sha256
            or read_notebook(cell.notebook).sha256 != cell.notebook_sha256
        ):
            raise InputError(
                f"{cell.notebook}: this notebook or the library has changed since the sweep "
                "started; start the sweep again"
            )
        folder = runs / f".running-{cell.id}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            record = _run_into(folder, cell, provenance, environment, stop)
            write_record(folder, record)
            _publish(folder, runs / cell.id)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    if record["status"] == "ok":
        return Outcome("ok")
    error = record["error"]
    return Outcome("failed", " ".join(f"{error['type']}: {error['message']}".split())[:300])


def _run_into(
    folder: Path,
    cell: Cell,
    provenance: Mapping[str, Any],
    environment: Mapping[str, str],
    stop: threading.Event,
) -> dict[str, Any]:
    started, clock = datetime.now(UTC), time.monotonic()
    parameters = cell.parameters | {"run_folder": str(folder.absolute())}
    result: dict[str, Any]
    try:
        execute(cell.notebook, parameters, folder, environment=environment, stop=stop)
        result = {"status": "ok", **read_result(folder / "result.json")}
    except NotebookError as error:
        result = _failure(error.kind, error.message, error.traceback)
    except InputError as error:
        result = _failure("InputError", str(error), traceback.format_exc())
    gpu = gpu_names().get(environment.get("CUDA_VISIBLE_DEVICES", ""))
    return {
        "schema": SCHEMA,
        "id": cell.id,
        "sweep": cell.sweep,
        "arm": cell.arm,
        "seed": cell.seed,
        "parameters": cell.parameters,
        "wall_seconds": round(time.monotonic() - clock, 3),
        "provenance": {
            **provenance,
            "gpu": gpu or provenance["gpu"],
            "source_sha256": cell.source_sha256,
            "notebook_sha256": cell.notebook_sha256,
            "started": started.isoformat(timespec="seconds"),
        },
        **result,
    }


def _failure(kind: str, message: str, text: str) -> dict[str, Any]:
    return {"status": "failed", "error": {"type": kind, "message": message, "traceback": text}}


def _publish(folder: Path, target: Path) -> None:
    """Give a finished run its name, durably; an earlier failed run of this cell gives way."""
    (folder / "result.json").unlink(missing_ok=True)  # its content is in record.json
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    before = folder.with_name(f"{folder.name}-before")
    if target.exists():
        os.rename(target, before)
    os.rename(folder, target)
    parent = os.open(target.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def _claim(runs: Path, cell_id: str, stop: threading.Event) -> Iterator[None]:
    """Hold the cell's lock, so that nobody else runs it. The system frees it if this process dies.

    Raises Stopped when `stop` is set while another process holds it.
    """
    with _lock_file(runs, cell_id) as lock:
        while not _take(lock):
            if stop.wait(0.2):
                raise Stopped
        yield


def _lock_file(runs: Path, cell_id: str):
    # Lock files are never removed: a lock on a removed file would exclude nobody.
    (runs / ".locks").mkdir(exist_ok=True)
    return (runs / ".locks" / cell_id).open("w")


def _take(lock) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_stale(runs: Path) -> None:
    """Remove what killed sweeps have left: temporary folders whose cell nobody holds."""
    for folder in runs.glob(".running-*"):
        with _lock_file(runs, folder.name.split("-")[1]) as lock:
            if _take(lock):
                shutil.rmtree(folder, ignore_errors=True)


def _is_done(runs: Path, cell_id: str) -> bool:
    try:
        record = read_record(runs / cell_id)
    except InputError:  # missing or damaged: it is run again
        return False
    return record["status"] == "ok" and record["id"] == cell_id


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


def _default_workers() -> int:
    return len(_visible_gpus()) or len(os.sched_getaffinity(0))


def _visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu not in ("", "-1")]
    return list(gpu_names())
