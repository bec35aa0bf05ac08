"""Where the cells of a sweep run: on this machine, on a Ray cluster, or as Slurm jobs."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import queue
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from cmdlab.errors import InputError, nearest
from cmdlab.records import collect_provenance, gpu_names
from cmdlab.sweeps.cells import Outcome, run_cell
from cmdlab.sweeps.files import Cell
from cmdlab.sweeps.notebooks import Stopped


class Engine(Protocol):
    """Where cells run. `submit` has `run_cell` called in some process; `stop` ends what is running.

    A future raises InputError where the sweep cannot go on.
    """

    def submit(self, cell: Cell) -> Future[Outcome]: ...

    def stop(self) -> None: ...


def choose_engine(name: str, **options: Any) -> Callable[[Path, int | None], Engine]:
    """The engine "local", "ray" or "slurm" for `run_sweep`; an option that is None is not given.

    Raises InputError for another name and for an option that this engine does not take.
    """
    engines: dict[str, Callable[..., Engine]] = {
        "local": LocalEngine,
        "ray": RayEngine,
        "slurm": SlurmEngine,
    }
    if name not in engines:
        raise InputError(
            f"engine {name!r} is unknown{nearest(name, engines)}; give one of {', '.join(engines)}"
        )
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in inspect.signature(engines[name]).parameters:
            raise InputError(f"engine {name!r} takes no {option.replace('_', ' ')}; leave it out")
    return functools.partial(engines[name], **given)


class LocalEngine:
    """Runs cells on this machine, `workers` at a time, and one on each GPU where there are any."""

    def __init__(self, runs: Path, workers: int | None = None) -> None:
        gpus = _visible_gpus()
        workers = workers or len(gpus) or len(os.sched_getaffinity(0))
        self._runs = runs
        self._provenance = collect_provenance()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers)
        self._places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for worker in range(workers):
            place = {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}
            self._places.put(place)

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


def _visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu not in ("", "-1")]
    return list(gpu_names())


# A cluster's own scheduler chooses among the cells that it is given: so many at once, if not told.
AT_ONCE = 256


class RayEngine:
    """Runs each cell as a task of a Ray cluster, on one core and `gpus_per_cell` GPUs.

    `address` is the cluster's; None is that of RAY_ADDRESS, or the one that runs on this machine,
    or a new one of this machine alone. `gpus_per_cell` is one where the cluster has any; a fraction
    puts several cells on one GPU, whose memory they share. A cell whose node dies is started again
    on another, three times at most; one whose notebook fails is not.
    Raises InputError when there is no such cluster, or no node of it has so many GPUs.
    """

    def __init__(
        self,
        runs: Path,
        workers: int | None = None,
        *,
        address: str | None = None,
        gpus_per_cell: float | None = None,
    ) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self._ray = ray = _package("ray")
        address = address or os.environ.get("RAY_ADDRESS")
        try:
            _knock(address or "")
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # a node that is slow to start raises just that
            raise InputError(
                f"Ray cluster {address or 'of this machine'}: cannot be joined ({_line(error)}); "
                "start it with `ray start`, or mend --address"
            ) from error
        try:
            most = max(node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"])
            gpus = min(1.0, most) if gpus_per_cell is None else gpus_per_cell
            if gpus > most:
                raise InputError(
                    f"no node of the Ray cluster has {gpus:g} GPUs for a cell, the most is "
                    f"{most:g}; give fewer, or start such a node first"
                )
            if gpus > 1 and gpus != int(gpus):
                raise InputError(f"Ray does not give {gpus:g} GPUs; above 1 give a whole number")
            task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(run_on_node)
        except BaseException:
            ray.shutdown()
            raise
        self._start = functools.partial(task.remote, site=_site(runs, gpus))
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers or AT_ONCE)

    def submit(self, cell: Cell) -> Future[Outcome]:
        return self._pool.submit(self._run, cell)

    def stop(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._ray.shutdown()

    def _run(self, cell: Cell) -> Outcome:
        ray, task = self._ray, self._start(cell)
        while not ray.wait([task], timeout=0.5)[0]:
            if self._stop.is_set():
                ray.cancel(task)
                ray.wait([task], timeout=30)  # it removes what it has begun
                raise Stopped
        try:
            return _received(ray.get(task))
        except ray.exceptions.RayError as error:
            return Outcome("failed", f"no record is left: {_line(error)}")


def _knock(address: str) -> None:
    """Raise OSError or ValueError where nobody listens; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class SlurmEngine:
    """Runs each cell as a Slurm job, on one core and `gpus_per_cell` GPUs, by submitit.

    A job may take a day. All that `sbatch` reads from SBATCH_... variables goes before what is set
    here: SBATCH_TIMELIMIT, SBATCH_ACCOUNT, SBATCH_CONSTRAINT and the like. A job that Slurm ends
    fails its cell, which the next sweep tries again. `cluster` is submitit's name for where jobs
    go; "local" runs them on this machine.
    Raises InputError where Slurm is not, and for a fraction of a GPU, which Slurm does not give.
    """

    def __init__(
        self,
        runs: Path,
        workers: int | None = None,
        *,
        partition: str | None = None,
        gpus_per_cell: float = 1,
        cluster: str = "slurm",
    ) -> None:
        submitit = _package("submitit")
        if gpus_per_cell != int(gpus_per_cell):
            raise InputError(
                f"Slurm does not give {gpus_per_cell:g} GPUs; give a whole number, or take Ray"
            )
        if cluster == "slurm" and not (shutil.which("srun") and shutil.which("sbatch")):
            raise InputError("Slurm's srun and sbatch are not here; give the command on its nodes")
        self._lost = submitit.core.utils.UncompletedJobError
        # Of this user alone: submitit puts pickles there and reads them.
        self._folder = Path(tempfile.mkdtemp(prefix=".jobs-", dir=runs.absolute()))
        self._executor = submitit.AutoExecutor(self._folder, cluster=cluster)
        self._executor.update_parameters(
            name="cmdlab",
            timeout_min=24 * 60,
            cpus_per_task=1,
            gpus_per_node=int(gpus_per_cell) or None,
            slurm_partition=partition,
        )
        self._site = _site(runs, gpus_per_cell)
        self._keep_logs = False
        self._lock = threading.Lock()  # submitit is not made for threads
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers or AT_ONCE)

    def submit(self, cell: Cell) -> Future[Outcome]:
        return self._pool.submit(self._run, cell)

    def stop(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        if not self._keep_logs:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, cell: Cell) -> Outcome:
        job = self._submit(cell)
        while not self._has_ended(job):
            if self._stop.wait(1):
                job.cancel(check=False)
                raise Stopped
        try:
            return _received(job.result())
        except self._lost:
            self._keep_logs = True
            return Outcome("failed", f"no record is left: its job's log is {job.paths.stderr}")

    def _submit(self, cell: Cell) -> Any:
        with self._lock:
            if self._stop.is_set():
                raise Stopped
            try:
                return self._executor.submit(run_on_node, cell, site=self._site)
            except self._lost as error:
                raise InputError(f"Slurm refuses a job: {_line(error)}; mend that") from error

    def _has_ended(self, job: Any) -> bool:
        with self._lock:
            return bool(job.done())


