"""The registered ops, one file for each; none knows a backend but by name."""

from mamba_scan.ops.conv import conv
from mamba_scan.ops.inner import InnerProblem, inner
from mamba_scan.ops.scan import scan, state_update
from mamba_scan.ops.ssd import ssd

__all__ = ["InnerProblem", "conv", "inner", "scan", "ssd", "state_update"]
