"""The boosted stages: buyer probability, amount of those who buy, and one model for both on log1p or Tweedie."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from .cache import FeatureCache, Ints, lightgbm_names
from .columns import Floats
from .features import Matrix

log = logging.getLogger(__name__)

CLASSIFIER: dict[str, Any] = {
    "objective": "binary",
    "n_estimators": 200,
    "learning_rate": 0.05,
    "num_leaves": 31,
    "max_depth": 8,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.5,
    "lambda_l2": 5.0,
    "max_cat_to_onehot": 8,
    "cat_smooth": 50.0,
    "cat_l2": 50.0,
    "max_bin": 127,
}
_FEW_ROWS = 30_000
# Fewer held-out rows say too little about when to stop.
_FEWEST_STOPPING = 100
_REWEIGHTED = {"scale_pos_weight", "is_unbalance"}
# Settings that shape the bins: models that differ in them cannot share a data set.
BINNING = ("max_bin", "min_data_in_bin", "enable_bundle", "use_missing", "zero_as_missing", "max_bin_by_feature")
REGRESSOR: dict[str, Any] = CLASSIFIER | {"objective": "regression"}


@dataclass
class Boosted:
    """LightGBM models by horizon, or one under ""; predicts on the raw scale of its objective's link."""

    boosters: dict[str, lgb.Booster]
    threads: int = 0

    def predict(self, matrix: Matrix, name: str = "") -> Floats:
        """One model's predictions [N]."""
        return predict(self.boosters[name], matrix, self.threads)

    def save(self, folder: Path, prefix: str) -> None:
        """One text file a model: `prefix` or `prefix`_`horizon`."""
        for name, booster in self.boosters.items():
            booster.save_model(str(folder / f"{prefix}{'_' if name else ''}{name}.txt"))

    @classmethod
    def load(cls, folder: Path, prefix: str, names: list[str], threads: int = 0) -> "Boosted":
        """The models `save` wrote."""
        files = {name: folder / f"{prefix}{'_' if name else ''}{name}.txt" for name in names}
        return cls({name: lgb.Booster(model_file=str(path)) for name, path in files.items()}, threads)


def predict(booster: lgb.Booster, matrix: npt.NDArray[Any], threads: int = 0) -> Floats:
    """A booster's predictions [N]; none for no rows."""
    if len(matrix) == 0:
        return np.empty(0)
    return np.asarray(booster.predict(matrix, num_threads=threads_for(len(matrix), threads)), dtype=np.float64)


def threads_for(rows: int, threads: int) -> int:
    """LightGBM's threads: on few rows one, because starting and joining more costs more than it saves."""
    return threads or (1 if rows < _FEW_ROWS else 0)


def parameters(base: dict[str, Any], overrides: dict[str, Any], seed: int, threads: int) -> tuple[dict[str, Any], int]:
    """LightGBM parameters and the number of trees; the same data gives the same trees."""
    merged = base | overrides
    rounds = int(merged.pop("n_estimators"))
    fixed = {
        "verbosity": -1,
        "feature_pre_filter": False,
        "deterministic": True,
        "force_col_wise": True,
        "seed": seed,
        "num_threads": threads,
    }
    return merged | fixed, rounds


@dataclass(frozen=True)
class Stopping:
    """When boosting stops: after `patience` trees without gain on these rows' features [V, F] and label [V]."""

    matrix: Matrix
    label: Floats
    patience: int


def train_on(
    data: lgb.Dataset,
    label: Floats,
    settings: dict[str, Any],
    rounds: int,
    weight: Floats | None = None,
    stopping: Stopping | None = None,
) -> lgb.Booster:
    """Train on a constructed data set with this label [N] and weight [N]; reweighted labels are never stopped.

    Args:
        data: features as LightGBM takes them.
        label: to learn.
        settings: LightGBM parameters.
        rounds: most trees.
        weight: of each row; 1 when None.
        stopping: rows that tell when to stop; None grows all trees.
    """
    data.set_label(label)
    data.set_weight(weight)
    settings = _threaded(settings, len(label))
    if stopping is None or len(stopping.label) < _FEWEST_STOPPING or _REWEIGHTED & set(settings):
        return lgb.train(settings, data, rounds)
    held_out = lgb.Dataset(stopping.matrix, stopping.label, reference=data, params=settings)
    patience = lgb.early_stopping(stopping.patience, first_metric_only=True, verbose=False)
    return lgb.train(settings, data, rounds, valid_sets=[held_out], callbacks=[patience])


def train_in_memory(
    matrix: Matrix,
    label: Floats,
    names: list[str],
    categorical: list[str],
    settings: dict[str, Any],
    rounds: int,
    weight: Floats | None = None,
    stopping: Stopping | None = None,
) -> lgb.Booster:
    """Train on rows in memory, for the few rows of buyers; leaves shrink with the number of rows.

    Args:
        matrix: features [N, F].
        label: to learn [N].
        names: of the features [F].
        categorical: those that are ids.
        settings: LightGBM parameters.
        rounds: most trees.
        weight: of each row [N]; 1 when None.
        stopping: rows that tell when to stop; None grows all trees.
    """
    settings = settings | {"min_data_in_leaf": min(settings.get("min_data_in_leaf", 20), max(3, len(label) // 40))}
    data = lgb.Dataset(
        matrix,
        label,
        weight=weight,
        feature_name=lightgbm_names(names),
        categorical_feature=[names.index(name) for name in categorical],
        params=settings,
    )
    return train_on(data, label, settings, rounds, weight, stopping)


def trees_of(booster: lgb.Booster) -> int:
    """How many trees predict: those up to where boosting stopped."""
    return booster.best_iteration if booster.best_iteration > 0 else booster.num_trees()


def blocked_folds(time: Floats, folds: int) -> npt.NDArray[np.int64]:
    """Fold of every row: contiguous stretches of time of equal size, so that neighbours in time share a fold [N].

    Args:
        time: of each row [N].
        folds: number of stretches, 2 or more.

    Raises:
        ValueError: fewer folds.
    """
    if folds < 2:
        raise ValueError(f"folds: got {folds}, needs at least 2")
    order = np.argsort(time, kind="stable")
    fold = np.empty(len(time), np.int64)
    fold[order] = np.arange(len(time)) * folds // max(len(time), 1)
    return fold


def predict_rows(cache: FeatureCache, rows: Ints, models: dict[str, tuple[Boosted, str]]) -> dict[str, Floats]:
    """Predictions of several models on cached rows, ascending, in one pass over the shards."""
    result = {key: np.empty(len(rows)) for key in models}
    for shard, matrix in cache.matrices():
        first, last = np.searchsorted(rows, [shard.start, shard.start + shard.rows])
        if last <= first:
            continue
        own = matrix[rows[first:last] - shard.start]
        for key, (model, name) in models.items():
            result[key][first:last] = model.predict(own, name)
    return result


def _threaded(settings: dict[str, Any], rows: int) -> dict[str, Any]:
    return settings | {"num_threads": threads_for(rows, settings["num_threads"])}
