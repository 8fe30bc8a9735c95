"""Fitting the models of a pipeline on cached features."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from . import stages
from .cache import FeatureCache, Ints
from .columns import Floats
from .config import DEEP, LTVConfig, embargo_seconds
from .features import Matrix
from .labels import Labels
from .models import Models, blend_weights
from .sampling import Histogram, histos, histos_weights, histus, histus_weights, undo_weights
from .split import drawn_rows, folds_of
from .stack import Stack, meta_features
from .stages import Boosted

log = logging.getLogger(__name__)

_STOPPING_ROWS = 50_000


class Trainer:
    """Fits models on any rows of a cache.

    Args:
        config: settings.
        cache: features of all rows.
        labels: of all rows.
        horizons: those to fit, in order.
        main: the horizon whose buyers the classifier learns.
        category_sizes: feature that holds dictionary ids -> how many there are.
        done: called with the name of a stage when it is fitted.
    """

    def __init__(
        self,
        config: LTVConfig,
        cache: FeatureCache,
        labels: Labels,
        horizons: list[str],
        main: str,
        category_sizes: Mapping[str, int],
        done: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.config, self.cache, self.horizons, self.main = config, cache, horizons, main
        self.revenue, self.buyers = labels.revenue, labels.buyers(main)
        self.category_sizes, self.done = category_sizes, done
        self._stop_on: tuple[Ints, Matrix] | None = None

    def fit(self, rows: Ints, stopping_rows: Ints, trees: Mapping[str, int] | None = None) -> Models:
        """Every model on these rows.

        Args:
            rows: to train on, ascending.
            stopping_rows: rows that tell boosting when to stop, unless the trees are counted.
            trees: how many each booster of `Models.boosters` grows.

        Returns:
            the fitted models.
        """
        config, trees = self.config, trees or {}
        settings, rounds = self._settings(stages.CLASSIFIER, config.buyer_classifier)
        data = self.cache.dataset(rows, settings)
        if config.early_stopping is not None and not trees:
            chosen = drawn_rows(self.cache, stopping_rows, _STOPPING_ROWS)
            self._stop_on = chosen, self.cache.take(chosen)
        classifier, class_weights = self._classifier(data, rows, settings, trees.get("buyer:", rounds))
        self.done("classifier")
        amounts = self._amounts(rows, trees)
        self.done("amounts")
        models = Models(config.model, self.horizons, self.main, classifier, class_weights, amounts)
        if config.model in ("log1p", "tweedie"):
            models.points = self._points(data, rows, trees)
        elif config.model == "stack":
            models.stack = self._stack(models, data, rows, settings)
        elif config.model in DEEP:
            models.deep = self._deep(rows)
        self._stop_on = None
        self.done("model")
        return models

    def cross_fit(self, rows: Ints) -> tuple[Models, dict[str, Floats]]:
        """Models of all rows, and scores of every row by models that never saw its stretch of time.

        The models of all rows grow as many trees as were right on average for the rows left out.

        Args:
            rows: to train on, ascending.

        Raises:
            ValueError: the embargo leaves no rows beside a fold.
        """
        time, gap = self.cache.time[rows], embargo_seconds(self.config.embargo)
        scores: dict[str, Floats] = {}
        grown: dict[str, list[int]] = {}
        for own in folds_of(self.cache, rows, self.config.folds):
            first, last = self.cache.time[own].min(), self.cache.time[own].max()
            near = (time > first - gap) & (time < last + gap) if gap else np.zeros(len(rows), dtype=bool)
            outside = rows[~(near | np.isin(rows, own))]
            if not len(outside):
                raise ValueError(f"embargo: {self.config.embargo} leaves no rows beside a fold of {len(own)} rows")
            models = self.fit(outside, own)
            at = np.searchsorted(rows, own)
            for key, column in models.scores_of(self.cache, own).items():
                scores.setdefault(key, np.empty(len(rows)))[at] = column
            for key, booster in models.boosters().items():
                grown.setdefault(key, []).append(stages.trees_of(booster))
        trees = {key: max(1, round(float(np.mean(counts)))) for key, counts in grown.items()}
        return self.fit(rows, np.empty(0, np.int64), trees), scores

    def out_of_fold(
        self, models: Models, data: lgb.Dataset, rows: Ints, chosen: Ints, settings: dict[str, Any]
    ) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Meta-features of rows[chosen] by models fitted without their fold, and the folds.

        Args:
            models: of all rows; the models of a fold grow as many trees, which held-out rows chose.
            data: the rows as the classifier takes them.
            rows: to train on, ascending.
            chosen: positions among them, ascending.
            settings: of the classifier.
        """
        fold = stages.blocked_folds(self.cache.time[rows], self.config.folds)
        buyer = np.nan_to_num(self.buyers[rows])
        weight = self._classifier_weight(rows) * np.isfinite(self.buyers[rows])
        p = np.empty(len(chosen))
        g = {name: np.empty(len(chosen)) for name in self.horizons}
        for f in range(self.config.folds):
            outside, own = np.flatnonzero(fold != f), np.flatnonzero(fold[chosen] == f)
            part = data.subset(outside.tolist()).construct()
            trees = stages.trees_of(models.classifier.boosters[""])
            booster = stages.train_on(part, buyer[outside], settings, trees, _none_if_one(weight[outside]))
            fitted: dict[str, tuple[Boosted, str]] = {"p": (Boosted({"": booster}, self.config.threads), "")}
            for name in self.horizons:
                y = self.revenue[name]
                others = rows[outside]
                trees = stages.trees_of(models.amounts.boosters[name])
                amount = self._amount(others[y[others] > 0], y, trees=trees)
                fitted[name] = (Boosted({"": amount}, self.config.threads), "")
            found = stages.predict_rows(self.cache, rows[chosen[own]], fitted)
            p[own] = undo_weights(found["p"], *models.class_weights)
            for name in self.horizons:
                g[name][own] = np.maximum(found[name], 0.0)
        return meta_features(p, g, blend_weights(self.horizons, self.main)), fold[chosen]

    def _settings(self, base: dict[str, Any], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        return stages.parameters(base, dict(overrides), self.config.seed, self.config.threads)

    def _stopping(self, target: Floats) -> stages.Stopping | None:
        if self.config.early_stopping is None or self._stop_on is None:
            return None
        rows, matrix = self._stop_on
        known = np.isfinite(target[rows])
        return stages.Stopping(matrix[known], target[rows[known]], self.config.early_stopping)

    def _classifier(
        self, data: lgb.Dataset, rows: Ints, settings: dict[str, Any], rounds: int
    ) -> tuple[Boosted, tuple[float, float]]:
        buyer = self.buyers[rows]
        known = np.isfinite(buyer)
        if not 0 < np.nansum(buyer) < known.sum():
            raise ValueError(
                f"dataset: {int(np.nansum(buyer))} of {int(known.sum())} training rows bought by {self.main}; "
                "a buyer classifier needs both kinds: widen the window or raise the sample"
            )
        weight = self._classifier_weight(rows) * known
        class_weights = (float(weight[buyer == 1].mean()), float(weight[buyer == 0].mean()))
        resampled = "histos" in self.config.sampling
        stopping = None if resampled else self._stopping(self.buyers)
        booster = stages.train_on(data, np.nan_to_num(buyer), settings, rounds, _none_if_one(weight), stopping)
        return Boosted({"": booster}, self.config.threads), class_weights

    def _classifier_weight(self, rows: Ints) -> Floats:
        """How often each row is trained on: the multiplicities of HistOS on the amount, drawn or expected."""
        amount = np.nan_to_num(self.revenue[self.main][rows])
        parts = self.config.sampling.split("+")
        settings = _with_histogram(self.config.histos, amount)
        if "histos" in parts:
            drawn = histos(amount, seed=self.config.seed, **settings)
            return np.bincount(drawn, minlength=len(rows)).astype(np.float64)
        if "histos_weights" in parts:
            return histos_weights(amount, **settings)
        return np.ones(len(rows))

    def _amounts(self, rows: Ints, trees: Mapping[str, int]) -> Boosted:
        boosters = {}
        for name in self.horizons:
            y = self.revenue[name]
            stopping = None if "histus" in self.config.sampling else self._stopping(_log_of_buyers(y))
            grown = trees.get(f"amount:{name}")
            boosters[name] = self._amount(rows[y[rows] > 0], y, trees=grown, stopping=stopping)
        return Boosted(boosters, self.config.threads)

    def _amount(
        self, rows: Ints, y: Floats, *, trees: int | None = None, stopping: stages.Stopping | None = None
    ) -> lgb.Booster:
        settings, rounds = self._settings(stages.REGRESSOR, self.config.revenue_regressor)
        parts = self.config.sampling.split("+")
        weight = None
        if "histus" in parts:
            rows = rows[histus(y[rows], seed=self.config.seed, **_with_histogram(self.config.histus, y[rows]))]
        elif "histus_weights" in parts:
            weight = histus_weights(y[rows], **_with_histogram(self.config.histus, y[rows]))
        names, categorical = self.cache.names, self.cache.categorical
        return stages.train_in_memory(
            self.cache.take(rows), np.log1p(y[rows]), names, categorical, settings, trees or rounds, weight, stopping
        )

    def _points(self, data: lgb.Dataset, rows: Ints, trees: Mapping[str, int]) -> Boosted:
        base = dict(stages.REGRESSOR)
        if self.config.model == "tweedie":
            base |= {"objective": "tweedie", "tweedie_variance_power": 1.5}
        settings, rounds = self._settings(base, self.config.revenue_regressor)
        classifier = {**stages.CLASSIFIER, **self.config.buyer_classifier}
        if any(settings.get(key) != classifier.get(key) for key in stages.BINNING):
            data = self.cache.dataset(rows, settings)
        boosters = {}
        for name in self.horizons:
            y = self.revenue[name]
            target = np.log1p(y) if self.config.model == "log1p" else y
            weight = _none_if_one(np.isfinite(y[rows]) * 1.0)
            grown = trees.get(f"point:{name}", rounds)
            boosters[name] = stages.train_on(
                data, np.nan_to_num(target[rows]), settings, grown, weight, self._stopping(target)
            )
        return Boosted(boosters, self.config.threads)

    def _stack(self, models: Models, data: lgb.Dataset, rows: Ints, settings: dict[str, Any]) -> Stack:
        """Every meta-feature of a row comes from models that were fitted without its fold."""
        config = self.config
        chosen = np.arange(len(rows))
        if len(rows) > config.stack_rows:
            log.info("stack_rows: the stack is trained on %d of %d rows", config.stack_rows, len(rows))
            chosen = np.searchsorted(rows, drawn_rows(self.cache, rows, config.stack_rows))
        features, fold = self.out_of_fold(models, data, rows, chosen, settings)
        targets = {name: np.log1p(self.revenue[name][rows[chosen]]) for name in self.horizons}
        stack = Stack(config.stacking_bases, dict(config.stacking_meta), config.seed, config.threads)
        return stack.fit(features, targets, fold)

    def _deep(self, rows: Ints) -> Any:
        from .deep import DeepModel

        return DeepModel(
            self.config.model,
            self.cache.names,
            dict(self.category_sizes),
            self.horizons,
            seed=self.config.seed,
            **dict(self.config.deep),
        ).fit(self.cache, rows, self.revenue)


def _with_histogram(settings: Mapping[str, Any], y: Floats) -> dict[str, Any]:
    """Arguments of the samplers; bins and beta, where given, are those of a histogram of their own."""
    shape = {name: value for name, value in settings.items() if name in ("bins", "beta")}
    rest = {name: value for name, value in settings.items() if name not in shape}
    return rest | ({"histogram": Histogram(**shape).fit(y)} if shape else {})


def _log_of_buyers(y: Floats) -> Floats:
    return np.where(np.nan_to_num(y) > 0, np.log1p(y), np.nan)


def _none_if_one(weight: Floats) -> Floats | None:
    return None if (weight == 1.0).all() else weight
