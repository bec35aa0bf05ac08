"""The benchmarks: what they write, and that a wrong answer gets no speed."""

import csv
import importlib
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's speed means nothing"
)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "kernels" / "benchmarks")
    yield importlib.import_module("bench")
    for name in ("bench", "retrieval_ranks", "denoising_attention", "info_nce", "nearest"):
        sys.modules.pop(name, None)


def test_a_quick_run_writes_every_figure(processor, bench, tmp_path, capsys):
    output = tmp_path / "made" / "cpu.csv"
    assert bench.run_benchmarks("cpu", quick=True, operations=["retrieval_ranks"], output=output)
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == bench.COLUMNS
    reached = {row["provider"]: float(row["p50"]) for row in rows if row["operation"] == "ceiling"}
    assert set(reached) == {"float32", "bfloat16", "int8", "copy"}
    modes = ("both directions", "one direction", "both directions, narrow scores")
    assert {row["mode"] for row in rows if row["operation"] == "retrieval_ranks"} == {*modes}
    timed = {row["provider"]: row for row in rows if row["mode"] in modes[:2]}
    assert ("cmdlab_kernels, fp32 only" in timed) == (processor in ("int8", "bf16"))
    assert {"cmdlab_kernels", "bare fp32 product", "torch matmul + argsort"} <= set(timed)
    for row in timed.values():
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert float(row["flops"]) == 2 * 2000 * 400 * 768
        product = max(rate for name, rate in reached.items() if name != "copy")
        floor = max(float(row["flops"]) / product, float(row["bytes"]) / reached["copy"])
        assert float(row["fraction_of_floor"]) == pytest.approx(floor / float(row["p50"]))
        assert row["torch"] == torch.__version__
        assert row["git_sha"] or not (ROOT / ".git").exists()
    shares = {row["mode"]: row["precisions"] for row in rows if row["provider"] == "cmdlab_kernels"}
    assert all(re.fullmatch(r"(cpu-\w+ [\d.]+ %(, |$))+", text) for text in shares.values())
    printed = capsys.readouterr().out
    assert all(provider in printed for provider in timed)


def test_the_nearest_are_timed_once_they_are_right(bench, tmp_path, capsys, monkeypatch):
    output = tmp_path / "cpu.csv"
    assert bench.run_benchmarks("cpu", quick=True, operations=["nearest"], output=output)
    with output.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["operation"] == "nearest"]
    assert {row["mode"] for row in rows} == {"as trained", "random directions"}
    assert {"cmdlab.search scan", "torch matmul + top-k"} <= {row["provider"] for row in rows}

    nearest = importlib.import_module("nearest")
    right = nearest.Gallery.candidates
    monkeypatch.setattr(nearest.Gallery, "candidates", lambda *asked: right(*asked)[1:])
    assert not bench.run_benchmarks("cpu", quick=True, operations=["nearest"])
    assert "cmdlab.search scan differs from the reference" in capsys.readouterr().err


def test_the_default_file_tells_the_kind_of_processor(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ceilings", lambda device, quick: {"copy": 1.0})
    monkeypatch.setattr(bench, "OPERATIONS", ())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert bench.run_benchmarks("cpu")
    assert (tmp_path / "reports" / "kernels" / "cpu-avx2.csv").exists()


def test_some_operations_do_not_replace_the_file_of_all(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ceilings", lambda device, quick: {"copy": 1.0})
    monkeypatch.setitem(sys.modules, "nearest", SimpleNamespace(benchmark=lambda *_: []))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert bench.run_benchmarks("cpu", operations=["nearest"])
    files = (tmp_path / "reports" / "kernels").iterdir()
    assert [file.name for file in files] == ["cpu-avx2-nearest.csv"]


@pytest.mark.parametrize("field", ["speech_equal", "image_greater"])
def test_a_wrong_answer_gets_no_speed(bench, field, tmp_path, capsys, monkeypatch):
    ranks = importlib.import_module("retrieval_ranks")
    right = ranks.retrieval_ranks

    def wrong(*inputs, **options):
        result = right(*inputs, **options)
        if options.get("impl") != "reference":
            getattr(result, field)[3] += 1
        return result

    monkeypatch.setattr(ranks, "retrieval_ranks", wrong)
    output = tmp_path / "cpu.csv"
    assert not bench.run_benchmarks(
        "cpu", quick=True, operations=["retrieval_ranks"], output=output
    )
    printed = capsys.readouterr()
    assert "cmdlab_kernels differs from the reference; no speed is given" in printed.err
    assert "retrieval_ranks" not in printed.out
    assert "retrieval_ranks" not in output.read_text()


def test_the_gates_of_gradients_are_red_for_a_wrong_gradient(bench):
    loss = importlib.import_module("info_nce")
    leaves = loss.inputs(16, 8, torch.float32, "cpu")
    loss.check("right", loss.info_nce, leaves)

    def detached(speech, image, image_id, scale):
        return loss.info_nce(speech, image, image_id, scale.detach()) + 0 * scale

    with pytest.raises(bench.WrongResult, match="detached"):
        loss.check("detached", detached, leaves)


def test_what_is_not_there_is_refused(bench):
    with pytest.raises(ValueError, match="sorting is no operation; choose from retrieval_ranks"):
        bench.run_benchmarks("cpu", quick=True, operations=["sorting"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device here"):
            bench.run_benchmarks("cuda", quick=True)
