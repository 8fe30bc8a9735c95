"""Multi-task heads, trunks, losses, weightings, gradient aggregators, metrics and diagnostics under one mask
contract."""

from . import losses, metrics
from .aggregation import (
    AGGREGATORS,
    MGDA,
    AlignedMTL,
    CAGrad,
    GradientAggregator,
    NashMTL,
    PCGrad,
    SumAggregator,
    TorchJDAggregator,
)
from .diagnostics import GradientMonitor
from .masks import split_labels
from .multitask import MultiTaskHeads
from .samplers import FrequencySampler, StreamingFrequency, UniformSampler
from .tasks import TaskLosses, TaskSpec, parse_task_weights
from .transforms import TargetTransform
from .trunks import AITM, PLE, MMoE, SharedBottom
from .weighting import (
    DWA,
    FAMO,
    WEIGHTINGS,
    GradNorm,
    LossWeighting,
    RandomWeighting,
    StaticWeighting,
    UncertaintyWeighting,
)

__all__ = [
    "AGGREGATORS",
    "AITM",
    "DWA",
    "FAMO",
    "MGDA",
    "PLE",
    "WEIGHTINGS",
    "AlignedMTL",
    "CAGrad",
    "FrequencySampler",
    "GradNorm",
    "GradientAggregator",
    "GradientMonitor",
    "LossWeighting",
    "MMoE",
    "MultiTaskHeads",
    "NashMTL",
    "PCGrad",
    "RandomWeighting",
    "SharedBottom",
    "StaticWeighting",
    "StreamingFrequency",
    "SumAggregator",
    "TargetTransform",
    "TaskLosses",
    "TaskSpec",
    "TorchJDAggregator",
    "UncertaintyWeighting",
    "UniformSampler",
    "losses",
    "metrics",
    "parse_task_weights",
    "split_labels",
]
