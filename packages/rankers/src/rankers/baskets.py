"""Next-basket baselines: counts, user neighbours on recent counts, and temporal item frequencies.

A basket is the distinct items of a user at one ``time``; weights play no part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from .interactions import Interactions
from .ranker import Ranker, Scores, positive

MODES = ("g", "p", "gp")


class TopFreq(Ranker):
    """Counts of baskets: everybody's ("g"), the user's own ("p"), or the user's own and then everybody's ("gp").

    Args:
        mode: "g", "p" or "gp".
    """

    def __init__(self, mode: str = "gp") -> None:
        if mode not in MODES:
            raise ValueError(f"mode: got {mode!r}, needs one of {', '.join(MODES)}")
        self.mode = mode

    def _fit(self, interactions: Interactions) -> None:
        user, item, _ = baskets(interactions)
        shape = (self.num_users, self.num_items)
        self.own = csr_array((np.ones(len(user)), (user, item)), shape=shape)
        self.own.sum_duplicates()
        self.popularity = np.bincount(item, minlength=self.num_items).astype(np.float64)

    def _scores(self, users: NDArray[np.int64]) -> Scores:
        if self.mode == "g":
            scores = np.repeat(self.popularity[None], len(users), 0)
        elif self.mode == "p":
            return self.own[users]
        else:
            # Below 1: popularity only decides between equal own counts.
            scores = self.own[users].toarray() + self.popularity / (self.popularity.max(initial=0) + 1)
        return np.where(scores > 0, scores, -np.inf)


class UPCF(Ranker):
    """Users' recent popularity, spread over similar users: score = sum_v s(u, v)^q p_v(i).

    p_v(i) is the share of v's last r baskets with i, s(u, v) = |I_u n I_v| / (|I_u|^a |I_v|^(1 - a)) on all items of
    both; s(u, u) = 1.

    Args:
        recency: r; None takes all baskets.
        asymmetry: a in [0, 1].
        locality: q > 0; larger trusts the nearest only.

    Source: Faggioli, Polato, Aiolli 2020, "Recency aware collaborative filtering for next basket recommendation".
    """

    def __init__(self, recency: int | None = 25, asymmetry: float = 0.75, locality: float = 10.0) -> None:
        if recency is not None and recency < 1:
            raise ValueError(f"recency: got {recency}, needs 1 or more baskets or None")
        if not 0 <= asymmetry <= 1 or not locality > 0:
            raise ValueError(f"asymmetry, locality: got {asymmetry}, {locality}, needs [0, 1] and above 0")
        self.recency, self.asymmetry, self.locality = recency, asymmetry, locality

    def _fit(self, interactions: Interactions) -> None:
        user, item, place = baskets(interactions)
        count = _basket_counts(user, place, self.num_users)
        last = self.recency or max(int(count.max(initial=1)), 1)
        kept = place >= count[user] - last
        share = 1.0 / np.minimum(count, last).clip(1)
        shape = (self.num_users, self.num_items)
        self.recent = csr_array((share[user[kept]], (user[kept], item[kept])), shape=shape)
        self.own = csr_array((np.ones(len(user)), (user, item)), shape=shape)
        self.own.sum_duplicates()
        self.own.data[:] = 1.0
        self.sizes = np.diff(self.own.indptr).astype(np.float64)

    def _scores(self, users: NDArray[np.int64]) -> Scores:
        common = csr_array(self.own[users] @ self.own.T)
        row = np.repeat(np.arange(len(users)), np.diff(common.indptr))
        below = self.sizes[users][row] ** self.asymmetry * self.sizes[common.indices] ** (1 - self.asymmetry)
        common.data = (common.data / below) ** self.locality
        return positive(common @ self.recent)


class TIFUKNN(Ranker):
    """Temporal item frequencies of the user and of the nearest users: alpha V_u + (1 - alpha) mean of their V.

    The j-th of a user's n baskets weighs r_b^(n - j); m groups of following baskets are averaged (fewer baskets than m:
    one a group; else the last groups take one basket more where n / m is no whole number), and group g, the oldest
    being 0, weighs r_g^(m - 1 - g); V_u is the mean over the groups. Neighbours are nearest in Euclidean distance,
    equal distances by the smaller user number.

    Args:
        neighbours: users averaged.
        within_decay: r_b in (0, 1].
        group_decay: r_g in (0, 1].
        alpha: the user's own share in [0, 1].
        groups: m.
        among: users to look for neighbours among [V]; None is all with a basket. Nobody is their own neighbour.

    Source: Hu, He, Gao, Zhang 2020, "Modeling personalized item frequency information for next-basket recommendation",
    with the decay of the authors' code, over the whole history.
    """

    def __init__(
        self,
        neighbours: int = 300,
        within_decay: float = 0.9,
        group_decay: float = 0.7,
        alpha: float = 0.7,
        groups: int = 7,
        among: ArrayLike | None = None,
    ) -> None:
        if neighbours < 1 or groups < 1:
            raise ValueError(f"neighbours, groups: got {neighbours}, {groups}, needs 1 or more")
        if not (0 < within_decay <= 1 and 0 < group_decay <= 1 and 0 <= alpha <= 1):
            got = f"{within_decay}, {group_decay}, {alpha}"
            raise ValueError(f"within_decay, group_decay, alpha: got {got}, needs (0, 1], (0, 1], [0, 1]")
        self.neighbours, self.alpha, self.groups = neighbours, alpha, groups
        self.within_decay, self.group_decay = within_decay, group_decay
        self.among = None if among is None else np.unique(np.asarray(among, np.int64))

    def _fit(self, interactions: Interactions) -> None:
        user, item, place = baskets(interactions)
        count = _basket_counts(user, place, self.num_users)
        group, size = _groups(place, count[user], self.groups)
        number = np.minimum(count, self.groups)[user]
        weight = self.within_decay ** (count[user] - 1 - place) / size
        weight = weight * self.group_decay ** (self.groups - 1 - group) / number
        shape = (self.num_users, self.num_items)
        self.vectors = csr_array((weight, (user, item)), shape=shape)
        self.vectors.sum_duplicates()
        known = np.flatnonzero(count > 0)
        self.pool = known if self.among is None else np.intersect1d(known, self.among)
        self.squares = np.asarray(self.vectors.power(2).sum(1)).ravel()

    def _scores(self, users: NDArray[np.int64]) -> Scores:
        own = self.vectors[users]
        others = self.vectors[self.pool]
        inner = (own @ others.T).toarray()
        distance = self.squares[users][:, None] + self.squares[self.pool] - 2 * inner
        distance[users[:, None] == self.pool] = np.inf
        near = np.argsort(distance, axis=1, kind="stable")[:, : self.neighbours]
        row = np.repeat(np.arange(len(users)), near.shape[1])
        # Nobody without a basket has a taste: everybody would be as near.
        chosen = (np.isfinite(np.take_along_axis(distance, near, 1)) & (self.squares[users] > 0)[:, None]).ravel()
        mean = csr_array((np.ones(chosen.sum()), (row[chosen], near.ravel()[chosen])), shape=inner.shape) @ others
        number = np.bincount(row[chosen], minlength=len(users)).clip(1)
        return positive(self.alpha * own + mean.multiply((1 - self.alpha) / number[:, None]))

    def _width(self) -> int:
        return max(self.num_items, len(self.pool))


def baskets(interactions: Interactions) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """User, item and number of the basket in the user's order (0 = oldest) of each distinct item of a basket [P]."""
    rows = np.unique(np.stack([interactions.user, interactions.time, interactions.item], 1), axis=0)
    user, time, item = rows.T.copy()
    new = np.r_[True, (np.diff(user) != 0) | (np.diff(time) != 0)][: len(user)]
    number = np.cumsum(new) - 1
    first = np.full(interactions.num_users, len(rows), np.int64)
    np.minimum.at(first, user, number)
    return user, item, number - first[user]


def _basket_counts(user: NDArray[np.int64], place: NDArray[np.int64], num_users: int) -> NDArray[np.int64]:
    count = np.zeros(num_users, np.int64)
    np.maximum.at(count, user, place + 1)
    return count


def _groups(
    place: NDArray[np.int64], count: NDArray[np.int64], groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group and size of the group of a basket, from its place and the number of the user's baskets."""
    short = count < groups
    base, more = count // groups, count % groups
    # The first groups - more groups have `base` baskets, the others one more.
    edge = (groups - more) * base
    late = (groups - more) + (place - edge) // (base + 1)
    group = np.where(short, place, np.where(place < edge, place // base.clip(1), late))
    size = np.where(short, 1, np.where(place < edge, base, base + 1))
    return group, size
