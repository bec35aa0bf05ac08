"""A notebook as a function: its parameters checked, its run in a process of its own."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmdlab.errors import InputError, nearest
from cmdlab.outputs import write_file


class NotebookError(RuntimeError):
    """A notebook that did not run to its end; `kind` is the name of the exception that ended it."""

    def __init__(self, kind: str, message: str, traceback: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message
        self.traceback = traceback


class Stopped(Exception):
    """The notebook was stopped because its caller asked for it."""


def run_notebook(notebook: Path, parameters: Mapping[str, Any], output: Path) -> None:
    """Run a notebook with papermill and keep the executed notebook at `output`.

    The notebook runs in the caller's working folder and dies with the caller. `output` is kept,
    with the traceback in it, when the notebook fails too: that it exists does not mean that it ran.
    Raises InputError for a parameter that the notebook does not declare or whose value does not
    fit, NotebookError when the notebook fails.
    """
    notebook, output = Path(notebook), Path(output)
    checked = read_notebook(notebook).fill(parameters, where=str(notebook))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".notebook-", dir=output.parent) as folder:
        executed = Path(folder, "notebook.ipynb")
        try:
            execute(notebook, checked, Path(folder))
        finally:
            if executed.exists():
                write_file(output, executed.read_bytes())


@dataclass(frozen=True)
class Parameter:
    """A name that the `parameters` cell assigns, with its default and its type, if one is given.

    `source` is the default as it is written, e.g. "{1: 'one'}".
    """

    default: Any
    annotation: ast.expr | None
    source: str

    @property
    def recorded(self) -> Any:
        """The default as a record holds it: its source where JSON would change it."""
        return self.default if _survives_json(self.default) else self.source

    @property
    def type(self) -> str:
        if self.annotation is not None:
            return ast.unparse(self.annotation)
        return "any value" if self.default is None else type(self.default).__name__

    def fits(self, value: Any) -> bool:
        if self.annotation is not None:
            return _fits(value, self.annotation)
        return self.default is None or _fits(value, ast.Name(type(self.default).__name__))


@dataclass(frozen=True)
class Notebook:
    """What can be known of a notebook without running it. `sha256` covers its cells' sources."""

    path: Path
    parameters: dict[str, Parameter]
    sha256: str

    def fill(self, values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        """All parameters as a record holds them: the given values, checked, over the defaults.

        A whole number given for a float becomes a float, so that 1 and 1.0 are one value.
        Raises InputError that starts with `where`.
        """
        filled = {name: parameter.recorded for name, parameter in self.parameters.items()}
        for name, value in values.items():
            parameter = self.parameters.get(name)
            if parameter is None:
                known = ", ".join(sorted(self.parameters))
                raise InputError(
                    f"{where}: {self.path.name} has no parameter {name!r}"
                    f"{nearest(name, self.parameters)}; it has {known}"
                )
            if type(value) is int and not parameter.fits(value):
                number = _as_float(value)
                value = number if parameter.fits(number) else value
            if not parameter.fits(value):
                hint = ""
                if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
                    hint = " (YAML reads 1e-3 as text: write 1.0e-3)"
                raise InputError(
                    f"{where}: parameter {name!r} is {value!r}, and {self.path.name} wants "
                    f"{parameter.type}{hint}"
                )
            if not _survives_json(value):
                raise InputError(
                    f"{where}: parameter {name!r} is {value!r}, which JSON would change on its way "
                    "to the notebook; give text as keys, lists in place of tuples, finite numbers"
                )
            filled[name] = value
        return filled

    def changed(self, filled: Mapping[str, Any]) -> dict[str, Any]:
        """What to pass to the notebook: of what `fill` gave all but its own defaults."""
        return {
            name: value
            for name, value in filled.items()
            if json.dumps(value) != json.dumps(self.parameters[name].recorded)
        }


def read_notebook(path: Path) -> Notebook:
    """The notebook's declared parameters and the hash of its cells' sources.

    The cell tagged `parameters` is parsed, not run: papermill's own inspection loses `Literal`,
    `X | None` and strings with "=", and papermill only warns of an unknown name.
    Raises InputError for a file that is no notebook, or has not exactly one such cell.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [(cell["cell_type"], "".join(cell["source"]), cell) for cell in content["cells"]]
        tagged = [
            source
            for kind, source, cell in cells
            if kind == "code" and "parameters" in cell["metadata"].get("tags", [])
        ]
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such notebook; mend the path") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is not a notebook of format 4 ({error!r})") from error
    if len(tagged) != 1:
        raise InputError(
            f"{path}: has {len(tagged)} code cells tagged 'parameters'; tag exactly one"
        )
    sources = json.dumps([[kind, source] for kind, source, _ in cells])
    digest = hashlib.sha256(sources.encode()).hexdigest()
    return Notebook(path, _parse_parameters(tagged[0], path), digest)


def _parse_parameters(source: str, path: Path) -> dict[str, Parameter]:
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise InputError(f"{path}: parameters cell, line {error.lineno}: {error.msg}") from error
    parameters = {}
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                annotation: ast.expr | None = None
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                annotation = statement.annotation
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                continue
            case _:
                raise InputError(
                    f"{path}: parameters cell, line {statement.lineno}: "
                    "only imports and `name: type = value` may stand there"
                )
        try:
            parameters[name] = Parameter(ast.literal_eval(value), annotation, ast.unparse(value))
        except ValueError:
            raise InputError(
                f"{path}: parameters cell, line {statement.lineno}: {name!r} needs a plain value, "
                "not an expression"
            ) from None
    return parameters


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Whether a JSON value is of the annotated type; a type that is not known here takes any."""
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):
            return _fits(value, ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            types: dict[str, type] = {
                "bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict
            }  # fmt: skip
            return name not in types or type(value) is types[name]
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inner):
            if name == "Literal":
                choices = ast.literal_eval(inner)
                choices = choices if isinstance(choices, tuple) else (choices,)
                return any(type(value) is type(choice) and value == choice for choice in choices)
            if name == "Optional":
                return value is None or _fits(value, inner)
            if name == "list":
                return isinstance(value, list) and all(_fits(item, inner) for item in value)
            if name == "dict":
                return isinstance(value, dict)
    return True


