"""Jagged HSTU attention with fused relative position and time bias; see ``hstu_attention``."""

# First of all: it says how OpenMP waits, which torch's library reads when it is loaded.
from hstu_kernels import waiting  # noqa: F401  # isort: skip

from hstu_kernels.api import hstu_attention
from hstu_kernels.cache import RaggedKVCache
from hstu_kernels.dispatch import available_backends
from hstu_kernels.layer import HSTU, HSTULayer

__all__ = ["HSTU", "HSTULayer", "RaggedKVCache", "available_backends", "hstu_attention"]
