"""Records: what is written can be read, and what is not valid is refused with its place."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdlab.errors import InputError
from cmdlab.records.provenance import collect_provenance, source_sha256
from cmdlab.records.records import (
    load_records,
    read_record,
    read_result,
    write_json,
    write_listing,
    write_record,
)

ROOT = Path(__file__).parents[2]
DIRECTION = {
    "R@1": 20,
    "R@5": 50.0,
    "R@10": 60.0,
    "optimistic_R@1": 21.0,
    "median_rank": 5,
    "MRR": 0.3,
    "queries": 50,
    "gallery": 10,
}
METRICS = {"speech_to_image": DIRECTION, "image_to_speech": DIRECTION, "mean_R@1": 20.0}
RECALLS = {"R@1": 90.0, "R@5": 99.0, "R@10": 100.0}
RESULT: dict[str, Any] = {
    "metrics": {"validation": METRICS, "test": METRICS},
    "ceiling": {"speech_to_image": RECALLS, "image_to_speech": RECALLS},
    "text_ceiling": None,
    "learning_curve": [
        {
            "step": 0,
            "loss": 2.5,
            "contrastive": 2.0,
            "denoising": 0.5,
            "temperature": 0.07,
            "validation_mean_R@1": None,
        }
    ],
    "cost": {
        "trainable_parameters": 12,
        "denoiser_parameters": 2,
        "inference_parameters": 10,
        "inference_flops": 1e6,
        "inference_ms": 0.5,
        "training_seconds": 1.5,
        "steps": 1,
        "peak_memory_bytes": None,
    },
    "alignment": {
        "pointing": {"hits": 3, "words": 10, "chance": 0.1},
        "foil": {"wins": 3, "ties": 0, "pairs": 5},
    },
    "corpus": {"name": "none", "content_hash": "0", "gallery": 10, "captions": 50},
    "encoders": {
        "image": {"name": "none", "sha256": "0"},
        "speech": {"name": "none", "sha256": "0"},
    },
    "determinism": {"seed": 1, "threads": 1, "deterministic_algorithms": True},
}
PROVENANCE = collect_provenance() | {"notebook_sha256": "0", "started": "2024-01-01T00:00:00+00:00"}


def record_of(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "schema": 1,
        "status": "ok",
        "id": f"{number:016x}",
        "sweep": "study",
        "arm": f"arm {number}",
        "seed": number,
        "parameters": {"weight": 1.0},
        "wall_seconds": 2.5,
        "provenance": PROVENANCE,
        **RESULT,
        **changes,
    }
    return json.loads(json.dumps(record))  # shares nothing


def failed_record_of(number: int) -> dict[str, Any]:
    record = {key: value for key, value in record_of(number).items() if key not in RESULT}
    error = {"type": "ValueError", "message": "no", "traceback": "…"}
    return record | {"status": "failed", "error": error}


def listing_of(name: str, *arms: tuple[int, str]) -> dict[str, Any]:
    cells = [
        {"id": f"{number:016x}", "arm": arm, "seed": number, "status": "missing"}
        for number, arm in arms
    ]
    return {
        "schema": 1,
        "sweep": name,
        "title": name,
        "notebook": "train.ipynb",
        "smoke": False,
        "baseline": None,
        "planned": [],
        "axes": {},
        "cells": cells,
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry of a record that is not free-form."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    inner = [place for key, item in items for place in places(item, (*path, key))]
    return [path, *inner] if path and path[0] != "parameters" else inner


@pytest.mark.parametrize("record", [record_of(1), failed_record_of(2)])
def test_a_record_is_read_as_it_was_written(tmp_path, record):
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_every_entry_of_a_record_is_needed_and_checked(tmp_path):
    path = tmp_path / "record.json"
    entries = places(record_of(1))
    assert len(entries) > 80
    for place in entries:
        record = record_of(1)
        parent: Any = record
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = [{"unlike": "anything"}]
        path.write_text(json.dumps(record))
        with pytest.raises(InputError) as refusal:
            read_record(tmp_path)
        assert f"{path}: {'/'.join(map(str, place))}" in str(refusal.value)
        if isinstance(parent, dict):
            del parent[place[-1]]
            path.write_text(json.dumps(record))
            with pytest.raises(InputError, match="is missing"):
                read_record(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not readable JSON"),
        ("{", "is not readable JSON"),
        ("[]", "the file is \\[\\], and not an object"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"schema": 2}', "schema is 2, and not 1"),
        ('{"schema": true}', "schema is True, and not 1"),
        ('{"schema": 1, "status": "done"}', "status is 'done'"),
        ('{"schema": 1, "status": "ok", "id": "../../../etc"}', "id is '../../../etc'"),
        ('{"wall_seconds": NaN}', "NaN is no JSON number"),
        ('{"wall_seconds": -Infinity}', "Infinity is no JSON number"),
        ("\udcff", "is not readable JSON"),
    ],
)
def test_a_file_that_is_no_record_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "record.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as refusal:
        read_record(tmp_path)
    assert "\n" not in str(refusal.value)


def test_what_older_records_lack_is_checked_where_it_is(tmp_path):
    result = json.loads(json.dumps(RESULT))
    path = tmp_path / "result.json"
    for value in (None, "much", math.inf):
        result["cost"]["retrieval_flops_per_query"] = value
        path.write_text(json.dumps(result))
        with pytest.raises(InputError, match=r"retrieval_flops_per_query is|no JSON number"):
            read_result(path)
    result["cost"]["retrieval_flops_per_query"] = 5e6
    path.write_text(json.dumps(result))
    assert read_result(path)["cost"]["retrieval_flops_per_query"] == 5e6


@pytest.mark.parametrize("number", ["1e999", "true", '"5"', "null"])
def test_a_metric_is_a_finite_number(tmp_path, number):
    text = json.dumps(RESULT).replace('"mean_R@1": 20.0', f'"mean_R@1": {number}')
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(InputError, match=r"validation/mean_R@1 is .* not a finite number"):
        read_result(tmp_path / "result.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(key=st.sampled_from(sorted(record_of(1))), value=json_values)
def test_no_json_value_breaks_the_reader(tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("record")
    (folder / "record.json").write_text(json.dumps(record_of(1) | {key: value}))
    try:
        record = read_record(folder)
    except InputError:
        return
    assert record[key] == value


def test_a_name_that_is_no_utf8_comes_back_as_it_was(tmp_path):
    corpus = os.fsdecode(b"data/caf\xe9")
    write_json(tmp_path / "one.json", {"corpus": corpus, "text": "Größe"})
    written = (tmp_path / "one.json").read_text(encoding="utf-8")
    assert json.loads(written) == {"corpus": corpus, "text": "Größe"}
    assert "Größe" in written


def test_what_is_not_valid_is_not_written(tmp_path):
    with pytest.raises(InputError, match="wall_seconds is nan"):
        write_record(tmp_path, record_of(1, wall_seconds=float("nan")))
    write_json(tmp_path / "kept.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "kept.json", {"deep": [float("inf")]})
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    assert json.loads((tmp_path / "kept.json").read_text()) == 1


def test_any_file_name_can_be_written_and_read_again(tmp_path):
    names = ["音/日本", os.fsdecode(b"caf\xe9")]
    write_json(tmp_path / "names.json", names)
    assert json.loads((tmp_path / "names.json").read_text(encoding="utf-8")) == names


def test_records_of_a_sweep_are_gathered_and_what_lacks_is_counted(tmp_path):
    for record in (record_of(1), record_of(2), failed_record_of(3), record_of(9)):
        (tmp_path / record["id"]).mkdir()
        write_record(tmp_path / record["id"], record)
    (tmp_path / "sweeps").mkdir()
    write_listing(tmp_path / "sweeps" / "a.json", listing_of("a", (1, "one"), (3, "x"), (4, "y")))
    write_listing(tmp_path / "sweeps" / "b.json", listing_of("b", (1, "same cell"), (2, "two")))

    one = load_records([tmp_path / "sweeps" / "a.json"])
    assert [(run.record["sweep"], run.record["arm"]) for run in one.done] == [("a", "one")]
    assert [run.record["arm"] for run in one.failed] == ["x"]
    assert one.missing == ({"sweep": "a", "arm": "y", "id": f"{4:016x}", "seed": 4},)

    both = load_records([tmp_path])
    assert [sweep["sweep"] for sweep in both.sweeps] == ["a", "b"]
    assert [run.record["arm"] for run in both.done] == ["one", "same cell", "two"]

    [alone] = load_records([tmp_path / f"{9:016x}"]).done
    assert (alone.folder, alone.record["arm"]) == (tmp_path / f"{9:016x}", "arm 9")
    with pytest.raises(InputError, match="holds neither"):
        load_records([tmp_path / "nowhere"])


def test_a_damaged_record_stops_the_report(tmp_path):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / f"{1:016x}").mkdir()
    (tmp_path / f"{1:016x}" / "record.json").write_text("{")
    write_listing(tmp_path / "sweeps" / "a.json", listing_of("a", (1, "one")))
    with pytest.raises(InputError, match="is not readable JSON"):
        load_records([tmp_path])


def in_copy(folder: Path, code: str) -> Any:
    """What `code` prints as JSON when the packages are those below `folder`."""
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            check=True,
            capture_output=True,
        ).stdout
    )


@pytest.fixture
def copy_of_the_packages(tmp_path):
    unwanted = shutil.ignore_patterns("__pycache__", "benchmarks")
    for name in ("cmdlab", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unwanted)
    return tmp_path


def test_the_source_hash_covers_what_can_change_a_result(copy_of_the_packages):
    code = (
        "import json; from cmdlab.records.provenance import source_sha256; "
        "print(json.dumps(source_sha256()))"
    )
    first = in_copy(copy_of_the_packages, code)
    weights = copy_of_the_packages / "cmdlab/encoders/weights"
    weights.mkdir(exist_ok=True)
    hashes = {first}
    for name in ("cmdlab/errors.py", "kernels/cmdlab_kernels/new.py", f"{weights}/a.json"):
        with (copy_of_the_packages / name).open("a") as file:
            file.write("\n")
        hashes.add(in_copy(copy_of_the_packages, code))
    assert len(hashes) == 4
    for name in ("cmdlab/cli.py", "cmdlab/reporting/__init__.py", "README.md"):
        with (copy_of_the_packages / name).open("a") as file:
            file.write("\n")
    assert in_copy(copy_of_the_packages, code) in hashes


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_provenance_knows_the_commit_and_what_differs_from_it(copy_of_the_packages):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(copy_of_the_packages), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    code = (
        "import json; from cmdlab.records.provenance import collect_provenance; "
        "print(json.dumps(collect_provenance()))"
    )

    def state() -> tuple[str | None, str | None]:
        found = in_copy(copy_of_the_packages, code)
        return found["git_sha"], found["uncommitted_sha256"]

    assert state() == (None, None)
    git("init", "--quiet")
    (copy_of_the_packages / ".gitignore").write_text("__pycache__/\n")
    git("add", ".gitignore")
    git("commit", "--quiet", "-m", "somebody else's repository")
    assert state() == (None, None)  # it holds the package, but not as a part of it
    git("add", "--all")
    git("commit", "--quiet", "-m", "with the package")
    sha = git("rev-parse", "HEAD").strip()
    assert state() == (sha, None)
    states = {state()}
    for name in ("cmdlab/errors.py", "new.txt", "new.txt"):
        with (copy_of_the_packages / name).open("a") as file:
            file.write("\n")
        states.add(state())
    link = copy_of_the_packages / "link"
    for target in ("cmdlab", "nowhere"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        states.add(state())
    git("init", "--quiet", "nested")
    states.add(state())
    assert len(states) == 7
    assert {commit for commit, _ in states} == {sha}


def test_provenance_does_not_import_torch():
    code = (
        "import json, sys; from cmdlab.sweeps.engines import collect_provenance; "
        "print(json.dumps([collect_provenance(), 'torch' in sys.modules]))"
    )
    provenance, imported = in_copy(ROOT, code)
    assert not imported
    assert provenance["torch"].startswith("2.")
    assert provenance["source_sha256"] == source_sha256()
