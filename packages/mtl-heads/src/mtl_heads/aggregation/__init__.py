"""Gradient aggregators: from the tasks' gradients to one update direction."""

from .aligned import AlignedMTL, aligned_mtl_weights
from .base import GradientAggregator, GramianAggregator, SumAggregator
from .cagrad import CAGrad, cagrad_weights
from .mgda import MGDA, mgda_weights
from .nash import NashMTL, nash_mtl_weights
from .pcgrad import PCGrad, pcgrad_weights
from .torchjd import TorchJDAggregator

AGGREGATORS: dict[str, type[GramianAggregator]] = {
    "sum": SumAggregator,
    "pcgrad": PCGrad,
    "mgda": MGDA,
    "cagrad": CAGrad,
    "aligned_mtl": AlignedMTL,
    "nash_mtl": NashMTL,
}

__all__ = [
    "AGGREGATORS",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "GradientAggregator",
    "GramianAggregator",
    "NashMTL",
    "PCGrad",
    "SumAggregator",
    "TorchJDAggregator",
    "aligned_mtl_weights",
    "cagrad_weights",
    "mgda_weights",
    "nash_mtl_weights",
    "pcgrad_weights",
]
