"""The range of the generated grocer: the tree of products, their prices week by week, and who complements whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from synthlogs.draws import children, rank_within, zipf
from synthlogs.settings import BasketsConfig

FRESH, GROCERY, NONFOOD = 0, 1, 2
# What each of the nine departments sells.
FOCUS = np.array([FRESH, FRESH, FRESH, GROCERY, GROCERY, GROCERY, GROCERY, NONFOOD, NONFOOD])
# A pair of complements comes to mind on one trip of so many, and is then taken so many times as often.
LIFT = 4
DEPTHS = (0.1, 0.2, 0.25, 0.33, 0.5)


@dataclass(frozen=True)
class Range:
    """Products [P] in categories [C]; a partner of -1 is none."""

    codes: dict[str, pa.Array]
    category: NDArray[np.int64]
    focus: NDArray[np.int64]
    share: NDArray[np.float64]
    breadth: NDArray[np.float64]
    weighed: NDArray[np.bool_]
    relative_price: NDArray[np.float64]
    own: NDArray[np.float64]
    complement: NDArray[np.int64]
    complement_cross: NDArray[np.float64]
    substitute: NDArray[np.int64]
    substitute_cross: NDArray[np.float64]
    base: NDArray[np.float64]
    price: NDArray[np.float64]
    season: NDArray[np.float64]

    @classmethod
    def draw(cls, config: BasketsConfig, rng: np.random.Generator) -> Range:
        """Draw the tree of about 5,000 products in 250, 90, 31 and 9 groups, prices [P, weeks] and relations."""
        products = config.products
        sizes = [max(9, round(products * share)) for share in (0.0062, 0.018, 0.05)]
        groups, levels = 9, [np.arange(9)]
        for size in (*sizes, products):
            levels.append(children(groups, size, rng))
            groups = size
        department, category = FOCUS, levels[-1]
        for parent in levels[1:-1]:
            department = department[parent]
        categories = len(department)
        centre, dear = rng.normal(0.35, 0.6, categories), 0.5 * rng.normal(size=products)
        first = np.round(np.exp(centre[category] + dear), 2).clip(0.2)
        base = _base_prices(first, config.weeks, rng)
        complement, substitute = _pairs(category, rng)
        cross = rng.uniform(0.2, 0.7, (2, products))
        return cls(
            codes=_codes(levels),
            category=category,
            focus=department,
            share=_shares(category),
            breadth=rng.random(products),
            weighed=rng.random(products) < config.weighed,
            relative_price=(dear / 0.5).clip(-1.5, 1.5),
            own=-np.exp(rng.normal(np.log(1.8), 0.35, products)).clip(0.6, 3.5),
            complement=complement,
            complement_cross=np.where(complement >= 0, -cross[0], 0.0),
            substitute=substitute,
            substitute_cross=np.where(substitute >= 0, cross[1], 0.0),
            base=base,
            price=_promoted(base, config.promo, rng),
            season=_seasons(categories, config.weeks, rng),
        )

    def factor(self, week: int) -> NDArray[np.float64]:
        """Return by how much the week's prices change the demand for each product [P]: the law's three powers."""
        change = np.log(self.price[:, week] / self.base[:, 0])
        power = self.own * change
        power += self.complement_cross * change[self.complement] + self.substitute_cross * change[self.substitute]
        return np.exp(power)

    def most(self) -> NDArray[np.int64]:
        """Return the largest value the trip's `pair` can take for each product [P]."""
        return np.where(self.complement >= 0, LIFT, 1) * np.where(self.substitute >= 0, 2, 1)


def _codes(levels: list[NDArray[np.int64]]) -> dict[str, pa.Array]:
    """The code of every product and of its groups, as published: PRD0900001, CL00001, DEP00001, G00001, D00001."""
    codes, groups = {}, np.arange(len(levels[-1]))
    for name, prefix, parent in (
        ("PROD_CODE", "PRD09", levels[4]),
        ("PROD_CODE_10", "CL", levels[3]),
        ("PROD_CODE_20", "DEP", levels[2]),
        ("PROD_CODE_30", "G", levels[1]),
        ("PROD_CODE_40", "D", levels[0]),
    ):
        codes[name] = pa.array([f"{prefix}{number + 1:05d}" for number in groups.tolist()])
        groups = parent[groups]
    return codes


def _shares(category: NDArray[np.int64]) -> NDArray[np.float64]:
    weight = zipf(rank_within(category), 0.8)
    return weight / np.bincount(category, weight)[category]


def _base_prices(first: NDArray, weeks: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Base prices [P, weeks]: a step of some per cent once in about sixty weeks."""
    step = np.where(rng.random((len(first), weeks)) < 1 / 60, rng.normal(0.03, 0.05, (len(first), weeks)), 0.0)
    step[:, 0] = 0.0
    return np.round(first[:, None] * np.exp(np.cumsum(step, axis=1)), 2).clip(0.1)


def _promoted(base: NDArray[np.float64], promo: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Prices [P, weeks] with promotions of one to three weeks; a product is in one at a time."""
    begins = rng.random(base.shape) < promo / 2
    length, depth = rng.integers(1, 4, base.shape), rng.choice(DEPTHS, base.shape)
    price, left, now = base.copy(), np.zeros(len(base), np.int64), np.zeros(len(base))
    for week in range(base.shape[1]):
        new = begins[:, week] & (left == 0)
        left, now = np.where(new, length[:, week], left), np.where(new, depth[:, week], now)
        on = left > 0
        price[on, week] = np.round(base[on, week] * (1 - now[on]), 2)
        left = np.maximum(left - 1, 0)
    return price


def _pairs(category: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Complements, from two categories, for a third of the products; substitutes, from one, for another third."""
    products = len(category)
    complement, substitute = np.full(products, -1), np.full(products, -1)
    drawn = rng.permutation(products)[: products // 3]
    half = len(drawn) // 2
    one, other = drawn[:half], drawn[half : 2 * half]
    apart = category[one] != category[other]
    complement[one[apart]], complement[other[apart]] = other[apart], one[apart]
    # Neighbours in a category that are both asked: every product has one substitute at most.
    even = np.flatnonzero((rank_within(category)[:-1] % 2 == 0) & (category[1:] == category[:-1]))
    even = even[rng.random(len(even)) < 0.35]
    substitute[even], substitute[even + 1] = even + 1, even
    return complement, substitute


def _seasons(categories: int, weeks: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How much more is asked of each category [C, weeks]: a yearly wave, and the two weeks before Christmas."""
    week = np.arange(weeks) + 6
    height, peak = 0.25 * rng.random(categories), 52 * rng.random(categories)
    wave = 1 + height[:, None] * np.cos(2 * np.pi * (week - peak[:, None]) / 52)
    christmas = 1 + rng.random(categories)[:, None] * np.isin(week % 52, (41, 42))
    return wave * christmas
