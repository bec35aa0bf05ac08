"""The whole study where something in it fails: the report comes first, then the refusal."""

import json
from pathlib import Path

import nbformat
import pytest
import yaml

from cmdlab import study
from cmdlab.cli import main
from cmdlab.sweeps.run import SweepSummary


def write_notebook(path: Path, parameters: str, body: str) -> None:
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [tagged, nbformat.v4.new_code_cell(body)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


@pytest.mark.parametrize(
    ("report", "line"),
    [
        ("open(report, 'w').write('drawn')", r"sweeps/study-smoke.json: 1 runs failed; see"),
        ("raise OSError('disk\\nfull')", "ablation_report-smoke.ipynb: the report failed (OSError"),
    ],
    ids=["run", "report"],
)
def test_a_failure_is_one_line_and_no_success(
    report, line, smoke_corpus, smoke_data, tmp_path, monkeypatch, capsys
):
    notebooks = tmp_path / "notebooks"
    (notebooks / "sweeps").mkdir(parents=True)
    plan = {"notebook": "train.ipynb", "seeds": [1], "arms": {"one": None}}
    plan["fixed"] = {"corpus": "none"}
    (notebooks / "sweeps" / "study.yaml").write_text(yaml.safe_dump(plan))
    own = "seed = 1\nsmoke = False\nrun_folder = ''\ncorpus = ''"
    write_notebook(notebooks / "sweeps" / "train.ipynb", own, "1 / 0")
    write_notebook(notebooks / "ablation_report.ipynb", "runs = ''\nreport = ''", report)
    monkeypatch.setattr(study, "NOTEBOOKS", notebooks)
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "scenes-smoke").symlink_to(smoke_corpus)  # made before, with its features
    assert main(["study", "--smoke", "--folder", str(folder)]) == 2
    printed = capsys.readouterr()
    assert line in printed.err.splitlines()[-1]
    assert printed.out == (f"{folder / 'report-smoke.html'}\n" if "drawn" in report else "")
    assert (folder / "ablation_report-smoke.ipynb").is_file()


def test_a_study_made_without_a_break_leaves_its_times(tmp_path, monkeypatch, capsys):
    def sweep(file, *, runs, **_):
        return SweepSummary("study", runs / "sweeps" / "study.json", done, resumed, 0)

    monkeypatch.setattr(study, "make_corpus", lambda folder, **_: folder.mkdir(parents=True))
    monkeypatch.setattr(study, "open_data", lambda corpus, **_: None)
    monkeypatch.setattr(study, "run_sweep", sweep)
    monkeypatch.setattr(study, "run_notebook", lambda *_: None)
    done, resumed = 6, 0
    study.run_study(tmp_path / "whole")
    times = json.loads((tmp_path / "whole" / "times.json").read_text())
    assert list(times["seconds"]) == ["corpus", "features", "training", "report"]
    assert times["provenance"]["cores"] >= 1
    done, resumed = 2, 4
    study.run_study(tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "times.json").exists()
    assert capsys.readouterr().out.split() == [
        str(tmp_path / name / "report.html") for name in ("whole", "resumed")
    ]
