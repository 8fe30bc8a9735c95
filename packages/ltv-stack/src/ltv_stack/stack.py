"""Stage 3: elastic net, random forest and XGBoost under a LightGBM with Huber loss, on out-of-fold predictions only."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
from sklearn.linear_model import ElasticNet

from .columns import Floats
from .stages import predict, threads_for

log = logging.getLogger(__name__)

BASES = ("elastic_net", "random_forest", "xgboost")
META: dict[str, Any] = {
    "objective": "huber",
    "alpha": 1.0,
    "n_estimators": 150,
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_data_in_leaf": 200,
    "lambda_l2": 1.0,
}


class Base(Protocol):
    """A base learner of the stack."""

    def fit(self, features: Floats, target: Floats) -> "Base":
        """Learn target [N] from features [N, M]."""
        ...

    def predict(self, features: Floats) -> Floats:
        """Predictions [N], each row's from that row alone, bit by bit."""
        ...

    def save(self, path: Path) -> None:
        """Write one file, `path` plus a suffix."""
        ...


class ElasticNetBase:
    """Elastic net on standardised features."""

    def __init__(self, seed: int, threads: int) -> None:
        self.seed = seed
        self.mean = self.scale = self.weights = np.empty(0)
        self.intercept = 0.0

    def fit(self, features: Floats, target: Floats) -> "ElasticNetBase":
        """Learn target [N] from features [N, M]."""
        self.mean = features.mean(axis=0)
        self.scale = np.where(features.std(axis=0) > 0, features.std(axis=0), 1.0)
        model = ElasticNet(alpha=1e-3, l1_ratio=0.5, random_state=self.seed, max_iter=5000, tol=1e-3)
        model.fit((features - self.mean) / self.scale, target)
        self.weights, self.intercept = np.asarray(model.coef_), float(model.intercept_)
        return self

    def predict(self, features: Floats) -> Floats:
        """Predictions [N]."""
        # Column by column: a matrix product may round differently for another number of rows.
        total = np.full(len(features), self.intercept)
        for column, (mean, scale, weight) in enumerate(zip(self.mean, self.scale, self.weights, strict=True)):
            total += weight * ((features[:, column] - mean) / scale)
        return total

    def save(self, path: Path) -> None:
        """Write `path`.json."""
        state = {"mean": self.mean.tolist(), "scale": self.scale.tolist(), "weights": self.weights.tolist()}
        path.with_suffix(".json").write_text(json.dumps(state | {"intercept": self.intercept}))

    @classmethod
    def load(cls, path: Path, threads: int) -> "ElasticNetBase":
        """What `save` wrote."""
        one, state = cls(0, threads), json.loads(path.with_suffix(".json").read_text())
        one.mean, one.scale, one.weights = (np.array(state[name]) for name in ("mean", "scale", "weights"))
        one.intercept = state["intercept"]
        return one


