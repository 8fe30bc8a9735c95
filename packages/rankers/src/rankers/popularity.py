"""What everybody buys, and what the user looked at before: the baselines every model has to beat."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .interactions import Interactions
from .ranker import Ranker, Scores

DAY = 86_400


class Popularity(Ranker):
    """An item's summed weight, halved for every ``half_life`` of age at the newest event; the same for everybody.

    Args:
        half_life: seconds; None does not decay.
    """

    def __init__(self, half_life: float | None = 7 * DAY) -> None:
        self.half_life = _checked(half_life)

    def _fit(self, interactions: Interactions) -> None:
        weight = decayed(interactions, self.half_life).weights
        total = np.bincount(interactions.item, weight, minlength=self.num_items)
        self.popularity = np.where(total > 0, total, -np.inf)

    def _scores(self, users: NDArray[np.int64]) -> Scores:
        return np.repeat(self.popularity[None], len(users), 0)


class RepeatItems(Ranker):
    """The user's own items by their summed weight, halved for every ``half_life`` of age at the newest event.

    Args:
        half_life: seconds; None does not decay.
    """

    def __init__(self, half_life: float | None = 7 * DAY) -> None:
        self.half_life = _checked(half_life)

    def _fit(self, interactions: Interactions) -> None:
        self.own = decayed(interactions, self.half_life).matrix()

    def _scores(self, users: NDArray[np.int64]) -> Scores:
        return self.own[users]


def decayed(interactions: Interactions, half_life: float | None) -> Interactions:
    """The interactions with weights w 2^(-age / half_life), the age counted from the newest event."""
    if half_life is None or not len(interactions):
        return interactions
    age = (interactions.time.max() - interactions.time).astype(np.float64)
    return replace(interactions, weight=interactions.weights * np.exp2(-age / half_life))


def _checked(half_life: float | None) -> float | None:
    if half_life is not None and not half_life > 0:
        raise ValueError(f"half_life: got {half_life}, needs seconds above 0 or None")
    return half_life
