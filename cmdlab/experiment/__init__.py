"""One measured run, from a corpus and a recipe to a folder."""

from cmdlab.experiment.examples import write_examples
from cmdlab.experiment.run import (
    Data,
    make_deterministic,
    measure,
    open_data,
    pick_device,
    run_experiment,
)

__all__ = [
    "Data",
    "make_deterministic",
    "measure",
    "open_data",
    "pick_device",
    "run_experiment",
    "write_examples",
]
