"""Engines: the same records wherever a cell runs, a node lost in the middle, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from cmdlab.errors import InputError
from cmdlab.records.records import load_records
from cmdlab.sweeps.engines import choose_engine, run_on_node
from cmdlab.sweeps.files import read_sweep
from cmdlab.sweeps.run import run_sweep

RESULT = Path(__file__).with_name("result.json").read_text()  # of a cell that ran

PARAMETERS = """
seed: int = 0
smoke: bool = False
run_folder: str = ""
behaviour: str = "end"
"""
BODY = f"""
import json, os, pathlib, time
runs = pathlib.Path(run_folder).parent
with (runs / "log.txt").open("a") as file:
    file.write(json.dumps([behaviour, seed, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()]))
    file.write("\\n")
if behaviour == "raise":
    raise ValueError("the loss is not finite")
if behaviour == "compute":
    sum(range(10**15))
while behaviour == "wait" and not (runs / "go").exists():
    time.sleep(0.05)
result = json.loads({RESULT!r})
result["determinism"]["threads"] = int(os.environ["OMP_NUM_THREADS"])
result["metrics"]["test"]["mean_R@1"] = float(seed)
pathlib.Path(run_folder, "result.json").write_text(json.dumps(result))
"""


def write_sweep(folder: Path, *behaviours: str, seeds: tuple[int, ...] = (1,)) -> Path:
    tagged = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[tagged, nbformat.v4.new_code_cell(BODY)])
    nbformat.write(notebook, folder / "cell.ipynb")
    arms = {behaviour: {"behaviour": behaviour} for behaviour in behaviours}
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"notebook": "cell.ipynb", "seeds": list(seeds), "arms": arms}))
    return file


def log(runs: Path) -> list[list[Any]]:
    """What the cells wrote when they started: behaviour, seed, visible GPUs, process id."""
    path = runs / "log.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def await_that(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def records(runs: Path) -> list[dict[str, Any]]:
    """The records of a sweep without what time and the run's folder put into them."""
    loaded = load_records([runs / "sweeps" / "sweep.json"])
    assert not loaded.missing
    found = []
    for run in (*loaded.done, *loaded.failed):
        record = {key: value for key, value in run.record.items() if key != "wall_seconds"}
        record["provenance"] = {k: v for k, v in record["provenance"].items() if k != "started"}
        if run.record["status"] == "failed":
            record["error"] = {key: record["error"][key] for key in ("type", "message")}
        found.append(record)
    return found


def left_over(runs: Path) -> list[Path]:
    return [*runs.glob(".running-*"), *runs.glob(".jobs-*")]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rai", {}, r"'rai' is unknown \(did you mean 'ray'\?\); give one of local, ray, slurm"),
        ("local", {"address": "auto"}, "engine 'local' takes no address; leave it out"),
        ("ray", {"partition": "gpu"}, "engine 'ray' takes no partition"),
        ("slurm", {"address": "auto"}, "engine 'slurm' takes no address"),
    ],
)
def test_an_engine_that_is_not_there_and_an_option_of_another_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        choose_engine(name, **options)
    with pytest.raises(InputError, match=message):  # None is an option that was not given
        choose_engine(name, **options, workers=None, gpus_per_cell=None)


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    file = write_sweep(tmp_path, "end")
    with pytest.raises(InputError, match=rf"needs {package}; pip install cmdlab\[clusters\]"):
        run_sweep(file, runs=tmp_path / "runs", engine=choose_engine(name))


def test_a_node_that_does_not_share_the_folders_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [cell] = read_sweep(write_sweep(tmp_path, "end"))[1]
    runs = tmp_path / "runs"
    runs.mkdir()
    site = {"runs": runs, "folder": tmp_path, "provenance": {}, "environment": {}}
    answer = run_on_node(cell, site=site)
    assert isinstance(answer, InputError)
    assert f"{runs}: is another folder on" in str(answer)
    answer = run_on_node(cell, site=site | {"folder": tmp_path / "elsewhere"})
    assert isinstance(answer, InputError)
    assert "elsewhere: cannot be entered on" in str(answer)
    assert list(runs.iterdir()) == []


