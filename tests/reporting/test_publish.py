"""What is published beside a report: enough to draw it again, and no more."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from cmdlab.errors import InputError
from cmdlab.reporting import publish, write_report


@pytest.fixture
def runs(make_study, tmp_path):
    runs = make_study(
        tmp_path / "runs", effects={"cmd-image": 1.0}, failed=(("cmd-image", 3),), images=80
    )
    for folder in runs.iterdir():
        if (folder / "record.json").exists():
            (folder / "notebook.ipynb").write_text("{}")
            (folder / "model").mkdir()
            (folder / "model" / "model.safetensors").write_bytes(b"x" * 1000)
    return runs


def test_the_report_is_the_same_from_what_is_published(runs, tmp_path):
    write_report([runs], tmp_path / "before.html")
    publish([runs], tmp_path / "kept", tmp_path / "after.html")
    assert (tmp_path / "after.html").read_bytes() == (tmp_path / "before.html").read_bytes()
    write_report([tmp_path / "kept"], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "before.html").read_bytes()


def test_neither_models_nor_notebooks_are_published(runs, tmp_path):
    publish([runs], tmp_path / "kept", tmp_path / "report.html")
    names = {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert {"record.json", "ranks.npz", "examples.json", "summary.md", "summary.svg"} <= names
    assert not {"model.safetensors", "notebook.ipynb"} & names
    shown = [path.parent.name for path in (tmp_path / "kept").rglob("examples.json")]
    seeds = [
        json.loads((tmp_path / "kept" / name / "record.json").read_text())["seed"] for name in shown
    ]
    assert len(shown) == 2
    assert len(set(seeds)) == 1


def test_what_is_there_already_is_not_overwritten(runs, tmp_path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(InputError, match="kept: is there already; name another folder"):
        publish([runs], tmp_path / "kept", tmp_path / "report.html")
    assert list((tmp_path / "kept").iterdir()) == []


def test_the_summary_has_a_line_for_each_arm_and_each_ceiling(runs, tmp_path):
    publish([runs], tmp_path / "kept", tmp_path / "report.html")
    told, _, table = (tmp_path / "kept" / "summary.md").read_text().partition("\n\n")
    assert told.startswith("Asked: Does Cross-Modal Denoising")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    rows = {line[0]: line for line in lines[2:]}
    assert set(rows) == {
        "contrastive",
        "cmd-image",
        "*text instead of speech, same image encoder*",
        "*all-knowing system*",
    }
    assert rows["contrastive"][-2:] == ["", "3"]
    assert rows["cmd-image"][-1] == "2"  # one seed failed
    assert float(rows["cmd-image"][1]) > float(rows["contrastive"][1])
    assert rows["cmd-image"][-2].startswith("+")
    parts = [float(cell) for cell in rows["contrastive"][1:4]]
    assert parts[0] == pytest.approx((parts[1] + parts[2]) / 2, abs=0.11)


def test_the_summarys_figure_stands_by_itself(runs, tmp_path):
    publish([runs], tmp_path / "kept", tmp_path / "report.html")
    svg = (tmp_path / "kept" / "summary.svg").read_text()
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in svg
    assert "cmd-image" in "".join(root.itertext())


def test_a_report_is_drawn_where_there_is_no_torch(runs, tmp_path):
    """Its two seconds of import are spared, too."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from cmdlab.reporting import write_report\n"
        "write_report([Path(sys.argv[1])], Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, runs, tmp_path / "without.html"], check=True)
    write_report([runs], tmp_path / "with.html")
    assert (tmp_path / "without.html").read_bytes() == (tmp_path / "with.html").read_bytes()
