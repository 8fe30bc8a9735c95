"""The fitted models of a pipeline and what they say of rows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np

from .cache import FeatureCache, Ints
from .columns import Floats
from .config import DEEP
from .features import Matrix
from .sampling import undo_weights
from .stack import Stack, meta_features
from .stages import Boosted


@dataclass
class Models:
    """Models that were fitted on the same rows.

    Args:
        kind: which of them predicts the amount of every row: `LTVConfig.model`.
        horizons: names in order.
        main: the horizon whose buyers the classifier knows.
        classifier: chance to buy by the main horizon, under "".
        class_weights: mean weight of buyers and of the others when the classifier was trained.
        amounts: log1p of what buyers spend, by horizon.
        points: one model for chance and amount, by horizon; of kinds "log1p" and "tweedie".
        stack: of kind "stack".
        deep: of the kinds that need torch.
    """

    kind: str
    horizons: list[str]
    main: str
    classifier: Boosted
    class_weights: tuple[float, float]
    amounts: Boosted
    points: Boosted = field(default_factory=lambda: Boosted({}))
    stack: Stack | None = None
    deep: Any = None

    def scores(self, matrix: Matrix) -> dict[str, Floats]:
        """What the models say of rows: "p" (buyer probability), "g_<h>" and "s_<h>", as `Outputs` takes them."""
        found = {"p": undo_weights(self.classifier.predict(matrix), *self.class_weights)}
        for name in self.horizons:
            found[f"g_{name}"] = np.maximum(self.amounts.predict(matrix, name), 0.0)
        if self.points.boosters:
            for name in self.horizons:
                found[f"s_{name}"] = np.maximum(self.points.predict(matrix, name), 0.0)
        elif self.stack:
            amounts = {name: found[f"g_{name}"] for name in self.horizons}
            features = meta_features(found["p"], amounts, blend_weights(self.horizons, self.main))
            for name in self.horizons:
                found[f"s_{name}"] = np.maximum(self.stack.predict(features, name), 0.0)
        elif self.deep is not None:
            for name, column in self.deep.predict(matrix).items():
                found[f"s_{name}"] = column
        return found

    def scores_of(self, cache: FeatureCache, rows: Ints) -> dict[str, Floats]:
        """The same of cached rows, ascending, in one pass over the shards."""
        parts: dict[str, list[Floats]] = {}
        for shard, matrix in cache.matrices():
            first, last = np.searchsorted(rows, [shard.start, shard.start + shard.rows])
            if last > first:
                for key, column in self.scores(matrix[rows[first:last] - shard.start]).items():
                    parts.setdefault(key, []).append(column)
        return {key: np.concatenate(columns) for key, columns in parts.items()}

    def explained(self, horizon: str | None) -> lgb.Booster:
        """The booster that explanations are of: the horizon's, or with None the classifier.

        Args:
            horizon: its name, or None.

        Raises:
            ValueError: no such horizon.
        """
        if horizon is None:
            return self.classifier.boosters[""]
        if horizon not in self.horizons:
            raise ValueError(f"horizon: got {horizon!r}, needs one of {self.horizons}, or None for the classifier")
        return (self.points.boosters or self.amounts.boosters)[horizon]

    def boosters(self) -> dict[str, lgb.Booster]:
        """All boosters by "<stage>:<horizon>"."""
        stages = {"buyer": self.classifier, "amount": self.amounts, "point": self.points}
        return {f"{stage}:{name}": one for stage, held in stages.items() for name, one in held.boosters.items()}

    def save(self, folder: Path) -> None:
        """Write text files, and deep.pt where there is a deep model, into an existing folder."""
        self.classifier.save(folder, "buyer_classifier")
        self.amounts.save(folder, "revenue")
        if self.points.boosters:
            self.points.save(folder, self.kind)
        if self.stack:
            self.stack.save(folder / "stack")
        if self.deep is not None:
            self.deep.save(folder / "deep.pt")

    @classmethod
    def load(
        cls,
        folder: Path,
        kind: str,
        horizons: list[str],
        main: str,
        class_weights: tuple[float, float],
        threads: int,
    ) -> "Models":
        """The models `save` wrote.

        Args:
            folder: what `save` wrote.
            kind: name of the model in the settings.
            horizons: shortest first.
            main: the horizon that says who is a buyer.
            class_weights: mean training weight of buyers and of others.
            threads: of prediction; 0 to choose by the rows.
        """
        models = cls(
            kind,
            horizons,
            main,
            Boosted.load(folder, "buyer_classifier", [""], threads),
            class_weights,
            Boosted.load(folder, "revenue", horizons, threads),
        )
        if kind in ("log1p", "tweedie"):
            models.points = Boosted.load(folder, kind, horizons, threads)
        if kind == "stack":
            models.stack = Stack.load(folder / "stack", threads)
        if kind in DEEP:
            from .deep import DeepModel

            models.deep = DeepModel.load(folder / "deep.pt")
        return models


def blend_weights(horizons: list[str], main: str) -> dict[str, float]:
    """Weights of the horizons' amounts in the stack's blended meta-feature."""
    return {name: 2.0 if name == main else 1.0 for name in horizons}
