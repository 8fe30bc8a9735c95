"""Selective scan (Mamba) that trains anywhere: packed sequences, states with gradients; see ``selective_scan``."""

# First of all: it says how OpenMP waits, which torch's library reads when it is loaded.
from mamba_scan import waiting  # noqa: F401  # isort: skip

from mamba_scan.api import (
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_varlen_states,
    selective_scan,
    selective_scan_fn,
    ssd_scan,
)
from mamba_scan.block import MambaState
from mamba_scan.dispatch import available_backends
from mamba_scan.inner import mamba_inner_fn
from mamba_scan.mamba import Mamba
from mamba_scan.mamba2 import Mamba2
from mamba_scan.update import causal_conv1d_update, selective_state_update

__all__ = [
    "Mamba",
    "Mamba2",
    "MambaState",
    "available_backends",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "mamba_inner_fn",
    "selective_scan",
    "selective_scan_fn",
    "selective_state_update",
    "ssd_scan",
]
