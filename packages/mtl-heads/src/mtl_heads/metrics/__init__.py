"""Metrics under the mask contract: fed batch by batch, exact over all of them, on CPU and GPU, over several
processes."""

from .base import Metric
from .calibration import CalibrationError
from .classification import AUROC, AveragePrecision
from .coverage import CatalogueCoverage
from .propensity import PropensityScore, official_diversity, official_novelty
from .ranking import RankingMetrics, catalogue_ranks, ranks

__all__ = [
    "AUROC",
    "AveragePrecision",
    "CalibrationError",
    "CatalogueCoverage",
    "Metric",
    "PropensityScore",
    "RankingMetrics",
    "catalogue_ranks",
    "official_diversity",
    "official_novelty",
    "ranks",
]