def run_on_node(cell: Cell, *, site: Mapping[str, Any]) -> Outcome | InputError:
    """Run a cell on a node of a cluster, in a process of its own; `site` is what `_site` gives.

    An InputError is returned, since clusters wrap what is raised in errors of theirs.
    """
    runs, node = site["runs"], socket.gethostname()
    try:
        try:
            os.chdir(site["folder"])
        except OSError as error:
            raise InputError(
                f"{site['folder']}: cannot be entered on {node} ({error.strerror}); give the "
                "command in a folder that all nodes share"
            ) from error
        if not (runs / "sweeps" / f"{cell.sweep}.json").exists():
            raise InputError(
                f"{runs}: is another folder on {node} than where the sweep was started; name one "
                "that all nodes share"
            )
        return run_cell(cell, runs, collect_provenance() | site["provenance"], site["environment"])
    except InputError as error:
        return error


def _site(runs: Path, gpus: float) -> dict[str, Any]:
    """What all nodes are told: the folders that they share, and where the sweep comes from.

    The machine and the versions in a record are the node's, the rest is that of the sweep.
    """
    own = ("git_sha", "uncommitted_sha256", "lock_sha256", "command")
    provenance = collect_provenance()
    return {
        "runs": runs.absolute(),
        "folder": Path.cwd(),
        "provenance": {key: provenance[key] for key in own},
        # With GPUs the cluster says which; without, it leaves all of the node's in sight.
        "environment": {} if gpus else {"CUDA_VISIBLE_DEVICES": ""},
    }


def _received(answer: Outcome | InputError) -> Outcome:
    if isinstance(answer, InputError):
        raise answer
    return answer


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this engine needs {name}; pip install cmdlab[clusters]") from error


def _line(error: Exception) -> str:
    """What an error of a cluster says, in one line: that of its cause, if it wraps one."""
    cause = getattr(error, "cause", None) or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
