"""How the users of the generated shop look, return and buy, session by session."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synthlogs.draws import sigmoid
from synthlogs.purchases.catalogue import DAY, TASTES, Catalogue

VIEW, CART, PURCHASE = 0, 1, 2
CANDIDATES = 5
# Of the sessions that buy and looked at a companion, the share that buys it too.
COMPANION = 0.3
LONGEST = 80
# By the hour of the day, UTC: how much is going on.
_HOURS = np.arange(25)
_CLOCK = np.cumsum(np.r_[0.0, 1 + 0.8 * np.cos(2 * np.pi * (np.arange(24) - 15) / 24)])


@dataclass
class Sessions:
    """What one session of each of many users held, as columns of events and what is known of the sessions."""

    events: dict[str, NDArray]
    odds: NDArray[np.float64]
    views: int


@dataclass
class Looks:
    """The views [n] of one session of each of many users [m]: whose, when and of what.

    Args:
        companion: the last product of the complement looked at [m], -1 for none; it may be bought too
        over: when the last look was [m]
    """

    of: NDArray[np.int64]
    second: NDArray[np.int64]
    product: NDArray[np.int64]
    companion: NDArray[np.int64]
    over: NDArray[np.int64]


class Users:
    """One block of users, advanced session by session; all that still have time left move together."""

    def __init__(self, catalogue: Catalogue, number: int, intercept: float, days: int, rng: np.random.Generator):
        self.catalogue, self.rng, self.intercept, self.end = catalogue, rng, intercept, days * DAY
        self.taste = rng.normal(size=(number, TASTES)).astype(np.float32)
        self.wealth = rng.normal(size=number)
        self.readiness = 0.8 * rng.normal(size=number)
        self.loyalty = rng.normal(0.0, 1.3, number)
        self.pace = np.exp(rng.normal(1.2, 0.9, number) - 0.2 * self.loyalty) * DAY
        self.size = np.exp(rng.normal(0.55, 0.8, number))
        first, third = (catalogue.any_category.draw(number, rng) for _ in range(2))
        second = catalogue.category_of_department(catalogue.department[first], rng)
        self.interests = np.stack([first, second, third], 1)
        self.category = first.copy()
        self.stage = np.zeros(number)
        self.focus = np.full(number, -1)
        early = rng.random(number) < 0.4
        self.time = np.where(early, np.minimum(self.pace, self.end) * rng.random(number), self.end * rng.random(number))
        self.count = 0

    def sessions(self) -> Iterator[Sessions]:
        """Yield the first session of every user, then the second of those who return, and so on."""
        who = np.flatnonzero(self.time < self.end)
        while len(who):
            yield self._session(who)
            who = who[self.time[who] < self.end]

    def utility(self, who: NDArray[np.int64], product: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how much each user [n] likes each product [n]: brand and style, price level, quality."""
        catalogue = self.catalogue
        style = np.einsum("nk,nk->n", self.taste[who], catalogue.style[product])
        return (
            style
            - 0.8 * np.abs(catalogue.relative_price[product] - self.wealth[who])
            + 0.3 * catalogue.quality[product]
        )

    def _session(self, who: NDArray) -> Sessions:
        rng, begin = self.rng, _warped(self.time[who])
        lost = np.flatnonzero((self.focus[who] < 0) | (rng.random(len(who)) < 0.2))
        self.focus[who[lost]] = self._pick(who[lost], self.category[who[lost]], begin[lost])
        looks, focus = self._look(who, begin), self.focus[who]
        odds = self.readiness[who] + 0.7 * self.stage[who] + 0.5 * self.utility(who, focus)
        odds += 4.0 * self.catalogue.cut(focus, begin.astype(np.int64))
        chance = sigmoid(self.intercept + odds)
        bought = rng.random(len(who)) < chance
        carted = rng.random(len(who)) < np.where(bought, 0.6, np.minimum(0.6 * chance, 0.6))
        both = bought & (looks.companion >= 0) & (looks.companion != focus) & (rng.random(len(who)) < COMPANION)

        cart, buy, more = np.flatnonzero(carted), np.flatnonzero(bought), np.flatnonzero(both)
        of = np.concatenate([looks.of, cart, buy, more])
        product = np.concatenate([looks.product, focus[cart], focus[buy], looks.companion[more]])
        share = np.where(product == focus[of], 1.0, np.where(product == looks.companion[of], COMPANION, 0.0))
        events = {
            "user": who[of],
            "session": self.count + of,
            "second": np.concatenate(
                [looks.second, looks.over[cart] + 20, looks.over[buy] + 60, looks.over[more] + 61]
            ),
            "kind": np.repeat([VIEW, CART, PURCHASE], [len(looks.of), len(cart), len(buy) + len(more)]),
            "product": product,
            "propensity": chance[of] * share,
        }
        self.count += len(who)
        self._advance(who, bought, looks.over - begin)
        return Sessions(events, odds, len(looks.of))

    def _look(self, who: NDArray, begin: NDArray) -> Looks:
        """First at the product one is after, then at that again, at others like it, at companions and at anything."""
        rng, catalogue = self.rng, self.catalogue
        number = 1 + rng.poisson(self.size[who] * (1 + 0.2 * self.stage[who]) * rng.gamma(0.8, 1.25, len(who)))
        number = np.minimum(number, LONGEST)
        of, first = np.repeat(np.arange(len(who)), number), np.cumsum(number) - number
        gap = 10 + rng.exponential(45.0, len(of))
        passed = np.cumsum(gap)
        second = (begin[of] + passed - (passed - gap)[first][of]).astype(np.int64)
        kind = rng.random(len(of))
        kind[first] = 0.0
        product, category = self.focus[who][of], self.category[who][of]
        beside, anything = (kind >= 0.8) & (kind < 0.9), kind >= 0.9
        category[beside] = catalogue.complement[category[beside]]
        category[anything] = catalogue.any_category.draw(int(anything.sum()), rng)
        other = np.flatnonzero(kind >= 0.4)
        product[other] = self._pick(who[of[other]], category[other], second[other])
        companion = np.full(len(who), -1)
        companion[of[beside]] = product[beside]
        return Looks(of, second, product, companion, over=second[first + number - 1])

    def _advance(self, who: NDArray, bought: NDArray, length: NDArray) -> None:
        rng, catalogue = self.rng, self.catalogue
        number = len(who)
        # A purchase ends the wish; half of the next ones are for what goes with it.
        over = bought | (rng.random(number) < 0.12)
        interest = self.interests[who, np.searchsorted([0.55, 0.85], rng.random(number))]
        fresh = np.where(rng.random(number) < 0.8, interest, catalogue.any_category.draw(number, rng))
        following = np.where(bought & (rng.random(number) < 0.5), catalogue.complement[self.category[who]], fresh)
        quiet = rng.random(number) < sigmoid(1.1 - self.loyalty[who] - 0.4 * self.stage[who])
        gap = self.pace[who] * np.exp(-0.3 * self.stage[who]) * rng.gamma(0.7, 1 / 0.7, number)
        gap += quiet * rng.exponential(90 * DAY, number)
        self.time[who] += np.maximum(gap, 3600.0) + 2 * length
        self.category[who] = np.where(over, following, self.category[who])
        self.focus[who] = np.where(over, -1, self.focus[who])
        self.stage[who] = np.where(over, 0.0, np.minimum(self.stage[who] + rng.exponential(0.8, number), 4.0))

    def _pick(self, who: NDArray, category: NDArray, second: NDArray) -> NDArray[np.int64]:
        """The one a user likes best, with some luck, of a few popular products of a category that can be had."""
        rng, catalogue = self.rng, self.catalogue
        day = second.astype(np.int64) // DAY
        best, liked = catalogue.first_product[category], np.full(len(who), -np.inf)
        for _ in range(CANDIDATES):
            product = catalogue.product_of_category(category, rng)
            utility = self.utility(who, product) + rng.gumbel(0.0, 0.6, len(who))
            better = (utility > liked) & (catalogue.launch[product] <= day)
            best, liked = np.where(better, product, best), np.where(better, utility, liked)
        return best


def _warped(time: NDArray[np.float64]) -> NDArray[np.float64]:
    """Crowd the times of a day to its busy hours, keeping their order."""
    day = np.floor(time / DAY)
    return day * DAY + 3600 * np.interp((time / DAY - day) * _CLOCK[-1], _CLOCK, _HOURS)
