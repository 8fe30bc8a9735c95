"""Who shops when, where and for what, and what is put in the basket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from synthlogs.baskets.range import FRESH, GROCERY, LIFT, NONFOOD, Range
from synthlogs.draws import Choice, paired, zipf
from synthlogs.settings import BasketsConfig

FORMATS, FORMAT_SHARES = ("LS", "MS", "SS", "XLS"), (0.55, 0.22, 0.16, 0.07)
# The share of the range each format carries.
CARRIED = np.array([0.95, 0.7, 0.4, 1.0])
REGIONS = tuple(f"{side}{number:02d}" for side in "ENSW" for number in (1, 2, 3))
TYPES = ("Full Shop", "Top Up", "Small Shop")
LEVELS = ("LA", "MM", "UM")
HABIT_SIGMA, HABIT_TABLE = 1.8, 1 << 14


class Mission(NamedTuple):
    """One reason to shop: its type, the weight of each focus, the picks wanted, how common it is, and when.

    Monday is weekday 0.
    """

    name: str
    type: int
    focus: tuple[float, float, float]
    size: float
    common: float
    weekday: int
    hour: int


MISSIONS = (
    Mission("full mixed", 0, (1.0, 0.8, 0.4), 27.0, 0.08, 5, 12),
    Mission("full grocery", 0, (0.4, 1.0, 0.4), 24.0, 0.03, 6, 11),
    Mission("top up fresh", 1, (1.0, 0.15, 0.02), 10.5, 0.2, 4, 17),
    Mission("top up grocery", 1, (0.15, 1.0, 0.05), 10.5, 0.05, 3, 18),
    Mission("top up mixed", 1, (1.0, 0.6, 0.2), 11.5, 0.09, 4, 16),
    Mission("small fresh", 2, (1.0, 0.1, 0.02), 3.2, 0.36, 2, 13),
    Mission("small grocery", 2, (0.1, 1.0, 0.02), 3.0, 0.13, 1, 19),
    Mission("small nonfood", 2, (0.05, 0.1, 1.0), 2.8, 0.06, 0, 14),
)


@dataclass(frozen=True)
class Stores:
    """Format and region of each store [S]; stores of a region are contiguous."""

    format: NDArray[np.int64]
    region: NDArray[np.int64]
    near: Choice

    @classmethod
    def draw(cls, number: int, rng: np.random.Generator) -> Stores:
        """Draw the stores; some are much busier than others."""
        region = np.sort(rng.integers(0, len(REGIONS), number))
        weight = rng.permutation(zipf(np.arange(number), 0.5, shift=5.0))
        return cls(
            rng.choice(len(FORMATS), number, p=FORMAT_SHARES), region, Choice.within(region, len(REGIONS), weight)
        )


@dataclass(frozen=True)
class Shoppers:
    """Habits of each shopper [U]; those beyond the first `customers` have no card."""

    rate: NDArray[np.float64]
    first_week: NDArray[np.int64]
    last_week: NDArray[np.int64]
    size: NDArray[np.float64]
    level: NDArray[np.int64]
    stage: NDArray[np.int64]
    missions: NDArray[np.float64]
    store: NDArray[np.int64]
    second_store: NDArray[np.int64]

    @classmethod
    def draw(cls, config: BasketsConfig, stores: Stores, rng: np.random.Generator) -> Shoppers:
        """Draw those with a card and as many without as the share of the anonymous asks for."""
        number = round(config.customers / (1 - config.anonymous))
        region = stores.region[rng.integers(0, config.stores, number)]
        stays = rng.random(number) < 0.7
        begin, end = np.sort(rng.integers(0, config.weeks, (2, number)), axis=0)
        common = np.array([mission.common for mission in MISSIONS])
        return cls(
            rate=np.exp(rng.normal(-0.9, 1.0, number)).clip(0, 7),
            first_week=np.where(stays, 0, begin),
            last_week=np.where(stays, config.weeks - 1, end),
            size=np.exp(rng.normal(-0.1, 0.45, number)),
            level=rng.choice(3, number, p=(0.27, 0.45, 0.28)),
            stage=rng.choice(6, number, p=(0.34, 0.23, 0.15, 0.14, 0.08, 0.06)),
            missions=rng.gamma(2.5 * common / common.sum() * len(common), size=(number, len(MISSIONS))),
            store=stores.near(region, rng),
            second_store=stores.near(region, rng),
        )


@dataclass(frozen=True)
class Week:
    """Trips [T] of some shoppers in one week, and the rows [n] that were taken on them."""

    shopper: NDArray[np.int64]
    mission: NDArray[np.int64]
    day: NDArray[np.int64]
    hour: NDArray[np.int64]
    store: NDArray[np.int64]
    trip: NDArray[np.int64]
    product: NDArray[np.int64]
    quantity: NDArray[np.int64]
    spend: NDArray[np.float64]


class Grocer:
    """Draws the baskets of a week; everything but the random stream is the same in every block of shoppers."""

    def __init__(
        self, sold: Range, stores: Stores, shoppers: Shoppers, config: BasketsConfig, rng: np.random.Generator
    ):
        self.sold, self.stores, self.shoppers, self.seed = sold, stores, shoppers, config.seed
        wanted = np.array([mission.focus for mission in MISSIONS])[:, sold.focus]
        wanted = wanted * rng.gamma(2.0, 0.5, wanted.shape) * rng.permutation(zipf(np.arange(wanted.shape[1]), 0.5))
        self.wanted = wanted / wanted.sum(1, keepdims=True)
        z = np.sort(rng.normal(size=HABIT_TABLE))
        self.habit = np.exp(HABIT_SIGMA * z.clip(-4, 2.2))
        self.habit_most = float(self.habit[-1])
        self.habit_mean = float(self.habit.mean())

    def week(self, week: int, first: int, last: int, rng: np.random.Generator) -> Week:
        """Return what the shoppers `first` .. `last` - 1 do in a week."""
        sold, who = self.sold, self._trips(week, first, last, rng)
        number = len(who)
        mission = self._missions(who, rng)
        store = self._store(who, rng)
        size = (
            np.array([one.size for one in MISSIONS])[mission]
            * self.shoppers.size[who]
            * rng.gamma(3.0, 1 / 3.0, number)
        )
        trip, product = self._picks(week, mission, size, rng)
        kept = self._accepted(who[trip], store[trip], product, rng)
        kept &= self._considered(week, first, trip, product)
        picked = trip[kept] * len(sold.share) + product[kept]
        units = 1 + (rng.random(len(picked)) < 0.12) * (1 + rng.geometric(0.6, len(picked)))
        # Two picks of one product are one row.
        row, entry = np.unique(picked, return_inverse=True)
        trip, product = row // len(sold.share), row % len(sold.share)
        quantity = np.bincount(entry, np.where(sold.weighed[product[entry]], 1, units), len(row)).astype(np.int64)
        weight = np.where(sold.weighed[product], np.exp(0.35 * rng.normal(size=len(row))), 1.0)
        spend = np.round(quantity * sold.price[product, week] * weight, 2).clip(0.01)
        weekday = np.array([one.weekday for one in MISSIONS])[mission]
        day = np.where(rng.random(number) < 0.4, weekday, rng.integers(0, 7, number))
        hour = np.clip(
            np.rint(np.array([one.hour for one in MISSIONS])[mission] + 2.6 * rng.normal(size=number)), 8, 21
        )
        return Week(who, mission, day, hour.astype(np.int64), store, trip, product, quantity, spend)

    def _trips(self, week: int, first: int, last: int, rng: np.random.Generator) -> NDArray[np.int64]:
        here = np.arange(first, last)
        there = (self.shoppers.first_week[here] <= week) & (week <= self.shoppers.last_week[here])
        return np.repeat(here, rng.poisson(self.shoppers.rate[here] * there))

    def _missions(self, who: NDArray, rng: np.random.Generator) -> NDArray[np.int64]:
        mix = np.cumsum(self.shoppers.missions[who], axis=1)
        return (mix < mix[:, -1:] * rng.random((len(who), 1))).sum(1)

    def _store(self, who: NDArray, rng: np.random.Generator) -> NDArray[np.int64]:
        kind = rng.random(len(who))
        anywhere = rng.integers(0, len(self.stores.region), len(who))
        store = np.where(kind < 0.8, self.shoppers.store[who], self.shoppers.second_store[who])
        return np.where(kind < 0.95, store, anywhere)

    def _picks(
        self, week: int, mission: NDArray, size: NDArray, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw more than will be taken: as much as the largest habit, level and pair would take."""
        sold = self.sold
        weight = self.wanted[:, sold.category] * sold.season[sold.category, week] * sold.share
        weight = weight * sold.factor(week) * sold.most()
        products = weight.shape[1]
        choice = Choice.within(np.repeat(np.arange(len(MISSIONS)), products), len(MISSIONS), weight.ravel())
        most = self.habit_most / self.habit_mean * _LEVEL_MOST
        trip = np.repeat(np.arange(len(mission)), rng.poisson(size * weight.sum(1)[mission] * most))
        return trip, choice(mission[trip], rng) % products

    def _accepted(self, who: NDArray, store: NDArray, product: NDArray, rng: np.random.Generator) -> NDArray[np.bool_]:
        habit = (
            self.habit[(paired(who, product, _salt(self.seed, 1 << 19)) >> np.uint64(50)).astype(np.int64)]
            / self.habit_most
        )
        sensitive = 1 - self.shoppers.level[who]
        level = np.exp(-0.4 * sensitive * self.sold.relative_price[product]) / _LEVEL_MOST
        carried = self.sold.breadth[product] < CARRIED[self.stores.format[store]]
        return (rng.random(len(who)) < habit * level) & carried

    def _considered(self, week: int, first: int, trip: NDArray, product: NDArray) -> NDArray[np.bool_]:
        """The trip's coins for pairs: of complements one in four trips thinks, of two substitutes of one only."""
        sold, salt = self.sold, _salt(self.seed, week)
        number = trip + (first << 20)
        pair = np.minimum(product, sold.complement[product])
        thought = (paired(number, pair, salt) >> np.uint64(8)) % np.uint64(LIFT) == 0
        pair = np.minimum(product, sold.substitute[product])
        side = (paired(number, pair, salt + 1) >> np.uint64(8)) % np.uint64(2) == (product > pair)
        return ((sold.complement[product] < 0) | thought) & ((sold.substitute[product] < 0) | side)


def _salt(seed: int, number: int) -> int:
    return 2 * ((seed << 20) + number)


_LEVEL_MOST = float(np.exp(0.4 * 1.5))


def dominant(fresh: NDArray, grocery: NDArray, nonfood: NDArray) -> NDArray[np.int64]:
    """Return for each basket which focus has three fifths of its spend, or 3 where none has."""
    spent = np.stack([fresh, grocery, nonfood], 1)
    assert (FRESH, GROCERY, NONFOOD) == (0, 1, 2)
    return np.where(spent.max(1) >= 0.6 * spent.sum(1), spent.argmax(1), 3)
