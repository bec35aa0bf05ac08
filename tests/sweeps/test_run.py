"""Sweeps: what makes another cell, what resumes, what fails, and what a killed sweep loses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import nbformat
import pytest
import yaml

from cmdlab.cli import main
from cmdlab.errors import InputError
from cmdlab.records.records import load_records
from cmdlab.sweeps.cells import run_cell
from cmdlab.sweeps.files import read_sweep
from cmdlab.sweeps.notebooks import NotebookError, read_notebook, run_notebook
from cmdlab.sweeps.run import run_sweep

RESULT = Path(__file__).with_name("result.json").read_text()  # of a cell that ran

PARAMETERS = """
from typing import Literal
seed: int = 0
smoke: bool = False
run_folder: str = ""
weight: float = 1.0
direction: Literal["speech", "image"] = "image"
depth: int | None = None
behaviour: str = "a=b"
"""
BODY = f"""
import json, os, pathlib, time
log = pathlib.Path(run_folder).parent / "log.txt"

def say(what):
    with log.open("a") as file:
        file.write(f"{{what}} {{weight}} {{seed}} {{os.environ['OMP_NUM_THREADS']}}\\n")

say("start")
if behaviour == "raise":
    raise ValueError("the loss is not finite")
if behaviour == "die":
    os._exit(3)
result = json.loads({RESULT!r})
result["metrics"]["test"]["mean_R@1"] = weight + seed
if behaviour != "silent":
    pathlib.Path(run_folder, "result.json").write_text(json.dumps(result))