class RandomForestBase:
    """Random forest, grown by LightGBM so that it is saved as text and predicts row by row."""

    def __init__(self, seed: int, threads: int) -> None:
        self.threads = threads
        self.settings: dict[str, Any] = {
            "objective": "regression",
            "boosting": "rf",
            "bagging_freq": 1,
            "bagging_fraction": 0.6,
            "feature_fraction": 0.7,
            "num_leaves": 255,
            "min_data_in_leaf": 50,
            "verbosity": -1,
            "deterministic": True,
            "force_col_wise": True,
            "seed": seed,
        }
        self.threads = threads
        self.booster: lgb.Booster | None = None

    def fit(self, features: Floats, target: Floats) -> "RandomForestBase":
        """Learn target [N] from features [N, M]."""
        own = {"min_data_in_leaf": min(50, max(3, len(target) // 40))}
        own["num_threads"] = threads_for(len(target), self.threads)
        self.booster = lgb.train(self.settings | own, lgb.Dataset(features, target), 100)
        return self

    def predict(self, features: Floats) -> Floats:
        """Predictions [N]."""
        assert self.booster is not None
        return predict(self.booster, features, self.threads)

    def save(self, path: Path) -> None:
        """Write `path`.txt."""
        assert self.booster is not None
        self.booster.save_model(str(path.with_suffix(".txt")))

    @classmethod
    def load(cls, path: Path, threads: int) -> "RandomForestBase":
        """What `save` wrote."""
        one = cls(0, threads)
        one.booster = lgb.Booster(model_file=str(path.with_suffix(".txt")))
        return one


class XGBoostBase:
    """Gradient boosting by XGBoost (extra `xgboost`)."""

    def __init__(self, seed: int, threads: int) -> None:
        self.threads = threads
        self.settings: dict[str, Any] = {
            "objective": "reg:squarederror",
            "max_depth": 4,
            "eta": 0.08,
            "subsample": 0.8,
            "lambda": 2.0,
            "seed": seed,
            "tree_method": "hist",
        }
        self.booster: Any = None

    def fit(self, features: Floats, target: Floats) -> "XGBoostBase":
        """Learn target [N] from features [N, M]."""
        import xgboost

        own = {"nthread": threads_for(len(target), self.threads)}
        self.booster = xgboost.train(self.settings | own, xgboost.DMatrix(features, target), 120)
        return self

    def predict(self, features: Floats) -> Floats:
        """Predictions [N]."""
        return np.asarray(self.booster.inplace_predict(features), dtype=np.float64)

    def save(self, path: Path) -> None:
        """Write `path`.ubj."""
        self.booster.save_model(str(path.with_suffix(".ubj")))

    @classmethod
    def load(cls, path: Path, threads: int) -> "XGBoostBase":
        """What `save` wrote."""
        import xgboost

        one = cls(0, threads)
        one.booster = xgboost.Booster(params={"nthread": threads})
        one.booster.load_model(str(path.with_suffix(".ubj")))
        return one


_KINDS: dict[str, Any] = {
    "elastic_net": ElasticNetBase,
    "random_forest": RandomForestBase,
    "xgboost": XGBoostBase,
}


class Stack:
    """One stack a horizon: bases on meta-features, a Huber LightGBM on meta-features and the bases' predictions.

    `fit` must be given out-of-fold meta-features; the bases' own predictions are made out of fold here.

    Args:
        bases: names out of `BASES`; None for all that are installed.
        meta: LightGBM parameters that differ from `META`.
        seed: of all learners.
        threads: of all learners, 0 for all cores.
    """

    def __init__(
        self, bases: Sequence[str] | None = None, meta: dict[str, Any] | None = None, seed: int = 0, threads: int = 0
    ) -> None:
        self.bases = tuple(_installed() if bases is None else bases)
        unknown = [name for name in self.bases if name not in BASES]
        if unknown or not self.bases:
            raise ValueError(f"stacking_bases: got {list(self.bases)}, needs names out of {list(BASES)}")
        if "xgboost" in self.bases and "xgboost" not in _installed():
            raise ImportError("stacking_bases: 'xgboost' needs the extra: pip install 'ltv-stack[xgboost]'")
        self.meta = META | (meta or {})
        self.seed, self.threads = seed, threads
        self.fitted: dict[str, dict[str, Base]] = {}
        self.boosters: dict[str, lgb.Booster] = {}

    def fit(self, features: Floats, targets: dict[str, Floats], fold: npt.NDArray[np.int64]) -> "Stack":
        """Learn every horizon.

        Args:
            features: out-of-fold meta-features [N, M].
            targets: horizon -> log1p of the amount, NaN where unknown [N].
            fold: fold of each row [N].

        Returns:
            the stack itself.
        """
        for horizon, target in targets.items():
            known = np.isfinite(target)
            x, y, own = features[known], target[known], fold[known]
            held_out = np.zeros((len(y), len(self.bases)))
            self.fitted[horizon] = {}
            for column, name in enumerate(self.bases):
                for f in np.unique(own):
                    inside = own == f
                    model = _KINDS[name](self.seed, self.threads).fit(x[~inside], y[~inside])
                    held_out[inside, column] = model.predict(x[inside])
                self.fitted[horizon][name] = _KINDS[name](self.seed, self.threads).fit(x, y)
            settings = {k: v for k, v in self.meta.items() if k != "n_estimators"}
            settings |= {"verbosity": -1, "deterministic": True, "force_col_wise": True}
            settings |= {"seed": self.seed, "num_threads": threads_for(len(y), self.threads)}
            settings["min_data_in_leaf"] = min(settings.get("min_data_in_leaf", 20), max(3, len(y) // 40))
            data = lgb.Dataset(np.column_stack([x, held_out]), y)
            self.boosters[horizon] = lgb.train(settings, data, self.meta["n_estimators"])
        return self

    def predict(self, features: Floats, horizon: str) -> Floats:
        """log1p of the amount [N]."""
        if len(features) == 0:
            return np.empty(0)
        features = np.ascontiguousarray(features)
        own = [self.fitted[horizon][name].predict(features) for name in self.bases]
        stacked = np.column_stack([features, *own])
        return predict(self.boosters[horizon], stacked, self.threads)

    def save(self, folder: Path) -> None:
        """Write every learner under `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for horizon, booster in self.boosters.items():
            booster.save_model(str(folder / f"meta_{horizon}.txt"))
            for name, model in self.fitted[horizon].items():
                model.save(folder / f"{name}_{horizon}")
        state = {"bases": self.bases, "meta": self.meta, "seed": self.seed, "horizons": list(self.boosters)}
        (folder / "stack.json").write_text(json.dumps(state))

    @classmethod
    def load(cls, folder: Path, threads: int = 0) -> "Stack":
        """The stack `save` wrote."""
        state = json.loads((folder / "stack.json").read_text())
        one = cls(state["bases"], state["meta"], state["seed"], threads)
        for horizon in state["horizons"]:
            one.boosters[horizon] = lgb.Booster(model_file=str(folder / f"meta_{horizon}.txt"))
            one.fitted[horizon] = {name: _KINDS[name].load(folder / f"{name}_{horizon}", threads) for name in one.bases}
        return one


def meta_features(probability: Floats, amounts: dict[str, Floats], blend: dict[str, float]) -> Floats:
    """Meta-features of the document: buyer probability, every horizon's amount, their blend, buyer x amount [N, M].

    Args:
        probability: buyer probability [N].
        amounts: horizon -> log1p amount of those who buy [N].
        blend: horizon -> weight in the blend.
    """
    total = sum(blend.values())
    mixed = np.zeros(len(probability))
    for name, column in amounts.items():
        mixed = mixed + blend[name] / total * column
    products = [probability * column for column in amounts.values()]
    return np.column_stack([probability, *amounts.values(), mixed, *products, probability * mixed])


def _installed() -> tuple[str, ...]:
    from importlib.util import find_spec

    return BASES if find_spec("xgboost") else BASES[:2]
