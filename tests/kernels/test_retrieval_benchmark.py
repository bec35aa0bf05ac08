"""What the benchmark of retrieval ranks checks before it times, and the memory that it reports."""

import importlib
import os
import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from cmdlab_kernels import retrieval_float32_cpu, retrieval_ranks_cpu

pytestmark = [
    pytest.mark.usefixtures("processor"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's speed means nothing"
    ),
]


@pytest.fixture
def ranks(monkeypatch):
    """The benchmark's module, which nothing but its own folder makes importable."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "kernels" / "benchmarks")
    yield importlib.import_module("retrieval_ranks")
    for name in ("bench", "retrieval_ranks"):
        sys.modules.pop(name, None)


def test_the_gate_is_red_where_the_fastest_product_is_not_reached(ranks, monkeypatch):
    monkeypatch.setattr(ranks, "_path", lambda device, name: "cpu-of-tomorrow")
    with pytest.raises(ranks.WrongResult, match="cpu-of-tomorrow is unproven"):
        ranks._check("cpu")


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("name", ["torch matmul + top-k", "torch matmul + argsort"])
def test_the_gate_is_red_for_a_wrong_peer(ranks, monkeypatch, name, direction):
    make = ranks._peers

    def peers(*arguments):
        found = make(*arguments)
        answers = list(found[name]())
        answers[direction] = ~answers[direction]
        return {name: lambda: answers}

    monkeypatch.setattr(ranks, "_peers", peers)
    with pytest.raises(ranks.WrongResult, match=re.escape(name)):
        ranks._check("cpu")


def test_a_wrong_count_of_the_fastest_product_gets_no_speed(ranks, monkeypatch):
    low = retrieval_ranks_cpu.precisions(768)
    name = "_count" if low else "count_float32"
    count = getattr(retrieval_ranks_cpu, name)

    def wrong(*arguments):
        result = count(*arguments)
        if not low:
            result.image_greater[3] += 1
        elif arguments[0] == low[0]:
            result[0].image_greater[3] += 1
        return result

    monkeypatch.setattr(retrieval_ranks_cpu, name, wrong)
    with pytest.raises(ranks.WrongResult, match=r"cmdlab_kernels(, in tiles)? differs"):
        ranks._check("cpu")


def test_a_wrong_count_of_few_pairs_gets_no_speed(ranks, monkeypatch):
    count = retrieval_float32_cpu.count_small

    def wrong(*arguments):
        counts = count(*arguments)
        if counts is not None:
            counts.speech_equal[3] += 1
        return counts

    monkeypatch.setattr(retrieval_float32_cpu, "PAIRS", 2**20)
    monkeypatch.setattr(retrieval_float32_cpu, "count_small", wrong)
    with pytest.raises(ranks.WrongResult, match="cmdlab_kernels differs"):
        ranks._check("cpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to trim")
def test_memory_that_an_earlier_call_left_to_the_allocator_is_counted(ranks):
    last = []

    def function():
        parts = [torch.ones(2**14) for _ in range(400)]  # 25 MiB, in pieces that glibc keeps
        last.append(torch.ones(2**13))  # so that the heap cannot shrink by itself
        return len(parts)

    for _ in range(3):
        function()
    assert ranks.peak_memory(function, "cpu") >= 24 * 2**20
