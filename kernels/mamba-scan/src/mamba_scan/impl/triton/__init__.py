"""Triton kernels of the scan, the convolution and the scan with scalar decays, one file for each."""

import os

import torch

from mamba_scan.impl.triton.conv import conv_backward, conv_forward
from mamba_scan.impl.triton.scan import scan_backward, scan_forward
from mamba_scan.impl.triton.ssd import ssd_backward, ssd_forward
from mamba_scan.problem import ConvProblem, ScanProblem
from mamba_scan.problem_ssd import SSDProblem

__all__ = [
    "conv_backward",
    "conv_forward",
    "scan_backward",
    "scan_forward",
    "ssd_backward",
    "ssd_forward",
    "supports",
    "unavailable",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Say why this backend cannot run here, or None when it can."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA device is visible (TRITON_INTERPRET=1, set before Python starts, runs the kernels slowly on a CPU)"


def supports(p: ScanProblem | ConvProblem | SSDProblem) -> str | None:
    """Say why these tensors cannot be taken, or None."""
    if p.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"they are on {p.device}, needs {'cpu (interpreter)' if INTERPRETED else 'cuda'}"
    if p.dtype == torch.float64:
        return "they are float64, needs float32, bfloat16 or float16"
    if isinstance(p, ScanProblem) and p.A.is_complex():
        return "A is complex, needs a real A"
    return None
