"""Metrics under the mask contract: fed batch by batch, exact over all of them, on CPU and GPU, over several
processes."""

from .base import Metric
from .calibration import CalibrationError
from .classification import AUROC, AveragePrecision
from .coverage import CatalogueCoverage
from .propensity import (
    NOVELTY_POWER,
    SHARES,
    PropensityScore,
    official_diversity,
    official_novelty,
    propensity_influence,
)
from .ranking import RankingMetrics, catalogue_ranks, ranks, top_items
from .roc import auroc, auroc_influence
from .task_losses import MeanLosses

__all__ = [
    "AUROC",
    "NOVELTY_POWER",
    "SHARES",
    "AveragePrecision",
    "CalibrationError",
    "CatalogueCoverage",
    "MeanLosses",
    "Metric",
    "PropensityScore",
    "RankingMetrics",
    "auroc",
    "auroc_influence",
    "catalogue_ranks",
    "official_diversity",
    "official_novelty",
    "propensity_influence",
    "ranks",
    "top_items",
]
