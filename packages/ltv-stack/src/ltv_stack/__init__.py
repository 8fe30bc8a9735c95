"""Customer revenue at every horizon: nested features from Arrow, ordered outputs, intervals, calibration, reports."""

from .calibration import BucketCalibrator, IsotonicCalibrator
from .config import LTVConfig
from .conformal import ConformalIntervals
from .data import Dataset, Partition, from_table, open_partitions
from .drift import drift_table
from .engine import DaskEngine, LocalEngine, make_engine
from .errors import LeakageError, PartitionError, WindowError
from .evaluation import Evaluation, compare, evaluate
from .feature_groups import FeatureConfig
from .features import FeatureBuilder
from .guard import Finding, audit
from .metrics import (
    buyer_metrics,
    calibration_table,
    call_metrics,
    decile_table,
    interval_coverage,
    lift_table,
    lorenz,
    mutual_gini,
    normalized_gini,
    revenue_metrics,
)
from .nested import flatten_nested, nested_lookup, nested_recency, nested_statistics
from .order import check_order, project_order
from .pipeline import LTVPipeline, predict_table
from .report import model_card, write_report
from .sampling import Histogram, histos, histos_weights, histus, histus_weights, undo_weights
from .schema import Column, Horizon, Schema
from .smadex import smadex_features, smadex_schema

__all__ = [
    "BucketCalibrator",
    "Column",
    "ConformalIntervals",
    "DaskEngine",
    "Dataset",
    "Evaluation",
    "FeatureBuilder",
    "FeatureConfig",
    "Finding",
    "Histogram",
    "Horizon",
    "IsotonicCalibrator",
    "LTVConfig",
    "LTVPipeline",
    "LeakageError",
    "LocalEngine",
    "Partition",
    "PartitionError",
    "Schema",
    "WindowError",
    "audit",
    "buyer_metrics",
    "calibration_table",
    "call_metrics",
    "check_order",
    "compare",
    "decile_table",
    "drift_table",
    "evaluate",
    "flatten_nested",
    "from_table",
    "histos",
    "histos_weights",
    "histus",
    "histus_weights",
    "interval_coverage",
    "lift_table",
    "lorenz",
    "make_engine",
    "model_card",
    "mutual_gini",
    "nested_lookup",
    "nested_recency",
    "nested_statistics",
    "normalized_gini",
    "open_partitions",
    "predict_table",
    "project_order",
    "revenue_metrics",
    "smadex_features",
    "smadex_schema",
    "undo_weights",
    "write_report",
]