time.sleep(0.2)
say("end")
"""


def write_notebook(path: Path, parameters: str = PARAMETERS, body: str = BODY) -> Path:
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_markdown_cell("# A cell"), tagged, nbformat.v4.new_code_cell(body)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def write_sweep(folder: Path, **plan) -> Path:
    if not (folder / "cell.ipynb").exists():
        write_notebook(folder / "cell.ipynb")
    file = folder / "sweep.yaml"
    content = {"notebook": "cell.ipynb", "seeds": [1], "arms": {"one": None}} | plan
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def ids(file: Path, **options) -> dict[tuple[str, int], str]:
    return {(cell.arm, cell.seed): cell.id for cell in read_sweep(file, **options)[1]}


def test_arms_axes_and_grid_make_the_cells_that_they_say(tmp_path):
    file = write_sweep(
        tmp_path,
        seeds=[3, 4],
        fixed={"direction": "speech"},
        arms={"none": {"weight": 0}, "cmd": {"depth": 2}},
        axes={"base": "cmd", "weight": [0.5, 1, 2], "depth": [1, None]},
        grid={"weight": [7, 8], "depth": [5, 6]},
    )
    listing, cells = read_sweep(file)
    points = {cell.arm: (cell.parameters["weight"], cell.parameters["depth"]) for cell in cells}
    assert points == {
        "none": (0.0, None),
        "cmd": (1.0, 2),
        "weight=7, depth=5": (7.0, 5),
        "weight=7, depth=6": (7.0, 6),
        "weight=8, depth=5": (8.0, 5),
        "weight=8, depth=6": (8.0, 6),
        "cmd, weight=0.5": (0.5, 2),
        "cmd, weight=2.0": (2.0, 2),
        "cmd, depth=1": (1.0, 1),
        "cmd, depth=None": (1.0, None),
    }
    assert [(cell.arm, cell.seed) for cell in cells[::10]] == [("none", 3), ("none", 4)]
    assert len({cell.id for cell in cells}) == len(cells) == 20
    assert all(cell.parameters["direction"] == "speech" for cell in cells)
    assert listing["axes"] == {
        "weight": [
            {"value": 0.5, "arm": "cmd, weight=0.5"},
            {"value": 1.0, "arm": "cmd"},
            {"value": 2.0, "arm": "cmd, weight=2.0"},
        ],
        "depth": [
            {"value": 2, "arm": "cmd"},
            {"value": 1, "arm": "cmd, depth=1"},
            {"value": None, "arm": "cmd, depth=None"},
        ],
    }
    smoke = read_sweep(file, smoke=True)[1]
    assert {(cell.seed, cell.parameters["smoke"]) for cell in smoke} == {(3, True)}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"arms": {"one": {"wieght": 1.0}}},
            r"no parameter 'wieght' \(did you mean 'weight'\?\); it has behaviour",
        ),
        ({"arms": {"one": {"weight": "1e-3"}}}, "write 1.0e-3"),
        ({"arms": {"one": {"weight": float("nan")}}}, "which JSON would change"),
        ({"arms": {"one": {"weight": True}}}, "wants float"),
        ({"arms": {"one": {"direction": "both"}}}, "wants Literal"),
        ({"arms": {"one": {"depth": 1.5}}}, r"wants int \| None"),
        ({"arms": {"one": {"seed": 5}}}, "'seed' is set by the sweep"),
        ({"arms": {"one": None, "two": {"weight": 1}}}, "arm 'two' is the same as 'one'"),
        ({"axes": {"base": "one", "seed": [1]}}, "axes: seed: is set by the sweep"),
        ({"axes": {"base": "two", "weight": [1]}}, "base is 'two'; name one of the arms"),
        ({"axes": {"base": "one", "weight": 2}}, "give a list of values"),
        ({"axes": {"base": "one", "weight": [2, 2.0]}}, "is the same as 'one, weight=2.0'"),
        ({"baseline": "two"}, "baseline 'two' is no arm; the arms are one"),
        ({"planned": ["two"]}, "give a list of arms"),
        ({"pairs": ["one"]}, r"pairs is \['one'\]; give it as a mapping"),
        ({"pairs": {"controls": ["one"]}}, r"pairs: controls holds 'one'; give a list of \[arm"),
        ({"pairs": {"controls": [["one", "one"]]}}, r"controls holds \['one', 'one'\]"),
        ({"pairs": {"controls": [["one", "two"]]}}, "pairs: controls: 'two' is no arm"),
        ({"ceilings": ["two"]}, r"ceilings is \['two'\]; give a list of arms"),
        ({"baseline": "one", "ceilings": ["one"]}, "ceilings: 'one' is the baseline"),
        ({"arm": {}}, "key 'arm' is unknown; the keys are notebook, title"),
        ({"arms": None, "grid": None}, "give it as a mapping"),
        ({"arms": {}}, "has no arms"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": [1.5]}, "whole numbers"),
        ({"seeds": [1, -1]}, r"seeds: seed: -1 is not within 0 to 2\*\*63 - 1"),
        ({"seeds": [2**63]}, "seeds: seed: 9223372036854775808 is not within"),
        ({"seeds": 3}, "list of different whole numbers"),
        ({"notebook": "other.ipynb"}, "is neither beside this file nor"),
        ({"fixed": ["weight"]}, "give it as a mapping"),
    ],
)
def test_a_sweep_file_that_cannot_be_run_is_refused(tmp_path, plan, message):
    with pytest.raises(InputError, match=message) as refusal:
        read_sweep(write_sweep(tmp_path, **plan))
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_a_key_given_twice_is_refused(tmp_path):
    file = write_sweep(tmp_path)
    file.write_text("notebook: cell.ipynb\nseeds: [1]\narms:\n  a: {weight: 1}\n  a: {weight: 2}\n")
    with pytest.raises(InputError, match="'a' is given twice"):
        read_sweep(file)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("weight: float = 1.0", "lacks 'seed'"),
        ("seed = 1 +", "line 1: invalid syntax"),
        ("seed = 1\nweight = 2 * seed", "line 2: 'weight' needs a plain value"),
        ("seed = 1\nprint(seed)", "line 2: only imports and"),
    ],
)
def test_a_parameters_cell_that_cannot_be_known_without_running_it_is_refused(
    tmp_path, parameters, message
):
    write_notebook(tmp_path / "cell.ipynb", parameters)
    with pytest.raises(InputError, match=message):
        read_sweep(write_sweep(tmp_path))


def test_what_makes_a_cell_another_cell(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "corpus.json").write_text(json.dumps({"name": "A", "content_hash": "0" * 64}))
    notebook = write_notebook(
        tmp_path / "cell.ipynb", PARAMETERS + f"corpus: str = {str(corpus)!r}\n"
    )
    file = write_sweep(tmp_path)
    [first] = ids(file).values()

    content = nbformat.read(notebook, as_version=4)
    content.metadata["kernelspec"] = {"name": "another", "display_name": "Another"}
    content.cells[2].execution_count = 7
    nbformat.write(content, notebook)
    assert ids(file) == {("one", 1): first}
    assert ids(write_sweep(tmp_path, arms={"renamed": {"weight": 1}})) == {("renamed", 1): first}

    others = {
        *ids(write_sweep(tmp_path, seeds=[2])).values(),
        *ids(write_sweep(tmp_path, fixed={"weight": 2.0})).values(),
        *ids(write_sweep(tmp_path), overrides={"weight": 3.0}).values(),
        *ids(write_sweep(tmp_path), smoke=True).values(),
    }
    (corpus / "corpus.json").write_text(json.dumps({"name": "A", "content_hash": "1" * 64}))
    others |= set(ids(file).values())
    content.cells[2].source += "\n# changed"
    nbformat.write(content, notebook)
    others |= set(ids(file).values())
    assert len(others | {first}) == 7

    (corpus / "corpus.json").unlink()
    corpus.rmdir()
    with pytest.raises(InputError, match="cmdlab corpus make"):
        read_sweep(file)


def test_other_weights_make_another_cell(tmp_path):
    write_notebook(tmp_path / "cell.ipynb", PARAMETERS + 'speech_weights: str = ""\n')
    weights = tmp_path / "weights.safetensors"
    file = write_sweep(tmp_path, fixed={"speech_weights": str(weights)})
    with pytest.raises(InputError, match=rf"{file}: speech_weights: {weights}: cannot be read"):
        read_sweep(file)
    found = []
    for content in (b"trained", b"trained on", b"trained"):
        weights.write_bytes(content)
        found.append(ids(file)["one", 1])
    assert found[0] == found[2] != found[1]
    assert ids(write_sweep(tmp_path))["one", 1] not in found


def test_a_parameter_of_the_command_line_replaces_that_of_every_cell(tmp_path, capsys):
    arms = {"shallow": {"depth": 1, "weight": 2}, "deep": {"depth": 2}}
    file, runs = write_sweep(tmp_path, arms=arms, seeds=[3]), tmp_path / "runs"
    command = ["sweep", str(file), "--runs", str(runs)]
    assert main([*command, "-p", "wieght=5"]) == 2
    assert "no parameter 'wieght' (did you mean 'weight'?)" in capsys.readouterr().err
    assert not runs.exists()
    assert main([*command, "-p", "weight=5", "-p", "direction=speech"]) == 0
    done = {run.record["arm"]: run.record for run in load_records([runs]).done}
    given = {
        (p["depth"], p["weight"], p["direction"])
        for p in (record["parameters"] for record in done.values())
    }
    assert given == {(1, 5.0, "speech"), (2, 5.0, "speech")}
    assert {one["metrics"]["test"]["mean_R@1"] for one in done.values()} == {8.0}  # 5 + seed


def test_a_sweep_goes_on_after_failures_and_resumes_what_ran(tmp_path, capsys):
    plan = {
        "arms": {
            "good": {"weight": 2},
            "raising": {"behaviour": "raise"},
            "dying": {"behaviour": "die"},
            "silent": {"behaviour": "silent"},
        }
    }
    file, runs = write_sweep(tmp_path, **plan), tmp_path / "{runs}"
    summary = run_sweep(file, runs=runs, workers=2)
    assert (summary.done, summary.resumed, summary.failed) == (1, 0, 3)
    errors = capsys.readouterr().err
    assert "failed: raising, seed 1: ValueError: the loss is not finite" in errors
    assert "4/4" in errors

    loaded = load_records([summary.listing])
    [good] = loaded.done
    assert good.record["metrics"]["test"]["mean_R@1"] == 3.0
    assert good.record["parameters"]["behaviour"] == "a=b"
    assert sorted(path.name for path in good.folder.iterdir()) == ["notebook.ipynb", "record.json"]
    failed = {run.record["arm"]: run for run in loaded.failed}
    assert failed["raising"].record["error"]["type"] == "ValueError"
    assert "ValueError: the loss is not finite" in failed["raising"].record["error"]["traceback"]
    assert failed["dying"].record["error"]["type"] == "DeadKernelError"
    assert "result.json: there is no such file" in failed["silent"].record["error"]["message"]
    executed = nbformat.read(failed["raising"].folder / "notebook.ipynb", as_version=4)
    assert any("ValueError" in str(cell.get("outputs")) for cell in executed.cells)
    listed = json.loads(summary.listing.read_text())
    assert [cell["status"] for cell in listed["cells"]] == ["ok", "failed", "failed", "failed"]

    log = runs / "log.txt"
    assert all(line.endswith(" 1") for line in log.read_text().splitlines())  # one thread each
    log.unlink()
    del plan["arms"]["dying"], plan["arms"]["silent"]
    again = run_sweep(write_sweep(tmp_path, **plan), runs=runs, workers=1)
    assert (again.done, again.resumed, again.failed) == (0, 1, 1)
    assert log.read_text().split() == ["start", "1.0", "1", "1"]  # the failed cell only

    (good.folder / "record.json").write_text("{")
    log.unlink()
    del plan["arms"]["raising"]
    last = run_sweep(write_sweep(tmp_path, **plan), runs=runs, workers=1)
    assert (last.done, last.resumed, last.failed) == (1, 0, 0)  # a damaged record is no record
    assert not list(runs.glob(".running-*"))


def test_a_cell_does_not_run_with_another_source_than_its_id_says(tmp_path):
    [cell] = read_sweep(write_sweep(tmp_path))[1]
    write_notebook(tmp_path / "cell.ipynb", body="print('edited meanwhile')")
    with pytest.raises(InputError, match="has changed since the sweep started"):
        run_cell(cell, tmp_path, {}, {})
    assert not list(tmp_path.glob("*/record.json"))


def test_run_notebook_refuses_unknown_parameters_and_raises_what_the_notebook_raised(tmp_path):
    body = "assert not smoke, f'depth {depth}'"
    notebook = write_notebook(tmp_path / "cell.ipynb", body=body)
    output = tmp_path / "deep" / "executed.ipynb"
    with pytest.raises(InputError, match="no parameter 'smoky'"):
        run_notebook(notebook, {"smoky": True}, output)
    assert not output.exists()
    with pytest.raises(NotebookError, match="AssertionError: depth 3"):
        run_notebook(notebook, {"smoke": True, "depth": 3}, output)
    assert "AssertionError" in output.read_text()
    assert [path.name for path in output.parent.iterdir()] == ["executed.ipynb"]


ODD = """
seed: int = 1
smoke: bool = False
run_folder: str = ""
names = {1: "one"}
sizes: tuple = (1, 2)
table: dict = {"a": 1}
"""
ODD_BODY = f"""
import json, pathlib
assert (names, sizes) == ({{1: "one"}}, (1, 2)), (names, sizes)
pathlib.Path(run_folder, "table.json").write_text(json.dumps(table))
pathlib.Path(run_folder, "result.json").write_text({RESULT!r})
"""


def test_defaults_that_json_cannot_hold_reach_the_notebook_as_they_are(tmp_path):
    notebook = write_notebook(tmp_path / "cell.ipynb", ODD, ODD_BODY)
    given = {"b": [1, None, {"c": "ü"}]}
    file, runs = write_sweep(tmp_path, fixed={"table": given}), tmp_path / "runs"
    [cell] = read_sweep(file)[1]
    assert run_sweep(file, runs=runs).done == 1
    assert json.loads((runs / cell.id / "table.json").read_text()) == given
    record = load_records([runs]).done[0].record
    assert record["parameters"]["table"] == given
    assert record["parameters"]["names"] == "{1: 'one'}"
    assert record["parameters"]["sizes"] == "(1, 2)"
    write_notebook(notebook, ODD.replace('"one"', '"ein"'), ODD_BODY)
    assert read_sweep(file)[1][0].id != cell.id


@pytest.mark.parametrize(
    "value",
    [
        {1: "two"},
        {"deep": [{2.5: 0}]},
        {"deep": (1, 2)},
        {"x": float("nan")},
        {"x": {1}},
        {None: 1},
    ],
    ids=repr,
)
def test_a_value_that_json_would_change_is_refused(tmp_path, value):
    notebook = write_notebook(tmp_path / "cell.ipynb", ODD, ODD_BODY)
    with pytest.raises(InputError, match=r"parameter 'table' is .*, which JSON would change"):
        run_notebook(notebook, {"table": value}, tmp_path / "executed.ipynb")
    assert not (tmp_path / "executed.ipynb").exists()


def test_a_number_too_large_for_a_float_is_refused(tmp_path):
    with pytest.raises(InputError, match="parameter 'weight' is inf"):
        read_sweep(write_sweep(tmp_path, fixed={"weight": 10**400}))


def test_a_kernel_that_does_not_start_is_started_once_more(tmp_path, monkeypatch):
    notebook = write_notebook(tmp_path / "cell.ipynb", body="print(6 * 7)")
    flag = tmp_path / "tried"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if 'ipykernel_launcher' in sys.orig_argv and not os.path.exists({str(flag)!r}):\n"
        f"    open({str(flag)!r}, 'w').close()\n"
        "    os._exit(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_notebook(notebook, {}, tmp_path / "executed.ipynb")
    assert flag.exists()
    assert "42" in (tmp_path / "executed.ipynb").read_text()


def start_sweep(file: Path, runs: Path, mark: str) -> subprocess.Popen:
    code = (
        "import pathlib, sys; from cmdlab.sweeps.run import run_sweep; "
        "run_sweep(pathlib.Path(sys.argv[1]), runs=pathlib.Path(sys.argv[2]), workers=2)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(file), str(runs)],
        env=os.environ | {"CMDLAB_TEST_MARK": mark},
        stderr=subprocess.DEVNULL,
    )


def marked_processes(mark: str) -> list[int]:
    """Living processes that have inherited the mark: the sweep, its workers, their kernels."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    return found


