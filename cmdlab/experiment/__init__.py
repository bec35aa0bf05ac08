"""One measured run, from a corpus and a recipe to a folder."""

from cmdlab.experiment.examples import write_examples
from cmdlab.experiment.planning import AMOUNTS, measure_throughput, plan
from cmdlab.experiment.run import (
    Data,
    make_deterministic,
    measure,
    open_data,
    pick_device,
    run_experiment,
)

__all__ = [
    "AMOUNTS",
    "Data",
    "make_deterministic",
    "measure",
    "measure_throughput",
    "open_data",
    "pick_device",
    "plan",
    "run_experiment",
    "write_examples",
]
