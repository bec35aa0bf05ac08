"""Reports drawn from run folders, benchmarks and figures handed over: they compute no model."""

from cmdlab.reporting.ablation import write_report
from cmdlab.reporting.kernels import write_kernel_report
from cmdlab.reporting.publish import publish
from cmdlab.reporting.worth import Estimate, Worth, draw_worth

__all__ = ["Estimate", "Worth", "draw_worth", "publish", "write_kernel_report", "write_report"]