def assert_all_end(mark: str) -> None:
    deadline = time.monotonic() + 20
    while marked_processes(mark):
        assert time.monotonic() < deadline, "a process of the stopped sweep goes on"
        time.sleep(0.05)


def finished_runs(runs: Path) -> dict[str, tuple[int, bytes]]:
    records = runs.glob("[0-9a-f]*/record.json")
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in records}


def report_input(runs: Path) -> tuple[str, list[dict]]:
    """All that a report can say of a sweep, but for times."""
    listing = runs / "sweeps" / "sweep.json"
    loaded = load_records([listing])
    assert not loaded.missing
    assert not loaded.failed
    timed = ("wall_seconds", "provenance")
    records = [{k: v for k, v in run.record.items() if k not in timed} for run in loaded.done]
    return listing.read_text(), records


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kill_9_at_random_moments_loses_no_finished_run(tmp_path):
    file = write_sweep(tmp_path, seeds=[1, 2, 3], arms={"a": {"weight": 1}, "b": {"weight": 2}})
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    started = time.monotonic()
    assert start_sweep(file, calm, "calm").wait() == 0
    whole = time.monotonic() - started  # how long this machine takes, as busy as it is

    moments = random.Random(0)
    finished: dict[str, tuple[int, bytes]] = {}
    for _ in range(10):
        mark = uuid.uuid4().hex
        sweep = start_sweep(file, stormy, mark)
        time.sleep(moments.uniform(0.02, 0.4) * whole)
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
        assert_all_end(mark)
        now = finished_runs(stormy)
        assert finished.items() <= now.items()
        finished = now

    assert start_sweep(file, stormy, "last").wait() == 0
    assert finished.items() <= finished_runs(stormy).items()
    assert report_input(stormy) == report_input(calm)
    assert not list(stormy.glob(".running-*"))
    assert {path.name for path in stormy.iterdir()} == {path.name for path in calm.iterdir()}