def test_submitit_runs_a_sweep_with_the_records_of_the_local_engine(tmp_path, capsys):
    pytest.importorskip("submitit")
    file = write_sweep(tmp_path, "end", "raise")
    here, jobs = tmp_path / "here", tmp_path / "jobs"
    engine = choose_engine("slurm", cluster="local", gpus_per_cell=0)
    summary = run_sweep(file, runs=jobs, workers=2, engine=engine)
    assert (summary.done, summary.resumed, summary.failed) == (1, 0, 1)
    assert "failed: raise, seed 1: ValueError: the loss is not finite" in capsys.readouterr().err
    run_sweep(file, runs=here, workers=2)
    assert {record["provenance"]["gpu"] for record in records(jobs)} == {None}
    assert [without_gpu(one) for one in records(jobs)] == [
        without_gpu(one) for one in records(here)
    ]
    assert sorted(line[:3] for line in log(jobs)) == [["end", 1, ""], ["raise", 1, ""]]
    assert left_over(jobs) == []
    again = run_sweep(write_sweep(tmp_path, "end"), runs=jobs, engine=engine)
    assert (again.done, again.resumed, again.failed) == (0, 1, 0)


def without_gpu(record: dict[str, Any]) -> dict[str, Any]:
    machine = ("gpu", "driver")
    kept = {key: value for key, value in record["provenance"].items() if key not in machine}
    return record | {"provenance": kept}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_that_slurm_ends_fails_its_cell_and_leaves_its_log(tmp_path, capsys, monkeypatch):
    submitit = pytest.importorskip("submitit")
    # How long a result may take to appear on a slow shared file system, in seconds.
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 1)
    file, runs = write_sweep(tmp_path, "wait", "end"), tmp_path / "runs"
    engine = choose_engine("slurm", cluster="local", gpus_per_cell=0)

    def end_the_waiting_job() -> None:
        await_that(lambda: any(line[0] == "wait" for line in log(runs)), "the cell did not start")
        [process] = [line[3] for line in log(runs) if line[0] == "wait"]
        os.kill(job_of(process), signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(end_the_waiting_job)
        summary = run_sweep(file, runs=runs, workers=2, engine=engine)
        ended.result()
    assert (summary.done, summary.failed) == (1, 1)
    [listed] = [line for line in capsys.readouterr().err.splitlines() if "failed: wait" in line]
    assert Path(listed.split("its job's log is ")[1]).exists()
    [missing] = load_records([summary.listing]).missing
    assert missing["arm"] == "wait"


def job_of(kernel: int) -> int:
    """The process of submitit that a kernel descends from: kernel, papermill, job."""
    process = kernel
    while b"submitit.core._submit" not in Path(f"/proc/{process}/cmdline").read_bytes():
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="Slurm is on this machine")
def test_what_slurm_cannot_give_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    file, runs = write_sweep(tmp_path, "end"), tmp_path / "runs"
    with pytest.raises(InputError, match=r"Slurm does not give 0\.5 GPUs"):
        run_sweep(file, runs=runs, engine=choose_engine("slurm", gpus_per_cell=0.5))
    with pytest.raises(InputError, match="srun and sbatch are not here"):
        run_sweep(file, runs=runs, engine=choose_engine("slurm"))

    for name in ("srun", "sbatch"):  # a Slurm that prints what it is asked for, and refuses it
        write_program(tmp_path / "bin" / name, 'grep partition "$1" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(InputError, match=r"Slurm refuses a job: .*--partition=dear; mend that"):
        run_sweep(file, runs=runs, engine=choose_engine("slurm", partition="dear"))
    assert left_over(runs) == []


def write_program(path: Path, line: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


NVIDIA_SMI = """
case "$1" in
*driver*) echo 999.99 ;;
*) echo "0, GPU of the node" ;;
esac
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Any]:
    """A Ray cluster of one node, whose `nvidia-smi` knows a GPU that this machine may not have."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("node")
    write_program(folder / "nvidia-smi", NVIDIA_SMI)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        add_node(cluster, num_gpus=1, no_monitor=True)
    yield cluster
    cluster.shutdown()


def add_node(cluster: Any, **settings: Any) -> Any:
    """Add a node of one core. On a busy machine Ray gives up starting one after 15 seconds."""
    settings |= {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    settings |= {"include_dashboard": False, "include_log_monitor": False}
    for left in (4, 3, 2, 1, 0):
        try:
            return cluster.add_node(**settings)
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise


@pytest.mark.xdist_group("ray")
def test_ray_leaves_the_records_of_the_local_engine_with_the_node_s_machine(tmp_path, cluster):
    file = write_sweep(tmp_path, "end", "raise")
    here, there = tmp_path / "here", tmp_path / "there"
    engine = choose_engine("ray", address=cluster.address, gpus_per_cell=0.5)
    summary = run_sweep(file, runs=there, engine=engine)
    assert (summary.done, summary.resumed, summary.failed) == (1, 0, 1)
    run_sweep(file, runs=here, workers=2)
    assert [without_gpu(one) for one in records(there)] == [
        without_gpu(one) for one in records(here)
    ]
    machines = {
        (record["provenance"]["gpu"], record["provenance"]["driver"]) for record in records(there)
    }
    assert machines == {("GPU of the node", "999.99")}
    # What failed was not tried again, and Ray says which GPU a cell has.
    assert sorted(line[:3] for line in log(there)) == [["end", 1, "0"], ["raise", 1, "0"]]
    engine = choose_engine("ray", address=cluster.address, gpus_per_cell=2)
    with pytest.raises(InputError, match="no node of the Ray cluster has 2 GPUs"):
        run_sweep(file, runs=there, engine=engine)


@pytest.mark.xdist_group("ray")
def test_a_cell_whose_node_dies_runs_again_on_another(tmp_path, cluster):
    file, runs = write_sweep(tmp_path, "wait", seeds=(1, 2)), tmp_path / "runs"
    doomed = add_node(cluster)

    def kill_a_node() -> None:
        try:
            await_that(lambda: len(log(runs)) == 2, "the two nodes did not start a cell each")
            kernels = [line[3] for line in log(runs)]
            cluster.remove_node(doomed, allow_graceful=False)
            await_that(lambda: len(alive(kernels)) == 1, "a kernel outlives its node")
        finally:
            (runs / "go").touch()

    engine = choose_engine("ray", address=cluster.address, gpus_per_cell=0)
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_a_node)
        summary = run_sweep(file, runs=runs, engine=engine)
        killed.result()
    assert (summary.done, summary.resumed, summary.failed) == (2, 0, 0)
    assert [record["status"] for record in records(runs)] == ["ok", "ok"]
    assert len(log(runs)) == 3  # one cell started twice
    assert left_over(runs) == []


def alive(processes: list[int]) -> list[int]:
    return [process for process in processes if Path(f"/proc/{process}").exists()]


@pytest.mark.xdist_group("ray")
def test_ctrl_c_stops_the_cells_of_a_ray_cluster(tmp_path, cluster):
    file, runs = write_sweep(tmp_path, "compute", seeds=(1, 2)), tmp_path / "runs"
    command = ["sweep", str(file), "--runs", str(runs), "--engine", "ray"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "cmdlab", *command, "--address", cluster.address],
        stderr=subprocess.PIPE,
        text=True,
    )
    await_that(lambda: len(log(runs)) == 1 or sweep.poll() is not None, "no cell started")
    sweep.send_signal(signal.SIGINT)
    _, errors = sweep.communicate(timeout=120)
    assert (sweep.returncode, "cmdlab: stopped" in errors) == (130, True), errors
    await_that(lambda: not alive([line[3] for line in log(runs)]), "a cell goes on")
    assert left_over(runs) == []
    assert len(load_records([runs / "sweeps" / "sweep.json"]).missing) == 2


def test_a_ray_cluster_that_is_not_there_is_refused(tmp_path):
    pytest.importorskip("ray")
    file = write_sweep(tmp_path, "end")
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = f"127.0.0.1:{server.getsockname()[1]}"
    for address in (free, "127.0.0.1:port", "nowhere"):
        with pytest.raises(InputError, match=f"Ray cluster {address}: cannot be joined"):
            run_sweep(file, runs=tmp_path / "runs", engine=choose_engine("ray", address=address))
