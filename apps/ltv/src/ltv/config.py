"""Every setting of the app, in dataclasses that the command line, the YAML files and Python callers share.

The names are those of the published pipeline's YAML where it has one. A YAML file holds only what differs from these
defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from runkit.errors import SettingError

# Whose versions the record of a run holds.
PACKAGES = ("ltv", "ltv-stack", "lightgbm", "numpy", "pandas", "pyarrow", "scikit-learn", "xgboost", "torch")
PARTITION = "%Y-%m-%d-%H-%M"
Split = Literal["train", "val", "test"]


@dataclass
class ImportConfig:
    """How a file of transactions becomes rows: what a customer did first, and what came after.

    Args:
        first_days: days after the first purchase that are observed; the row's time is their end
        horizons: days after the row's time in which money is counted, rising
    """

    first_days: int = 14
    horizons: list[int] = field(default_factory=lambda: [1, 7, 14, 28])

    def check(self) -> None:
        """Raise ValueError for windows that cannot be."""
        if self.first_days < 1:
            raise ValueError(f"first_days: got {self.first_days}, needs at least 1")
        if not self.horizons or self.horizons != sorted(set(self.horizons)) or self.horizons[0] < 1:
            raise ValueError(f"horizons: got {self.horizons}, needs rising numbers of days, e.g. [1, 7, 14, 28]")


@dataclass
class DataConfig:
    """Where the log lies and which hours are used for what. Windows include both ends; null = open.

    Args:
        root: folder of train_dir and test_dir; "$NAME/..." is filled from the environment
        train_dir: folder of the labelled partitions below root
        test_dir: folder of the partitions to predict below root
        layout: "advertising" for the 84 columns, "transactions" for what `ltv import` writes
        horizons: horizons asked for; one whose amount the data lacks is skipped with a log line
        train_start: first hour of the train window, YYYY-MM-DD-HH-MM
        train_end: last hour of the train window
        val_start: first hour of the validation window
        val_end: last hour of the validation window
        model_start: first hour of the joint window of split.strategy "stratified_random"
        model_end: last hour of it
        test_start: first hour of the test window
        test_end: last hour of the test window
        on_error: "raise" stops at a damaged file, "skip" reads every file through first and leaves damaged ones out,
            with a warning that names them
    """

    root: str = "data/raw"
    train_dir: str = "train/train"
    test_dir: str = "test/test"
    layout: Literal["advertising", "transactions"] = "advertising"
    horizons: list[str] = field(default_factory=lambda: ["d1", "d7", "d14", "d28"])
    train_start: str | None = None
    train_end: str | None = None
    val_start: str | None = None
    val_end: str | None = None
    model_start: str | None = None
    model_end: str | None = None
    test_start: str | None = None
    test_end: str | None = None
    on_error: Literal["raise", "skip"] = "raise"


@dataclass
class SplitConfig:
    """How rows are held out.

    Args:
        strategy: "temporal" = the newest rows of train_* calibrate; "cross_fit" = every row of train_* trains and
            calibrates, in training.n_folds + 1 fits, for few rows; "stratified_random" = a random part of model_*, by
            buyers
        val_share: share of the rows that calibrates; not used by "cross_fit"
        embargo_hours: hours left out between the train window's end and what it is tuned on
    """

    strategy: Literal["temporal", "cross_fit", "stratified_random"] = "temporal"
    val_share: float = 0.2
    embargo_hours: int = 0


@dataclass
class SamplingConfig:
    """How much of each window is read.

    Args:
        frac: share of the rows of every split
        train_frac: share of the train rows; null = frac
        val_frac: share of the validation rows; null = frac
        max_train_partitions: first partitions of the train window; null = all
        max_val_partitions: first partitions of the validation window; null = all
        limit_rows: first rows of the train window after sampling; null = all
    """

    frac: float = 1.0
    train_frac: float | None = None
    val_frac: float | None = None
    max_train_partitions: int | None = None
    max_val_partitions: int | None = None
    limit_rows: int | None = None


@dataclass
class TrainingConfig:
    """How training reads and splits its rows.

    Args:
        split: how rows are held out
        sampling: how much is read
        chunk_size: rows in memory at once while streaming; results do not depend on it
        n_folds: folds of the out-of-fold predictions the stack is fitted on, and of split.strategy "cross_fit"
        cache_features: keep the feature matrices as Parquet files below <run_dir>/processed
        max_rows: most training rows, drawn by hash; null = all
    """

    split: SplitConfig = field(default_factory=SplitConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    chunk_size: int = 50_000
    n_folds: int = 3
    cache_features: bool = True
    max_rows: int | None = None


@dataclass
class ModelsConfig:
    """Which model is fitted, for which estimand, and how large.

    Args:
        model: which model the revenue columns come from
        estimand: what they mean: "log1p" is what MSLE asks for, "mean" what a bid asks for; or "median", "quantile:0.9"
        sampling: rebalancing by the rarity of the revenue, undone afterwards: none, or histos, histus, histos_weights,
            histus_weights joined by "+"; histos shapes the buyer model's rows, histus those of the amounts
        histos: HistOS settings that differ from the published ones: bins, beta, alpha, max_over
        histus: HistUS settings that differ from the published ones: bins, beta
        quantiles: levels put out beside the estimand, e.g. [0.5, 0.9]
        intervals: level of the conformal intervals; null = none
        calibration: calibration of the money on held-out rows
        calibrate_by: column whose values get a calibration of their own; null = one calibration
        buyer_classifier: LightGBM parameters of the buyer model, n_estimators included
        revenue_regressor: LightGBM parameters of the revenue models
        stacking_bases: base models of the stack; null = all that are installed
        stacking_meta: LightGBM parameters of the stack's last model
        deep: settings of the neural heads
        early_stopping: trees without gain on held-out rows after which boosting stops; null = grow all
        guard: "strict" refuses columns that leak, "report" only logs them, "off" does not look
        threads: threads of LightGBM; 0 = all cores
    """

    model: Literal["log1p", "tweedie", "two_stage", "document", "stack", "ziln", "odmn", "optdist"] = "log1p"
    estimand: str = "log1p"
    sampling: str = "none"
    histos: dict[str, Any] = field(default_factory=dict)
    histus: dict[str, Any] = field(default_factory=dict)
    quantiles: list[float] = field(default_factory=list)
    intervals: float | None = 0.9
    calibration: Literal["none", "isotonic", "bucket"] = "none"
    calibrate_by: str | None = None
    buyer_classifier: dict[str, Any] = field(default_factory=dict)
    revenue_regressor: dict[str, Any] = field(default_factory=dict)
    stacking_bases: list[str] | None = None
    stacking_meta: dict[str, Any] = field(default_factory=dict)
    deep: dict[str, Any] = field(default_factory=dict)
    early_stopping: int | None = 30
    guard: Literal["strict", "report", "off"] = "strict"
    threads: int = 0


@dataclass
class InferenceConfig:
    """How much `predict` and `submit` read.

    Args:
        chunk_size: rows per chunk; null = training.chunk_size. Predictions do not depend on it
        max_partitions: first partitions only
        sample_frac: share of the rows
        limit_rows: first rows only
        target: horizon whose amount goes into submission.csv
    """

    chunk_size: int | None = None
    max_partitions: int | None = None
    sample_frac: float = 1.0
    limit_rows: int | None = None
    target: str = "d7"


@dataclass
class EngineConfig:
    """What the partitions are worked on with.

    Args:
        name: "local" streams them in this process, "dask" shares them among workers
        address: scheduler of a running Dask cluster; null starts a local one
        workers: worker processes of that local cluster
    """

    name: Literal["local", "dask"] = "local"
    address: str | None = None
    workers: int = 2


@dataclass
class Config:
    """All settings of a run.

    Args:
        run_dir: folder of everything that is written
        data: where the log lies and which hours are used for what
        features: feature catalogue (YAML); null = the shipped features.yaml for the layout
        training: how training reads and splits its rows
        models: which model is fitted
        inference: how much is read for predictions
        engine: local or Dask
        seed: seed of sampling, folds and models
    """

    run_dir: str = "runs/ltv"
    data: DataConfig = field(default_factory=DataConfig)
    features: str | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    models: ModelsConfig = field(default_factory=ModelsConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    seed: int = 42


@dataclass
class Slice:
    """Which rows a command reads; what is None is taken from the config.

    Args:
        split: "train", "val" or "test"
        start_dt: first hour, YYYY-MM-DD-HH-MM
        end_dt: last hour
        sample_frac: share of the rows, drawn by a hash of their place, whatever the chunk size
        max_partitions: first partitions only
        limit_rows: first rows only, after sampling
        chunk_size: rows in memory at once
    """

    split: Split = "val"
    start_dt: str | None = None
    end_dt: str | None = None
    sample_frac: float | None = None
    max_partitions: int | None = None
    limit_rows: int | None = None
    chunk_size: int | None = None


@dataclass
class Submission:
    """What is handed in, and how.

    Args:
        message: the note that goes with it
        competition: Kaggle's short name of the competition
        sample_submission: CSV whose first column holds the row ids that are asked for, in their order; null = the ids
            of the test partitions
        align_order: put the lines into the order of the ids that are asked for
        dry_run: check and align, but hand nothing in
    """

    message: str = "ltv"
    competition: str = "smadex-challenge-predict-the-revenue"
    sample_submission: str | None = None
    align_order: bool = False
    dry_run: bool = False


def partition_time(text: str, name: str) -> datetime:
    """Return the hour a partition name stands for.

    Raises:
        SettingError: if `text` is not YYYY-MM-DD-HH-MM; the message names the setting `name`.
    """
    try:
        return datetime.strptime(text, PARTITION)
    except ValueError:
        raise SettingError(f"{name}: got {text!r}, needs YYYY-MM-DD-HH-MM, e.g. 2025-10-01-00-00") from None
