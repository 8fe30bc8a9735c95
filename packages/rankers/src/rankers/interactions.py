"""What every ranker is fitted on: who did what with which item, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array


@dataclass(frozen=True)
class Interactions:
    """Events as columns of one length [N], in any order; users and items are numbered 0, 1, ...

    Args:
        user: int64 [N].
        item: int64 [N].
        time: int64 [N], seconds, or any number that grows, e.g. of a basket.
        num_users: users in all; those without an event have an empty history.
        num_items: items in the catalogue; those without an event are cold.
        weight: float64 [N], >= 0; None weighs every event 1.
        event: int64 [N], the event's type; None when there is one type only.

    Raises:
        ValueError: On columns of different length, a number out of range, or a weight that is negative or not finite.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    time: NDArray[np.int64]
    num_users: int
    num_items: int
    weight: NDArray[np.float64] | None = None
    event: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        for name in ("user", "item", "time", "event"):
            column = getattr(self, name)
            if column is not None:
                column = np.asarray(column)
                if column.size and not np.issubdtype(column.dtype, np.integer):
                    raise ValueError(f"{name}: got {column.dtype}, needs whole numbers (int64)")
                object.__setattr__(self, name, column.astype(np.int64, copy=False))
        if self.weight is not None:
            object.__setattr__(self, "weight", np.asarray(self.weight, np.float64))
        for name in ("user", "item", "time", "event", "weight"):
            column = getattr(self, name)
            if column is not None and column.shape != (len(self.user),):
                raise ValueError(f"{name}: got shape {column.shape}, needs that of user, ({len(self.user)},)")
        for name, number in (("user", self.num_users), ("item", self.num_items)):
            column = getattr(self, name)
            if len(column) and not 0 <= column.min() <= column.max() < number:
                raise ValueError(f"{name}: got {column.min()} .. {column.max()}, needs 0 .. {number - 1}")
        if self.weight is not None and not (np.isfinite(self.weight).all() and (self.weight >= 0).all()):
            raise ValueError("weight: got a negative or not finite number, needs numbers >= 0")

    def __len__(self) -> int:
        return len(self.user)

    @property
    def weights(self) -> NDArray[np.float64]:
        """The events' weights [N]; ones where none were given."""
        return np.ones(len(self)) if self.weight is None else self.weight

    def weighted(self, weights: Mapping[int, float]) -> Interactions:
        """The same events weighed by their type, times the weight they have; types of weight 0 are left out.

        Args:
            weights: weight of each event type; every type that occurs needs one.

        Raises:
            ValueError: Without types, or on a type without a weight.
        """
        if self.event is None:
            raise ValueError("event: got None, needs the events' types to weigh them")
        types, place = np.unique(self.event, return_inverse=True)
        if missing := [int(t) for t in types if int(t) not in weights]:
            raise ValueError(f"weights: got none for event types {missing}, needs one for each type")
        factor = np.array([weights[int(t)] for t in types], np.float64)[place] if len(types) else np.zeros(0)
        return replace(self, weight=self.weights * factor).where(factor != 0)

    def where(self, kept: NDArray[np.bool_]) -> Interactions:
        """The events at which ``kept`` [N] is True."""
        columns = {name: getattr(self, name) for name in ("user", "item", "time", "weight", "event")}
        return replace(self, **{name: column[kept] for name, column in columns.items() if column is not None})

    def before(self, time: int) -> Interactions:
        """The events before a time: what may be known then."""
        return self.where(self.time < time)

    def matrix(self) -> csr_array:
        """Summed weights of each user and item, CSR [num_users, num_items] with sorted columns."""
        shape = (self.num_users, self.num_items)
        matrix = csr_array((self.weights, (self.user, self.item)), shape=shape)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return matrix
