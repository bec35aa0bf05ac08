"""Reports drawn from run folders and benchmarks: they read records and nothing else."""

from cmdlab.reporting.ablation import write_report
from cmdlab.reporting.kernels import write_kernel_report
from cmdlab.reporting.publish import publish

__all__ = ["publish", "write_kernel_report", "write_report"]
