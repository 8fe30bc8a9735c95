"""NDCG, Recall, MRR and PHR at k of lists over the full catalogue, user by user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

METRICS = ("ndcg", "recall", "mrr", "phr")
SLICES = ("all", "repeat", "new", "cold", "warm")


@dataclass(frozen=True)
class Evaluation:
    """Values of single users, so that two rankers on the same users can be paired.

    Args:
        users: the users evaluated [U], as given.
        values: by slice and "metric@k": float64 [U], NaN where the user has no target in the slice.
    """

    users: NDArray[np.int64]
    values: dict[str, dict[str, NDArray[np.float64]]]

    def of(self, metric: str, slice: str = "all", all_users: bool = False) -> NDArray[np.float64]:
        """One metric's values of the users it is a mean over: paired with another ranker's, they are the same users.

        Args:
            metric: e.g. "ndcg@10".
            slice: "all" targets, those the user had before ("repeat") or not ("new"), and those nobody had before the
                cutoff ("cold") or somebody had ("warm").
            all_users: count users without a target as 0; else leave them out.

        Raises:
            ValueError: On a metric or slice that was not evaluated.
        """
        if slice not in self.values or metric not in self.values[slice]:
            known = f"{', '.join(self.values)}; {', '.join(self.values['all'])}"
            raise ValueError(f"metric, slice: got {metric!r}, {slice!r}, needs one of {known}")
        values = self.values[slice][metric]
        return np.nan_to_num(values, nan=0.0) if all_users else values[~np.isnan(values)]

    def means(self, slice: str = "all", all_users: bool = False) -> dict[str, float]:
        """The mean of every metric, and ``users``, how many it is over; NaN over nobody."""
        found = {metric: self.of(metric, slice, all_users) for metric in self.values[slice]}
        means = {metric: float(v.mean()) if len(v) else float("nan") for metric, v in found.items()}
        return {**means, "users": float(len(next(iter(found.values()))))}

    def interval(
        self,
        metric: str,
        slice: str = "all",
        all_users: bool = False,
        level: float = 0.95,
        draws: int = 1000,
        seed: int = 0,
    ) -> tuple[float, float]:
        """A percentile bootstrap interval of the mean over users; NaN over nobody."""
        return bootstrap(self.of(metric, slice, all_users), level, draws, seed)

    def minus(self, other: Evaluation, metric: str, slice: str = "all", all_users: bool = False) -> NDArray[np.float64]:
        """Differences of the same users to another ranker's values: for :func:`bootstrap`, or a paired test.

        Raises:
            ValueError: When the other's users or targets are not the same.
        """
        one, two = self.of(metric, slice, all_users), other.of(metric, slice, all_users)
        here, there = (np.isnan(e.values[slice][metric]) for e in (self, other))
        if not np.array_equal(self.users, other.users) or not np.array_equal(here, there):
            raise ValueError("other: got other users or targets, needs the same")
        return one - two


def evaluate(
    users: ArrayLike,
    lists: ArrayLike,
    target_users: ArrayLike,
    target_items: ArrayLike,
    ks: Sequence[int] = (10,),
    *,
    seen: tuple[ArrayLike, ArrayLike] | None = None,
    full_ideal: bool = False,
) -> Evaluation:
    """Judge recommended lists against what the users took afterwards.

    A list holds the best of the whole catalogue (less what was excluded when it was made), ties broken by item number:
    the order of ``lists`` is final. Relevance is binary; NDCG has gains 1 / log2(place + 2), place 0 first, over the
    ideal of min(targets, k) items; Recall is hits over all targets; MRR is 1 / (place + 1) of the first hit; PHR
    (personal hit ratio) is 1 where there is a hit.

    Args:
        users: [U], each once.
        lists: items [U, K], best first, -1 behind the end of a list; K >= max(ks).
        target_users: user of each target [T]; users not in ``users`` are passed over.
        target_items: item of each target [T]; an item that occurs twice counts once.
        ks: list lengths.
        seen: users and items of the pairs known before the cutoff; needed for the slices repeat, new, cold and warm.
        full_ideal: NDCG's ideal over all targets instead of min(targets, k), as in the next-basket literature.

    Returns:
        The values of every user.

    Raises:
        ValueError: On shapes that do not fit, a user twice, or an item twice in a list.
    """
    numbers, lists = np.asarray(users, np.int64), np.asarray(lists, np.int64)
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: got {ks}, needs list lengths of 1 or more")
    if lists.ndim != 2 or len(lists) != len(numbers) or lists.shape[1] < max(ks):
        raise ValueError(f"lists: got shape {lists.shape}, needs [{len(numbers)}, {max(ks)} or more]")
    if len(np.unique(numbers)) != len(numbers):
        raise ValueError("users: got a user twice, needs each once")
    ordered = np.sort(lists, 1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("lists: got an item twice in a list, needs each once")
    row, item = _distinct(numbers, target_users, target_items)
    slices = {"all": np.ones(len(row), bool)}
    if seen is not None:
        past = np.stack([np.asarray(part, np.int64) for part in seen], 1)
        repeat = _among(np.stack([numbers[row], item], 1), past)
        warm = np.isin(item, past[:, 1])
        slices |= {"repeat": repeat, "new": ~repeat, "cold": ~warm, "warm": warm}
    values = {name: _values(lists, row[kept], item[kept], ks, full_ideal) for name, kept in slices.items()}
    return Evaluation(numbers, values)


def bootstrap(
    values: NDArray[np.float64], level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """A percentile interval of the mean of values [n] over resampled users; NaN for none."""
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _values(
    lists: NDArray[np.int64], row: NDArray[np.int64], item: NDArray[np.int64], ks: Sequence[int], full_ideal: bool
) -> dict[str, NDArray[np.float64]]:
    number = np.bincount(row, minlength=len(lists)).astype(np.float64)
    has = number > 0
    place = np.full(len(row), lists.shape[1], np.int64)
    for at in range(lists.shape[1]):
        place[lists[row, at] == item] = at
    ideals = np.r_[0.0, (1 / np.log2(np.arange(max(int(number.max(initial=0)), max(ks))) + 2)).cumsum()]
    found: dict[str, NDArray[np.float64]] = {}
    for k in ks:
        hit = place < k
        gain = np.bincount(row[hit], 1 / np.log2(place[hit] + 2), minlength=len(lists))
        hits = np.bincount(row[hit], minlength=len(lists))
        first = np.full(len(lists), np.inf)
        np.minimum.at(first, row[hit], place[hit])
        ideal = ideals[(number if full_ideal else np.minimum(number, k)).astype(np.int64)]
        with np.errstate(divide="ignore", invalid="ignore"):
            found[f"ndcg@{k}"] = gain / ideal
            found[f"recall@{k}"] = hits / number
        found[f"mrr@{k}"] = 1 / (first + 1)
        found[f"phr@{k}"] = (hits > 0).astype(np.float64)
    return {name: np.where(has, value, np.nan) for name, value in found.items()}


def _distinct(
    numbers: NDArray[np.int64], users: ArrayLike, items: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and item of each distinct target of the users evaluated."""
    pairs = np.unique(np.stack([np.asarray(users, np.int64), np.asarray(items, np.int64)], 1), axis=0)
    order = np.argsort(numbers, kind="stable")
    at = np.searchsorted(numbers[order], pairs[:, 0]).clip(max=max(len(numbers) - 1, 0))
    known = numbers[order][at] == pairs[:, 0] if len(numbers) else np.zeros(len(pairs), bool)
    return order[at[known]], pairs[known, 1]


def _among(pairs: NDArray[np.int64], past: NDArray[np.int64]) -> NDArray[np.bool_]:
    _, place = np.unique(np.concatenate([past, pairs]), axis=0, return_inverse=True)
    place = place.ravel()
    return np.isin(place[len(past) :], place[: len(past)])
