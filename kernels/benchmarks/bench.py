"""The kernels' benchmarks: one long CSV, in which no speed stands for a wrong answer.

`cmdlab bench` runs them. `OPERATION.py` beside this file holds

    benchmark(device: str, quick: bool, ceilings: dict[str, float]) -> list[dict]

It first checks that every provider it is about to time gives the right answer (`gate`), then
returns one `row(...)` a figure. What it measures with is here.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import importlib
import io
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

OPERATIONS = ("retrieval_ranks", "denoising_attention", "info_nce", "nearest")
COLUMNS = (
    *("operation", "provider", "mode", "dtype", "shape", "metric", "p20", "p50", "p80"),
    *("flops", "bytes", "fraction_of_floor", "peak_memory_bytes", "precisions"),
    *("device", "threads", "driver", "torch", "triton", "git_sha"),
)
GRAPH_BELOW = 100e-6  # seconds; below, launches are a good part of the time
WARM_BELOW = 0.1  # seconds on a CPU; below, filling the caches is a good part of the time
GRAPH = ", CUDA graph"
Quantiles = tuple[float, float, float]


class WrongResult(Exception):
    """A provider does not give the reference's answer, so its speed means nothing."""


def run_benchmarks(
    device: str | None = None,
    *,
    quick: bool = False,
    operations: Sequence[str] = (),
    output: Path | None = None,
    write: Callable[[Path, str], object] = Path.write_text,
) -> bool:
    """Check and time the operations (default: all), print a table, and write the CSV.

    device: "cpu" or "cuda", by default the GPU where there is one. quick: small sizes, few
    repeats. output: by default reports/kernels/NAME.csv, NAME being the GPU's name or "cpu" and the
    processor's instructions, then the operations if some were chosen; with `quick` no file. `write`
    puts the text there. Returns whether every answer was right; an operation with a wrong one gives
    no speed.
    Raises ValueError for an operation or a device that is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    unknown = sorted(set(operations) - set(OPERATIONS))
    if unknown:
        raise ValueError(f"{unknown[0]} is no operation; choose from {', '.join(OPERATIONS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    machine = _machine(device)
    if output is None and not quick:
        name = f"cpu {_instructions()}" if device == "cpu" else machine["device"]
        name = re.sub("[^a-z0-9]+", "-", " ".join([name, *operations]).lower())
        output = Path("reports", "kernels", f"{name}.csv")
    print(f"what {machine['device']} reaches now", file=sys.stderr)
    reached = ceilings(device, quick)
    rows = [
        row("ceiling", name, "", name, "", unit, (value,) * 3)
        for name, value in reached.items()
        for unit in ["bytes/s" if name == "copy" else "flop/s"]
    ]
    right = True
    for operation in operations or OPERATIONS:
        print(f"{operation} on {device}", file=sys.stderr)
        try:
            rows += importlib.import_module(operation).benchmark(device, quick, reached)
        except WrongResult as error:
            print(f"{operation}: {error}; no speed is given", file=sys.stderr)
            right = False
    for line in rows:
        print(_summary(line))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write(output, _csv([{**line, **machine} for line in rows]))
        print(f"written to {output}", file=sys.stderr)
    return right


def row(
    operation: str,
    provider: str,
    mode: str,
    dtype: str,
    shape: str,
    metric: str,
    quantiles: Quantiles,
    *,
    flops: float | None = None,
    least_bytes: float | None = None,
    floor: float | None = None,
    peak_memory_bytes: int | None = None,
    precisions: str | None = None,
) -> dict[str, Any]:
    """One line of the CSV.

    `mode` is what was asked for ("both directions", "forward", "forward + backward"); `metric`
    names the unit ("seconds", "flop/s", "bytes/s"); `flops` and `least_bytes` are what the
    operation must do and move; `floor` is the least time in seconds that the measured ceilings
    allow for them, of which `fraction_of_floor` = floor / p50; `precisions` tells which share of
    the work took which arithmetic, where that depends on the data.
    """
    return {
        "operation": operation,
        "provider": provider,
        "mode": mode,
        "dtype": dtype,
        "shape": shape,
        "metric": metric,
        **dict(zip(("p20", "p50", "p80"), quantiles, strict=True)),
        "flops": flops,
        "bytes": least_bytes,
        "fraction_of_floor": None if floor is None else floor / quantiles[1],
        "peak_memory_bytes": peak_memory_bytes,
        "precisions": precisions,
    }


def gate(name: str, ok: bool) -> None:
    """Stop the operation's benchmark unless `name` gave the right answer."""
    if not ok:
        raise WrongResult(f"{name} differs from the reference")