def _survives_json(value: Any) -> bool:
    """Whether JSON gives the same back: no other keys than text, no tuple, no NaN, at any depth."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf  # which is refused


def execute(
    notebook: Path,
    parameters: Mapping[str, Any],
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Run a notebook with what `Notebook.fill` gave, and leave `folder`/notebook.ipynb.

    A process of its own runs papermill, since its working folder is not safe across threads; both
    that process and the kernel are killed by the system when this process ends, however it ends.
    On failure `folder`/log.txt keeps what the process and the kernel wrote beside the notebook.
    Raises NotebookError; Stopped when `stop` is set meanwhile.
    """
    stop = stop or threading.Event()
    scratch, log = folder / "scratch", folder / "log.txt"
    scratch.mkdir()
    given = read_notebook(notebook).changed(parameters)
    job = {"notebook": str(notebook), "parameters": given, "folder": str(folder)}
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    variables = {
        **os.environ,
        **(environment or {}),
        # The kernel is this Python's, and nobody's start-up files run in it.
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_RUNTIME_DIR": str(scratch.absolute()),
        "IPYTHONDIR": str(scratch.absolute()),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cmdlab.sweeps._papermill", str(scratch), str(os.getpid())],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for the caller, which then kills this process
        )
    try:
        while process.poll() is None:
            if stop.wait(0.05):
                raise Stopped
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    error = scratch / "error.json"
    if error.exists():
        raise NotebookError(**json.loads(error.read_text(encoding="utf-8")))
    if process.returncode != 0:
        tail = log.read_text(errors="replace")[-4000:]
        ended = f"exit status {process.returncode}"
        if process.returncode < 0:
            ended = f"signal {signal.Signals(-process.returncode).name}"
        raise NotebookError("ProcessDied", f"the notebook's process ended with {ended}", tail)
    shutil.rmtree(scratch)
    log.unlink()
