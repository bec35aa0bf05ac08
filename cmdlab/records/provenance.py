"""Where a result comes from: source, commit, versions and hardware."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def collect_provenance() -> dict[str, Any]:
    """What a record says of where it comes from, apart from its notebook and its time.

    The git entries are null where this package is not part of a git working tree. torch is not
    imported: its versions are read from its files.
    """
    root = Path(__file__).parents[2]
    lock = root / "requirements.lock"
    torch: dict[str, Any] = {}
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        torch = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        **_git_state(root),
        "source_sha256": source_sha256(),
        "lock_sha256": _sha256(lock) if lock.exists() else None,
        "python": platform.python_version(),
        "torch": torch.get("__version__"),
        "triton": _version("triton"),
        "cuda": torch.get("cuda"),
        "driver": driver.split()[0] if driver else None,
        "cpu": _cpu_model(),
        "gpu": next(iter(gpu_names().values()), None),
        "cores": len(os.sched_getaffinity(0)),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def source_sha256() -> str:
    """The hash of all that can change a result: both packages' source and the encoders' weights.

    `cmdlab/reporting` and `cmdlab/cli.py` are left out: reports are drawn from records.
    """
    library = Path(__file__).parents[1]
    kernels = importlib.util.find_spec("cmdlab_kernels")
    roots = [library]
    if kernels is not None and kernels.origin is not None:
        roots.append(Path(kernels.origin).parent)
    digest = hashlib.sha256()
    for root in roots:
        weights = root / "encoders" / "weights"
        files = [*root.rglob("*.py"), *weights.glob("*.safetensors"), *weights.glob("*.json")]
        for path in sorted(filter(Path.is_file, files)):  # Emacs locks x.py by a link to nowhere
            name = path.relative_to(root)
            if root == library and (name.parts[0] == "reporting" or name == Path("cli.py")):
                continue
            digest.update(f"{_sha256(path)}  {root.name}/{name.as_posix()}\n".encode())
    return digest.hexdigest()


def gpu_names() -> dict[str, str]:
    """The models of this machine's NVIDIA GPUs by index, as `nvidia-smi` gives them."""
    lines = _output("nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader")
    return dict(line.split(", ", 1) for line in (lines or "").splitlines())


def _git_state(root: Path) -> dict[str, str | None]:
    """The commit, and a hash of everything that differs from it and is not ignored."""
    # A package installed below somebody else's repository is not part of it.
    own = _output("git", "-C", str(root), "ls-files", "--", str(Path(__file__).relative_to(root)))
    sha = _output("git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD")
    if not own or not sha:
        return {"git_sha": None, "uncommitted_sha256": None}
    difference = _output("git", "-C", str(root), "diff", "HEAD", "--binary", "--no-ext-diff")
    others = _output("git", "-C", str(root), "ls-files", "-z", "--others", "--exclude-standard")
    names = [name for name in (others or "").split("\0") if name]
    changed = None
    if difference or names:
        digest = hashlib.sha256((difference or "").encode())
        for name in names:
            digest.update(f"{name}\0{_content(root / name)}\n".encode(errors="surrogateescape"))
        changed = digest.hexdigest()
    return {"git_sha": sha.strip(), "uncommitted_sha256": changed}


def _output(*command: str) -> str | None:
    """A command's standard output; None when it is not installed or fails."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError:
        return None
    return finished.stdout if finished.returncode == 0 else None


def _content(path: Path) -> str:
    """A link's target, a file's hash, nothing of what else git lists: a nested repository."""
    if path.is_symlink():
        return os.readlink(path)
    return _sha256(path) if path.is_file() else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """The processor's name and its vector unit, which a virtual machine's name tells nothing of."""
    cpuinfo = Path("/proc/cpuinfo")
    of_first: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        of_first.setdefault(name.strip(), value.strip())
    flags = of_first.get("flags", "").split()
    units = {"avx512f": "AVX-512", "avx2": "AVX2"}
    unit = [words for flag, words in units.items() if flag in flags][:1]
    model = of_first.get("model name") or platform.processor() or platform.machine()
    return ", ".join([model, *unit])
