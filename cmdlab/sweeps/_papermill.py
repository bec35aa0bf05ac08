"""The process that runs one notebook, started by `notebooks.execute`, and its kernel's watch."""

import ctypes
import json
import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path


def _run_papermill(scratch: Path) -> None:
    """What the process of its own does: run the job; a failure goes to error.json."""
    # Half the time of papermill's start goes into a grammar of web addresses, which jsonschema,
    # deep below it, does without when it cannot be imported.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    import papermill
    from papermill.exceptions import PapermillExecutionError

    job = json.loads((scratch / "job.json").read_text(encoding="utf-8"))
    # papermill formats paths as templates.
    output = str(Path(job["folder"], "notebook.ipynb")).replace("{", "{{").replace("}", "}}")
    started = threading.Event()

    def attempt() -> None:
        papermill.execute_notebook(
            job["notebook"].replace("{", "{{").replace("}", "}}"),
            output,
            parameters=job["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=300,
            on_notebook_start=lambda notebook: started.set(),
            extra_arguments=[
                "--IPKernelApp.exec_lines="
                "__import__('cmdlab.sweeps._papermill', fromlist=['_']).die_with_parent("
                f"{os.getpid()})"
            ],
        )

    try:
        try:
            attempt()
        except Exception:
            if started.is_set():
                raise
            # Kernels that start together can take each other's ports: once more.
            attempt()
    except PapermillExecutionError as error:
        text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
        failure = {"kind": error.ename, "message": error.evalue, "traceback": text}
    except Exception as error:
        failure = {
            "kind": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
    else:
        return
    (scratch / "error.json").write_text(json.dumps(failure), encoding="utf-8")
    sys.exit(1)


def die_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent, of this process id, ends.

    A parent killed by SIGKILL cannot stop its children, and ipykernel's own watch on its parent
    needs the interpreter's lock, which a long computation may hold.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    _run_papermill(Path(sys.argv[1]))
