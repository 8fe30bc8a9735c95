"""Labels of cached rows: amounts and buyers of every horizon, NaN where unknown."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cache import FeatureCache
from .columns import Floats
from .schema import Horizon

log = logging.getLogger(__name__)


@dataclass
class Labels:
    """Labels of the rows of a cache.

    Args:
        revenue: horizon -> amounts, 0 or more, NaN where unknown [N].
        flags: horizon -> the data's own mark of buyers, for horizons that have one [N].
    """

    revenue: dict[str, Floats]
    flags: dict[str, Floats]

    @classmethod
    def of(cls, cache: FeatureCache, horizons: Sequence[Horizon], report: dict[str, Any]) -> "Labels":
        """Take the labels of these horizons from a cache; what is odd about them is logged and put into `report`."""
        found = {name: _amounts(name, column, report) for name, column in cache.labels.items()}
        revenue = {h.name: found[h.revenue] for h in horizons if h.revenue}
        flags = {h.name: found[h.buyer] for h in horizons if h.buyer and h.buyer in found}
        amounts = np.column_stack(list(revenue.values()))
        with np.errstate(invalid="ignore"):
            unordered = int((np.diff(amounts, axis=1) < -1e-9).any(axis=1).sum()) if amounts.shape[1] > 1 else 0
        report["label_rows_out_of_order"] = unordered
        if unordered:
            log.warning("%d of %d rows have less revenue at a later horizon", unordered, len(amounts))
        return cls(revenue, flags)

    def buyers(self, horizon: str) -> Floats:
        """1.0 for buyers by a horizon, 0.0 for the others, NaN where unknown [N]."""
        label = self.flags.get(horizon, self.revenue[horizon])
        return np.where(np.isnan(label), np.nan, (label > 0).astype(np.float64))


def _amounts(name: str, column: Floats, report: dict[str, Any]) -> Floats:
    negative = int((column < 0).sum())
    if negative:
        log.warning("%s: %d negative amounts of %d count as 0", name, negative, len(column))
    unknown = int(np.isnan(column).sum())
    if unknown:
        log.info("%s: %d of %d labels are null, so not known", name, unknown, len(column))
    report |= {f"negative_{name}": negative, f"unknown_{name}": unknown}
    return np.maximum(column, 0.0)
