"""The two-part distribution of revenue: a chance to buy, and a spread of log amounts around a mean for those who do."""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_LEVELS = (np.arange(399) + 1) / 400


class TwoPart:
    """Quantiles of max(0, exp(g + r) - 1) with probability p, else 0; r drawn from held-out residuals of log1p.

    Quantiles never cross, because all levels share one distribution.
    """

    def __init__(self) -> None:
        self.residuals: Floats = np.zeros(len(_LEVELS))
        self.smearing = 1.0

    def fit(self, y: Floats, g: Floats) -> "TwoPart":
        """Learn the residuals from buyers that no model was fitted on.

        Args:
            y: their amounts [N].
            g: predicted mean of log1p of them [N].

        Returns:
            the model itself.
        """
        if len(y):
            rest = np.log1p(y) - g
            self.residuals = np.quantile(rest, _LEVELS)
            self.smearing = float(np.exp(rest).mean())
        return self

    def quantile(self, level: float, p: Floats, g: Floats) -> Floats:
        """The amount below which `level` of such rows lie [N].

        Args:
            level: in (0, 1).
            p: chance to buy [N].
            g: mean log1p amount of buyers [N].

        Raises:
            ValueError: the level is not in (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level: got {level}, needs a number between 0 and 1")
        inner = (level - (1.0 - p)) / np.maximum(p, 1e-12)
        rest = np.interp(inner, _LEVELS, self.residuals)
        return np.where(inner > 0, np.expm1(np.maximum(g + rest, 0.0)), 0.0)

    def buyer_mean(self, g: Floats) -> Floats:
        """Mean amount of buyers [N]: Duan's smearing of the log mean (JASA 1983), not the exponential of it."""
        return np.maximum(self.smearing * np.exp(g) - 1.0, 0.0)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form, read back by `from_json`."""
        return {"residuals": self.residuals.tolist(), "smearing": self.smearing}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "TwoPart":
        """What `to_json` wrote."""
        one = cls()
        one.residuals, one.smearing = np.array(state["residuals"], dtype=np.float64), state["smearing"]
        return one
