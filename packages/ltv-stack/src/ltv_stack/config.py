"""Settings of the pipeline."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import lightgbm

from .feature_groups import FeatureConfig
from .sampling import check_settings

MODELS = ("log1p", "tweedie", "two_stage", "document", "stack", "ziln", "odmn", "optdist")
DEEP = ("ziln", "odmn", "optdist")
_NAMES_OF_1_0_0 = {
    "stack_bases": "stacking_bases",
    "classifier": "buyer_classifier",
    "regressor": "revenue_regressor",
    "meta": "stacking_meta",
    "num_threads": "threads",
}
SAMPLING = ("none", "histos", "histus", "histos_weights", "histus_weights")


@dataclass(frozen=True)
class LTVConfig:
    """What the pipeline learns and promises.

    Args:
        model: "log1p" (one LightGBM a horizon), "tweedie", "two_stage" (chance to buy x amount, combined as the
            estimand asks), "document" (p · exp(E log), as in the document, no retransformation), "stack" or a deep
            head.
        estimand: what revenue_* means: "log1p" (exp(E log1p y) - 1, which MSLE asks for), "mean" (for bidding),
            "median", or "quantile:0.9".
        quantiles: levels put out besides.
        intervals: share of rows the intervals cover; None for none.
        calibration: "none", "isotonic" or "bucket" on held-out rows, in the space of the estimand.
        calibrate_by: column by whose values the calibration is split.
        stacking_bases: names out of elastic_net, random_forest, xgboost; None for all that are installed.
        stack_rows: most rows the stack is trained on.
        sampling: "none" or names out of histos, histus, histos_weights, histus_weights joined by "+"; histos shapes the
            buyer classifier's rows, histus those of the amount regressors.
        histos: settings of HistOS that differ from the published ones: bins, beta, alpha, max_over.
        histus: settings of HistUS that differ from the published ones: bins, beta.
        split: how rows are held out for calibration: the newest ("temporal"), drawn by buyer ("stratified_random"), or
            one stretch of time after the other ("cross_fit": every row calibrates, and all train the models put out;
            `folds` + 1 times the work, worth it on few rows).
        calibration_frac: share of rows held out; not used by "cross_fit".
        embargo: gap between training rows and held-out rows, as "6h", "2d" or seconds.
        folds: folds of time blocks for out-of-fold predictions and for "cross_fit".
        guard: "strict" refuses leaks, "report" logs them, "off" does not look.
        max_rows: most training rows, drawn by hash; the cut is logged.
        early_stopping: trees without gain on held-out rows after which boosting stops; None to grow all. Resampled or
            reweighted stages grow all trees.
        sample_rows: rows kept in memory to find histogram bins from.
        main_horizon: horizon whose buyers the classifier learns; None for d7, or the longest where there is no d7.
        order_weights: horizon -> weight in the projection; 1 where left out.
        threads: of LightGBM; 0 for one thread on few rows and all cores on many.
        seed: of everything drawn.
        buyer_classifier: LightGBM parameters of the buyer model that differ from its defaults, n_estimators included.
        revenue_regressor: LightGBM parameters of the models of amounts that differ from their defaults.
        stacking_meta: LightGBM parameters of the stack's last model that differ from its defaults.
        deep: settings of the deep heads that differ from their defaults.
        features: the feature groups.
        cache_dir: folder of the feature cache; None for a temporary one.
        keep_cache: leave the cache there after fit.
    """

    model: str = "log1p"
    estimand: str = "log1p"
    quantiles: tuple[float, ...] = ()
    intervals: float | None = 0.9
    calibration: str = "none"
    calibrate_by: str | None = None
    stacking_bases: tuple[str, ...] | None = None
    stack_rows: int = 200_000
    sampling: str = "none"
    histos: Mapping[str, Any] = field(default_factory=dict)
    histus: Mapping[str, Any] = field(default_factory=dict)
    split: str = "temporal"
    calibration_frac: float = 0.2
    embargo: str | float = "0h"
    folds: int = 3
    guard: str = "strict"
    max_rows: int | None = None
    early_stopping: int | None = 30
    sample_rows: int = 100_000
    main_horizon: str | None = None
    order_weights: Mapping[str, float] = field(default_factory=dict)
    threads: int = 0
    seed: int = 0
    buyer_classifier: Mapping[str, Any] = field(default_factory=dict)
    revenue_regressor: Mapping[str, Any] = field(default_factory=dict)
    stacking_meta: Mapping[str, Any] = field(default_factory=dict)
    deep: Mapping[str, Any] = field(default_factory=dict)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    cache_dir: str | None = None
    keep_cache: bool = False

    def __post_init__(self) -> None:
        _one_of("model", self.model, MODELS)
        _one_of("calibration", self.calibration, ("none", "isotonic", "bucket"))
        _one_of("split", self.split, ("temporal", "stratified_random", "cross_fit"))
        _one_of("guard", self.guard, ("strict", "report", "off"))
        for part in self.sampling.split("+"):
            _one_of("sampling", part, SAMPLING)
        for name, known in (("histos", ("bins", "beta", "alpha", "max_over")), ("histus", ("bins", "beta"))):
            given = getattr(self, name)
            for setting in given:
                _one_of(f"{name} setting", setting, known)
            if given and name not in self.sampling:
                raise ValueError(f"{name}: got {dict(given)}, but sampling is {self.sampling!r}")
        check_settings(**self.histos)
        check_settings(**self.histus)
        if self.estimand not in ("log1p", "mean"):
            estimand_level(self.estimand)
        for name in ("quantiles", "stacking_bases"):
            value = getattr(self, name)
            if isinstance(value, (str, int, float)):
                raise ValueError(f"{name}: got {value!r}, needs a list")
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for horizon, weight in self.order_weights.items():
            if not (isinstance(weight, (int, float)) and 0.0 < weight < float("inf")):
                raise ValueError(f"order_weights: got {weight!r} for {horizon}, needs a number above 0")
        for name in ("buyer_classifier", "revenue_regressor", "stacking_meta"):
            _lightgbm_names(name, getattr(self, name))
        for level in (*self.quantiles, *([self.intervals] if self.intervals is not None else [])):
            if not 0.0 < level < 1.0:
                raise ValueError(f"quantiles, intervals: got {level}, needs numbers between 0 and 1")
        if not 0.0 < self.calibration_frac < 1.0:
            raise ValueError(f"calibration_frac: got {self.calibration_frac}, needs a number between 0 and 1")
        if self.folds < 2:
            raise ValueError(f"folds: got {self.folds}, needs at least 2")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows: got {self.max_rows}, needs at least 1, or None for no limit")
        if self.early_stopping is not None and self.early_stopping < 1:
            raise ValueError(f"early_stopping: got {self.early_stopping}, needs at least 1, or None to grow all trees")
        if self.calibrate_by and self.calibration == "none":
            raise ValueError("calibrate_by: needs calibration 'isotonic' or 'bucket', got 'none'")
        if isinstance(self.features, Mapping):
            object.__setattr__(self, "features", FeatureConfig.from_dict(self.features))
        embargo_seconds(self.embargo)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LTVConfig":
        """Read a mapping such as a section of config.yaml.

        Args:
            values: setting -> value; what is left out keeps its default.

        Raises:
            ValueError: an unknown setting, named.
        """
        known = {one.name for one in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config: got {unknown}, needs names out of {sorted(known)}")
        return cls(**dict(values))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, read back by `restore`."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        mappings = {name: dict(value) for name, value in values.items() if isinstance(value, Mapping)}
        return values | mappings | {"features": self.features.to_dict()}

    @classmethod
    def restore(cls, values: Mapping[str, Any]) -> "LTVConfig":
        """The settings `to_dict` wrote, also those of models saved under the names of version 1.0.0.

        Args:
            values: setting -> value.
        """
        named = {_NAMES_OF_1_0_0.get(name, name): value for name, value in values.items()}
        return cls.from_dict({**named, "features": FeatureConfig.restore(values["features"])})


def estimand_level(estimand: str) -> float:
    """The level of "median" or "quantile:0.9".

    Args:
        estimand: the setting.

    Raises:
        ValueError: text of another form.
    """
    if estimand == "median":
        return 0.5
    head, _, tail = estimand.partition(":")
    try:
        level = float(tail) if head == "quantile" else -1.0
    except ValueError:
        level = -1.0
    if not 0.0 < level < 1.0:
        raise ValueError(f"estimand: got {estimand!r}, needs 'log1p', 'mean', 'median' or 'quantile:0.9'")
    return level


def embargo_seconds(embargo: str | float) -> float:
    """Seconds of "90s", "30m", "6h", "2d" or a number of seconds.

    Args:
        embargo: the setting.

    Raises:
        ValueError: text of another form, or less than 0.
    """
    if isinstance(embargo, (int, float)):
        seconds = float(embargo)
    else:
        units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        text = embargo.strip()
        try:
            seconds = float(text[:-1]) * units[text[-1]]
        except (KeyError, ValueError, IndexError):
            raise ValueError(f"embargo: got {embargo!r}, needs a number of seconds or text such as '6h'") from None
    if seconds < 0:
        raise ValueError(f"embargo: got {embargo!r}, needs 0 or more")
    return seconds


def _lightgbm_names(name: str, settings: Mapping[str, Any]) -> None:
    """LightGBM itself passes over what it does not know."""
    known = _lightgbm_parameters()
    for setting in settings:
        if known and setting not in known:
            near = difflib.get_close_matches(setting, known, 3)
            raise ValueError(f"{name}: got {setting!r}, which is no parameter of LightGBM" + _meant(near))


@cache
def _lightgbm_parameters() -> list[str]:
    """Names and aliases of LightGBM's parameters, from its library; none where it cannot be asked."""
    try:
        aliases = lightgbm.basic._ConfigAliases._get_all_param_aliases()
    except AttributeError:
        return []
    return sorted({word for name, others in aliases.items() for word in (name, *others)})


def _meant(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, needs one of {list(known)}")
