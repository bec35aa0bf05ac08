"""One cell of a sweep: run once, whatever happens, into a folder that holds its record."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cmdlab.errors import InputError
from cmdlab.records import (
    SCHEMA,
    gpu_names,
    read_record,
    read_result,
    source_sha256,
    write_record,
)
from cmdlab.sweeps.files import Cell
from cmdlab.sweeps.notebooks import NotebookError, Stopped, execute, read_notebook


@dataclass(frozen=True)
class Outcome:
    """How a cell ended; "resumed" when another sweep had run it. `error` says why it failed."""

    status: Literal["ok", "failed", "resumed"]
    error: str = ""


def run_cell(
    cell: Cell,
    runs: Path,
    provenance: Mapping[str, Any],
    environment: Mapping[str, str],
    stop: threading.Event | None = None,
) -> Outcome:
    """Run one cell into `runs`/<id>/, unless it has been run meanwhile.

    `provenance` is what `collect_provenance` gives on this machine; `environment` says in
    CUDA_VISIBLE_DEVICES which GPU the cell sees, where this process does not see that one alone.
    The run is written under a temporary name; record.json comes last, then the folder is renamed.
    A run counts as "ok" only if papermill succeeded and the notebook left a valid result.json.
    Raises InputError when the source is no longer the one in the cell's id, Stopped when stopped.
    """
    stop = stop or threading.Event()
    with _claim(runs, cell.id, stop):
        if is_done(runs, cell.id):
            return Outcome("resumed")
        if (
            source_sha256() != cell.source_sha256
            or read_notebook(cell.notebook).sha256 != cell.notebook_sha256
        ):
            raise InputError(
                f"{cell.notebook}: this notebook or the library has changed since the sweep "
                f"started, or is another one on {socket.gethostname()}; give all machines the same "
                "and start the sweep again"
            )
        for left in runs.glob(f".running-{cell.id}-*"):  # by a node that died
            shutil.rmtree(left, ignore_errors=True)
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
    error = " ".join(f"{record['error']['type']}: {record['error']['message']}".split())
    return Outcome("failed", f"{error[:300]} (see {runs / cell.id})")


def is_done(runs: Path, cell_id: str) -> bool:
    """Whether `runs` holds a valid record of this cell with status "ok"."""
    try:
        record = read_record(runs / cell_id)
    except InputError:  # missing or damaged: it is run again
        return False
    return record["status"] == "ok" and record["id"] == cell_id


def remove_stale(runs: Path) -> None:
    """Remove what killed sweeps have left: temporary folders whose cell nobody holds."""
    for folder in runs.glob(".running-*"):
        with _lock_file(runs, folder.name.split("-")[1]) as lock:
            if _take(lock):
                shutil.rmtree(folder, ignore_errors=True)


# The number of threads changes the order of sums, and so low bits of results. It is therefore the
# same on every machine and for every number of workers.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


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
        variables = ONE_THREAD | dict(environment)
        execute(cell.notebook, parameters, folder, environment=variables, stop=stop)
        result = {"status": "ok", **read_result(folder / "result.json")}
    except NotebookError as error:
        result = _failure(error.kind, error.message, error.traceback)
    except InputError as error:
        result = _failure("InputError", str(error), traceback.format_exc())
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
            "gpu": _gpu(os.environ | dict(environment), provenance["gpu"]),
            "source_sha256": cell.source_sha256,
            "notebook_sha256": cell.notebook_sha256,
            "started": started.isoformat(timespec="seconds"),
        },
        **result,
    }


def _gpu(environment: Mapping[str, str], first: str | None) -> str | None:
    """The model of the first GPU that the cell sees, where `first` is that of the machine's."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return first
    if visible in ("", "-1"):
        return None
    return gpu_names().get(visible.split(",")[0], first)


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
