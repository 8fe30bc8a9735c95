"""Selective scan (Mamba) that trains anywhere: packed sequences, states with gradients; see ``selective_scan``."""

from mamba_scan.api import available_backends, selective_scan, selective_scan_fn

__all__ = ["available_backends", "selective_scan", "selective_scan_fn"]
