"""Many runs: a sweep file becomes cells, and each cell a record."""

from cmdlab.sweeps.engines import choose_engine
from cmdlab.sweeps.files import read_sweep
from cmdlab.sweeps.notebooks import NotebookError, read_notebook, run_notebook
from cmdlab.sweeps.run import run_sweep

__all__ = [
    "NotebookError",
    "choose_engine",
    "read_notebook",
    "read_sweep",
    "run_notebook",
    "run_sweep",
]
