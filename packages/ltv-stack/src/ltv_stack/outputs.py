"""From what the models say to what is put out: chances, estimands, calibration, quantiles, intervals, order."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .calibration import BucketCalibrator, IsotonicCalibrator, calibrator_from_json
from .config import LTVConfig, estimand_level
from .conformal import ConformalIntervals
from .order import project_order, widen_order
from .twopart import TwoPart

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Scores = dict[str, Floats]
FEWEST_HELD_OUT_BUYERS = 20
_FEWEST_ROWS = 50
_NATIVE = {"log1p": "log1p", "tweedie": "mean", "stack": "log1p", "ziln": "mean", "odmn": "mean", "optdist": "mean"}


class Outputs:
    """Everything learnt on held-out rows, and the columns made with it.

    Scores are what the models say of rows: "p" (buyer probability), "g_<h>" (mean log1p amount of buyers) and, for
    models that predict the amount of every row, "s_<h>" (on the model's own scale).

    Args:
        config: settings.
        horizons: fitted horizons in order.
        main: the horizon whose buyers "p" means.
        rates: horizon -> buyers of the training rows by then, as a multiple of those by the main horizon; used where
            held-out buyers are too few to calibrate a horizon's chances.
    """

    def __init__(
        self, config: LTVConfig, horizons: Sequence[str], main: str, rates: Mapping[str, float] | None = None
    ) -> None:
        self.config, self.horizons, self.main = config, list(horizons), main
        self.rates = dict(rates or {})
        self.chances: dict[str, IsotonicCalibrator] = {}
        self.amounts: dict[str, IsotonicCalibrator] = {}
        self.twoparts: dict[str, TwoPart] = {}
        self.converters: dict[str, IsotonicCalibrator] = {}
        self.calibrators: dict[str, IsotonicCalibrator | BucketCalibrator] = {}
        self.intervals: dict[str, ConformalIntervals] = {}
        self.buyer_intervals: dict[str, ConformalIntervals] = {}

    @property
    def columns(self) -> list[str]:
        """Names of the columns put out, in order."""
        names = ["buyer_probability"]
        for horizon in self.horizons:
            names.append(f"revenue_{horizon}")
            for prefix, fitted in (("", self.intervals), ("buyer_", self.buyer_intervals)):
                if horizon in fitted:
                    names += [f"revenue_{horizon}_{prefix}lo", f"revenue_{horizon}_{prefix}hi"]
            names += [f"revenue_{horizon}_{_quantile_name(level)}" for level in self.config.quantiles]
        return names

    def fit(
        self,
        scores: Scores,
        labels: dict[str, Floats],
        segment: npt.NDArray[np.object_] | None = None,
    ) -> "Outputs":
        """Learn from held-out rows: chances and residuals first, then what is missing from their intervals.

        Both are learnt on all rows. Split between them, each half would be noisier than the one-dimensional curves of
        the first can overfit: on simulated rows coverage is unbiased from 600 rows on, and varies a third less.

        Args:
            scores: of these rows.
            labels: horizon -> amounts, NaN where unknown [N].
            segment: values of the column that calibration is split by [N], or None.
        """
        config = self.config
        for name in self.horizons:
            y = labels[name]
            known = np.isfinite(y)
            bought = known & (np.nan_to_num(y) > 0)
            if bought.sum() >= FEWEST_HELD_OUT_BUYERS:
                self.chances[name] = IsotonicCalibrator().fit(scores["p"][known], (y[known] > 0).astype(np.float64))
            else:
                log.warning("%s: %d held-out buyers are too few to calibrate chances", name, int(bought.sum()))
            if "histus" in config.sampling and config.model != "document" and bought.sum() >= FEWEST_HELD_OUT_BUYERS:
                # Amounts were learnt from buyers of other weights than those that are met.
                self.amounts[name] = IsotonicCalibrator().fit(scores[f"g_{name}"][bought], np.log1p(y[bought]))
            self.twoparts[name] = TwoPart().fit(y[bought], self._amount(name, scores)[bought])
            if converts(config):
                target = np.log1p(y[known]) if config.estimand == "log1p" else y[known]
                self.converters[name] = IsotonicCalibrator().fit(scores[f"s_{name}"][known], target)
            if config.calibration != "none":
                calibrator = IsotonicCalibrator() if config.calibration == "isotonic" else BucketCalibrator()
                point = self._space(self._point(name, scores))
                own = None if segment is None else segment[known]
                self.calibrators[name] = calibrator.fit(point[known], self._space(y[known]), own)
        if config.intervals is not None:
            self._fit_intervals(scores, labels, config.intervals)
        return self

    def apply(self, scores: Scores, segment: Sequence[Any] | None = None) -> dict[str, Floats]:
        """The columns put out for rows with these scores, each in order over horizons."""
        points = []
        for name in self.horizons:
            point = self._point(name, scores)
            if name in self.calibrators:
                point = self._money(self.calibrators[name].apply(self._space(point), segment))
            points.append(np.maximum(point, 0.0))
        columns = {"buyer_probability": self._chance(self.main, scores["p"])}

        def put(suffix: str, horizons: list[str], table: Floats) -> None:
            columns.update({f"revenue_{name}{suffix}": table[:, i] for i, name in enumerate(horizons)})

        put("", self.horizons, self._order(points))
        below = np.zeros((1, len(self.horizons)))
        for level in sorted(self.config.quantiles):
            surface = [
                self.twoparts[name].quantile(level, self._chance(name, scores["p"]), self._amount(name, scores))
                for name in self.horizons
            ]
            # The projection keeps order between levels but for the last bit.
            below = np.maximum(self._order(surface), below)
            put(f"_{_quantile_name(level)}", self.horizons, below)
        for prefix, fitted, bounds in (
            ("_", self.intervals, self._quantile_bounds),
            ("_buyer_", self.buyer_intervals, self._buyer_bounds),
        ):
            held = [name for name in self.horizons if name in fitted]
            if held:
                ordered = _in_order([bounds(name, scores) for name in held])
                pairs = [
                    fitted[name].apply(low, high, self._chance(name, scores["p"]))
                    for name, (low, high) in zip(held, ordered, strict=True)
                ]
                low, high = widen_order(*(np.column_stack([pair[end] for pair in pairs]) for end in (0, 1)))
                put(f"{prefix}lo", held, low)
                put(f"{prefix}hi", held, high)
        return {name: columns[name] for name in self.columns}

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form, read back by `restore`."""
        groups: dict[str, dict[str, Any]] = {
            "chances": self.chances,
            "amounts": self.amounts,
            "twoparts": self.twoparts,
            "converters": self.converters,
            "calibrators": self.calibrators,
            "intervals": self.intervals,
            "buyer_intervals": self.buyer_intervals,
        }
        fitted = {group: {name: one.to_json() for name, one in own.items()} for group, own in groups.items()}
        return {"rates": self.rates, **fitted}

    def restore(self, state: dict[str, Any]) -> "Outputs":
        """Take over what `to_json` wrote."""
        self.rates = dict(state["rates"])
        self.chances = {n: IsotonicCalibrator.from_json(s) for n, s in state["chances"].items()}
        self.amounts = {n: IsotonicCalibrator.from_json(s) for n, s in state["amounts"].items()}
        self.twoparts = {n: TwoPart.from_json(s) for n, s in state["twoparts"].items()}
        self.converters = {n: IsotonicCalibrator.from_json(s) for n, s in state["converters"].items()}
        self.calibrators = {n: calibrator_from_json(s) for n, s in state["calibrators"].items()}
        self.intervals = {n: ConformalIntervals.from_json(s) for n, s in state["intervals"].items()}
        self.buyer_intervals = {n: ConformalIntervals.from_json(s) for n, s in state["buyer_intervals"].items()}
        return self

    def _fit_intervals(self, scores: Scores, labels: dict[str, Floats], level: float) -> None:
        """Correct the model's bounds, put in order over horizons first: what order costs is then in the correction."""
        for fitted, bounds, buyers in (
            (self.intervals, self._quantile_bounds, False),
            (self.buyer_intervals, self._buyer_bounds, True),
        ):
            rows = {name: (np.nan_to_num(labels[name]) > 0 if buyers else np.isfinite(labels[name])) for name in labels}
            held = [name for name in self.horizons if rows[name].sum() >= _FEWEST_ROWS]
            few = [name for name in self.horizons if name not in held]
            if few:
                log.warning(
                    "%s: fewer than %d held-out %s, no intervals%s",
                    ", ".join(few),
                    _FEWEST_ROWS,
                    "buyers" if buyers else "rows",
                    " for rows that buy" if buyers else "",
                )
            for name, (low, high) in zip(held, _in_order([bounds(name, scores) for name in held]), strict=True):
                own = rows[name]
                chance = self._chance(name, scores["p"][own])
                one = ConformalIntervals(level).fit(labels[name][own], low[own], high[own], chance)
                if np.isfinite(one.corrections).all():
                    fitted[name] = one
                else:
                    kind = "buyers" if buyers else "rows"
                    log.warning("%s: %d held-out %s promise no level of %g, no intervals", name, own.sum(), kind, level)

    def _order(self, columns: list[Floats]) -> Floats:
        weights = np.array([self.config.order_weights.get(name, 1.0) for name in self.horizons])
        space = "identity" if self.config.estimand == "mean" else "log1p"
        return project_order(np.column_stack(columns), weights, space)  # type: ignore[arg-type]

    def _point(self, name: str, scores: Scores) -> Floats:
        """The estimand of one horizon, before calibration and order [N]."""
        config = self.config
        chance, amount = self._chance(name, scores["p"]), self._amount(name, scores)
        if config.estimand not in ("log1p", "mean"):
            return self.twoparts[name].quantile(estimand_level(config.estimand), chance, amount)
        if config.model == "document":
            return scores["p"] * np.expm1(amount)
        if config.model == "two_stage":
            if config.estimand == "mean":
                return chance * self.twoparts[name].buyer_mean(amount)
            return np.expm1(chance * amount)
        score = scores[f"s_{name}"]
        if name in self.converters:
            return self._money(self.converters[name].apply(score))
        return np.expm1(score) if config.estimand == "log1p" else score

    def _chance(self, name: str, p: Floats) -> Floats:
        if name in self.chances:
            return self.chances[name].apply(p)
        return np.minimum(p * self.rates.get(name, 1.0), 1.0)

    def _amount(self, name: str, scores: Scores) -> Floats:
        """Mean log1p amount of buyers [N]."""
        score = scores[f"g_{name}"]
        return self.amounts[name].apply(score) if name in self.amounts else score

    def _space(self, amount: Floats) -> Floats:
        return amount if self.config.estimand == "mean" else np.log1p(amount)

    def _money(self, value: Floats) -> Floats:
        return value if self.config.estimand == "mean" else np.expm1(value)

    def _quantile_bounds(self, name: str, scores: Scores) -> tuple[Floats, Floats]:
        """Two-part quantiles that hold the level; one-sided where the lower one is 0."""
        assert self.config.intervals is not None
        miss = 1.0 - self.config.intervals
        chance, amount, parts = self._chance(name, scores["p"]), self._amount(name, scores), self.twoparts[name]
        low = parts.quantile(miss / 2, chance, amount)
        one_sided = parts.quantile(1 - miss, chance, amount)
        return low, np.where(low > 0, parts.quantile(1 - miss / 2, chance, amount), one_sided)

    def _buyer_bounds(self, name: str, scores: Scores) -> tuple[Floats, Floats]:
        assert self.config.intervals is not None
        miss, amount, parts = 1.0 - self.config.intervals, self._amount(name, scores), self.twoparts[name]
        sure = np.ones(len(amount))
        return parts.quantile(miss / 2, sure, amount), parts.quantile(1 - miss / 2, sure, amount)


def _in_order(bounds: list[tuple[Floats, Floats]]) -> list[tuple[Floats, Floats]]:
    """Lower and upper bounds of the horizons, each made non-decreasing; a lower bound of 0 stays 0, and one-sided."""
    if not bounds:
        return []
    low, high = (np.column_stack([pair[end] for pair in bounds]) for end in (0, 1))
    one_sided = widen_order(low, high)[0] == 0
    low, high = np.where(one_sided, 0.0, project_order(low)), project_order(high)
    return list(zip(low.T, high.T, strict=True))


def converts(config: LTVConfig) -> bool:
    """Whether the model's own estimand must be turned into the one asked for, on held-out rows.

    A Huber meta-learner and ODMN's buckets estimate neither mean without bias, so theirs always is.
    """
    if config.model not in _NATIVE or config.estimand not in ("log1p", "mean"):
        return False
    return config.model in ("stack", "odmn") or _NATIVE[config.model] != config.estimand


def _quantile_name(level: float) -> str:
    return f"q{100 * level:g}".replace(".", "_")