def timings(
    functions: dict[str, Callable[[], object]], device: str, *, repeats: int = 7
) -> dict[str, Quantiles]:
    """Seconds of each function, (p20, p50, p80).

    On a CPU the functions take turns, so that a change in the machine's load meets them all; one
    that has taken 15 s has been timed often enough. One of less than `WARM_BELOW` is called once
    before it is timed, so that all find in the caches what they left there themselves, not what
    another one did. On a GPU each is timed by triton.testing.do_bench, which clears the L2 cache
    between calls; one of less than 100 µs a second time as NAME + GRAPH, without the time of its
    launches and with a warm cache. What a graph cannot hold, since it waits for the device, has no
    such line.
    """
    if device == "cuda":
        return _cuda_timings(functions)
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if sum(seconds[name]) > 15:
                continue
            if seconds[name] and seconds[name][-1] < WARM_BELOW:
                function()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: _quantiles(values) for name, values in seconds.items()}


def _cuda_timings(functions: dict[str, Callable[[], object]]) -> dict[str, Quantiles]:
    from triton.testing import do_bench, do_bench_cudagraph

    found: dict[str, Quantiles] = {}
    for name, function in functions.items():
        found[name] = tuple(1e-3 * q for q in do_bench(function, quantiles=[0.2, 0.5, 0.8]))
        if found[name][1] < GRAPH_BELOW:
            try:
                replays = do_bench_cudagraph(function, quantiles=[0.2, 0.5, 0.8])
            except RuntimeError as error:
                print(f"{name}: no CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
            else:
                found[name + GRAPH] = tuple(1e-3 * q for q in replays)
    return found


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Bytes that the function, already called once, holds at most above what was held before."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # glibc keeps what it freed, which would count as held before and hide what is used again.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries lack it
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak resident size starts again from here
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def ceilings(device: str, quick: bool) -> dict[str, float]:
    """Operations a second of matrix products ("float32", "bfloat16", "int8"), "copy" in bytes/s."""
    size = 1024 if quick else 2048 if device == "cpu" else 8192
    functions: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        functions[str(dtype).removeprefix("torch.")] = lambda a=a, b=b: a @ b.T
    a, b = (torch.randint(-127, 128, (size, size), device=device).to(torch.int8) for _ in range(2))
    functions["int8"] = lambda: torch._int_mm(a, b.T)
    source = torch.randn(2**24 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    functions["copy"] = lambda: target.copy_(source)
    seconds = timings(functions, device)
    work = dict.fromkeys(functions, 2.0 * size**3)
    work["copy"] = 2.0 * source.numel() * source.element_size()
    return {name: work[name] / seconds[name][1] for name in functions}


def _quantiles(values: list[float]) -> Quantiles:
    low, middle, high = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return low, middle, high


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _machine(device: str) -> dict[str, Any]:
    driver = None
    if device == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        driver = subprocess.check_output(query, text=True).strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "driver": driver,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "git_sha": _git_sha(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    fast = [
        flag for flag in ("avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if flag in flags
    ]
    return " ".join([names[0] if names else platform.processor(), *(fast or [_instructions()])])


def _instructions() -> str:
    """What torch's own loops use of the processor, such as "AVX2"."""
    return torch.backends.cpu.get_cpu_capability()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _git_sha() -> str | None:
    here = Path(__file__).parent
    try:
        sha = subprocess.check_output(("git", "-C", here, "rev-parse", "HEAD"), text=True).strip()
        changed = subprocess.check_output(("git", "-C", here, "status", "--porcelain"), text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha + ("-changed" if changed.strip() else "")


def _summary(line: dict[str, Any]) -> str:
    share = line["fraction_of_floor"]
    return (
        f"{line['operation']:20} {line['provider']:28} {line['mode']:20} {line['dtype']:9} "
        f"{line['shape']:20} {line['p50']:.4g} {line['metric']}"
        + ("" if share is None else f", {share:.0%} of the floor")
    )


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