def test_two_sweeps_at_once_run_each_cell_once(tmp_path):
    file, runs = write_sweep(tmp_path, seeds=[1, 2, 3]), tmp_path / "runs"
    both = [start_sweep(file, runs, "first"), start_sweep(file, runs, "second")]
    assert [sweep.wait() for sweep in both] == [0, 0]
    log = (runs / "log.txt").read_text().splitlines()
    assert sorted(log) == [f"{what} 1.0 {n} 1" for what in ("end", "start") for n in (1, 2, 3)]
    assert len(report_input(runs)[1]) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_stops_a_kernel_that_computes_and_leaves_only_finished_runs(tmp_path):
    # The sum holds the interpreter's lock, so that no thread of the kernel can watch its parent.
    body = "import pathlib\npathlib.Path(run_folder, '..', 'begun').touch()\nsum(range(10**15))"
    write_notebook(tmp_path / "cell.ipynb", body=body)
    file, runs, mark = write_sweep(tmp_path), tmp_path / "runs", uuid.uuid4().hex
    sweep = start_sweep(file, runs, mark)
    while not (runs / "begun").exists():
        assert sweep.poll() is None
        time.sleep(0.1)
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait() != 0
    assert_all_end(mark)
    assert not list(runs.glob(".running-*"))
    assert load_records([runs / "sweeps" / "sweep.json"]).missing[0]["arm"] == "one"


def test_the_hash_of_a_notebook_is_that_of_its_sources(tmp_path):
    one = write_notebook(tmp_path / "one.ipynb")
    two = write_notebook(tmp_path / "two.ipynb")  # other cell ids
    three = write_notebook(tmp_path / "three.ipynb", body=BODY + "\n")
    hashes = [read_notebook(path).sha256 for path in (one, two, three)]
    assert hashes[0] == hashes[1] != hashes[2]
