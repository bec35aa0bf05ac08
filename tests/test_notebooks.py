"""The stored notebooks: clean in the repository, and each runs in smoke mode."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from cmdlab.retrieval import Denoising, Training, parameters_of
from cmdlab.sweeps.files import read_sweep
from cmdlab.sweeps.notebooks import read_notebook, run_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SWEEPS = sorted((ROOT / "notebooks" / "sweeps").glob("*.yaml"))

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_a_stored_notebook_holds_no_output(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    assert "papermill" not in content["metadata"]
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        assert set(cell["metadata"]) <= {"tags", "jupyter"}


@each_notebook
def test_a_stored_notebook_has_stable_cell_ids(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"] >= 5) == (4, True)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    # A name stays when its cell changes; a random id would be made anew by every tool.
    assert [one for one in ids if not re.fullmatch("[a-z][a-z0-9-]{1,63}", one)] == []


@each_notebook
def test_a_stored_notebook_says_how_to_shrink_it(notebook):
    smoke = read_notebook(notebook).parameters["smoke"]
    assert (smoke.type, smoke.default) == ("bool", False)


@each_notebook
def test_a_stored_notebook_runs_in_smoke_mode(notebook, smoke_corpus, tmp_path, monkeypatch):
    known = read_notebook(notebook).parameters
    parameters: dict[str, Any] = {"smoke": True}
    if "corpus" in known:
        parameters["corpus"] = str(smoke_corpus)
    for name in ("run_folder", "output"):
        if name in known:
            folder = tmp_path / name
            folder.mkdir()
            parameters[name] = str(folder)
    if "report" in known:
        parameters["report"] = str(tmp_path / "report.html")
    if "runs" in known:
        write_study = runpy.run_path(str(ROOT / "tests" / "reporting" / "conftest.py"))[
            "write_study"
        ]
        parameters["runs"] = str(write_study(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executed = tmp_path / "executed.ipynb"
    run_notebook(notebook, parameters, executed)
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and cell["source"]]
    assert all(cell["execution_count"] for cell in code)


def test_the_parameters_of_training_are_told_alike_in_the_notebook_and_by_the_command():
    notebook = ROOT / "notebooks" / "train.ipynb"
    declared = read_notebook(notebook).parameters
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    [cell] = [cell for cell in cells if cell["id"] == "parameters"]
    comments = dict(
        re.fullmatch(r"(\w+): .+?(?:  # (.*))?\n?", line).groups() for line in cell["source"]
    )
    known = {one.name: one for one in parameters_of([Training, Denoising])}
    own = {
        "corpus",
        "test_corpus",
        "snr_db",
        "features",
        "run_folder",
        "device",
        "skip_bad",
        "smoke",
        "online",
    }
    own |= {"speech_encoder", "speech_weights", "speech_layers", "image_encoder", "image_weights"}
    assert declared.keys() - own == known.keys()
    for name in known:
        assert declared[name].default == known[name].default
        assert comments[name] == known[name].line


def test_each_parameter_of_training_reaches_it():
    notebook = ROOT / "notebooks" / "train.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    [recipe] = [source for cell in cells if "Training(" in (source := "".join(cell["source"]))]
    known = parameters_of([Training, Denoising])
    usual = {one.name: one.default for one in known} | {"smoke": False}

    def made(**changed: Any) -> Training:
        names = {"Training": Training, "Denoising": Denoising} | usual | changed
        exec(recipe, names)
        return names["training"]

    for one in known:
        if one.choices:
            other = next(choice for choice in one.choices if choice != one.default)
        elif isinstance(one.default, bool):
            other = not one.default
        elif isinstance(one.default, str):
            other = "red star"
        else:
            other = one.default + (0.005 if isinstance(one.default, float) else 1)
        training = made(**{one.name: other})
        assert training != made(), one.name
        holder = training if hasattr(training, one.name) else training.denoising
        assert getattr(holder, one.name) == other


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_a_stored_sweep_fits_its_notebook(file, smoke_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study").mkdir()
    Path("study", "sketches").symlink_to(smoke_corpus)  # a corpus to test on, for the regimes
    listing, cells = read_sweep(file, overrides={"corpus": str(smoke_corpus)})
    arms, seeds = {cell.arm for cell in cells}, {cell.seed for cell in cells}
    assert listing["baseline"] in arms
    assert len(cells) == len(arms) * len(seeds)
    assert len({cell.id for cell in cells}) == len(cells)
