"""Who asks for an ad in one hour, and what they will buy: the planted truth of the generated log.

Every row is one request of one user for one advertiser's app. Three latent standard normals carry the signal:
**spend** (readiness to pay), **activity** and **wealth**; spend leans on both others. Nothing in the files shows them
directly; ``columns.py`` writes the noisy traces a model has to read.

- a user whose ``0.75 spend + 0.66 noise`` passes the 95.5 % quantile has *paid before*, in one or more bundles;
- the log-odds of buying within seven days are ``intercept + 1.3 spend + 0.6 activity + appeal(advertiser) + country +
  0.9 [paid in this bundle] + 0.6 [paid in this category] + 0.8 exp(-days since last purchase / 14) + 0.3 iOS +
  0.25 cos(2 pi (hour - 20) / 24)``;
- a buyer's amount is log-normal with ``mu = level + 0.5 spend + 0.3 wealth + value(advertiser) + 0.3 log1p(past revenue
  in this category)`` and sigma 1.45;
- 42 % of the buyers buy on the first day. Later horizons add money: 40 % of the buyers spend again by day 14 and 45 %
  by day 28, and some others buy for the first time. So d1 <= d7 <= d14 <= d28 in every row.

The intercept and the level are solved for, so that without drift the rate of buyers is the configured one and buyers
have E[log1p amount] = 2.04, as published. ``drift`` moves the population in proportion to the time since the log's
start: spend falls by 0.4, half of the requests come from other countries, half of each advertiser's appeal becomes its
neighbour's, and amounts grow by 0.25 in the logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synthlogs.ads.catalogue import BUNDLES, COUNTRIES, MODELS, Catalogue
from synthlogs.draws import quantile, root, sigmoid
from synthlogs.ragged import Ragged

DAY = 86400
SIGMA = 1.45
BUYER_LOG_MEAN = 2.04
PAID_NULLS = 0.955


@dataclass(frozen=True)
class World:
    """The two constants that are solved for, and how strongly the population moves."""

    intercept: float
    level: float
    drift: float


@dataclass
class Population:
    """The users of one chunk of one hour: latents, entities, payment history and the law their labels follow."""

    second: int
    spend: NDArray[np.float64]
    activity: NDArray[np.float64]
    wealth: NDArray[np.float64]
    advertiser: NDArray[np.int64]
    country: NDArray[np.int64]
    model: NDArray[np.int64]
    paid: Ragged
    paid_score: NDArray[np.float64]
    paid_bundle: NDArray[np.int64]
    paid_count: NDArray[np.int64]
    paid_revenue: NDArray[np.float64]
    paid_time: NDArray[np.int64]
    probability: NDArray[np.float64]
    log_amount: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.spend)

    def oracle(self) -> dict[str, NDArray[np.float64]]:
        """Return what no model can beat: P(buy), E[revenue] and E[log1p revenue] within 7 days given the latents."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(15)
        amounts = np.exp(self.log_amount[:, None] + SIGMA * nodes)
        log1p = np.log1p(amounts) @ (weights / weights.sum())
        mean = self.probability * np.exp(self.log_amount + SIGMA**2 / 2)
        return {"buyer_d7": self.probability, "iap_revenue_d7": mean, "log1p_iap_revenue_d7": self.probability * log1p}


def solve(catalogue: Catalogue, buyer_rate: float, drift: float, rng: np.random.Generator) -> World:
    """Find the intercept and the level that give the buyer rate and the buyers' mean log1p amount without drift."""
    people = draw(catalogue, World(0.0, 0.0, 0.0), 60_000, second=0, hour=12, progress=0.0, rng=rng)
    odds = np.log(people.probability / (1 - people.probability))
    # Noon is not the mean of the day: take its share of the daily cycle out.
    odds -= _hour_effect(12)
    shares = np.array([_hour_effect(hour) for hour in range(24)])
    intercept = root(lambda x: np.mean([sigmoid(odds + s + x).mean() for s in shares]) - buyer_rate, -15.0, 5.0)
    weight = sigmoid(odds + intercept)
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(15)
    grid = people.log_amount[:, None] + SIGMA * nodes

    def mean_log1p(level: float) -> float:
        return float(np.average(np.log1p(np.exp(grid + level)) @ (node_weights / node_weights.sum()), weights=weight))

    return World(intercept, root(lambda level: mean_log1p(level) - BUYER_LOG_MEAN, -6.0, 6.0), drift)


def draw(
    catalogue: Catalogue,
    world: World,
    number: int,
    *,
    second: int,
    hour: int,
    progress: float,
    rng: np.random.Generator,
) -> Population:
    """Draw the users of one chunk.

    Args:
        number: rows
        second: unix time at which the hour starts
        hour: hour of the day, 0 .. 23
        progress: share of the whole log's span that has passed, 0 .. 1; drift is proportional to it
    """
    moved = world.drift * progress
    wealth, activity, noise = rng.normal(size=(3, number))
    spend = 0.3 * wealth + 0.3 * activity + np.sqrt(1 - 0.18) * noise
    advertiser = catalogue.popularity["advertiser"].draw(number, rng)
    advertiser = np.where(catalogue.advertiser_launch[advertiser] > progress, advertiser % 20, advertiser)
    country = catalogue.popularity["country"].draw(number, rng)
    country = np.where(rng.random(number) < 0.5 * moved, (country + 40) % COUNTRIES, country)
    model = catalogue.model_by_price[(_uniform(0.8 * wealth + 0.6 * rng.normal(size=number)) * MODELS).astype(int)]
    spend = spend - 0.4 * moved

    score = 0.75 * spend + np.sqrt(1 - 0.75**2) * rng.normal(size=number)
    present = score > quantile(PAID_NULLS)
    lengths = 1 + np.minimum(rng.poisson(np.exp(np.clip(0.4 * spend, None, 2.5)) * 0.6), 30)
    paid = Ragged(present, lengths)
    bundle = _paid_bundles(catalogue, paid, advertiser, rng)
    total = len(bundle)
    count = 1 + rng.poisson(np.exp(0.25 * spend[paid.row]))
    price = np.exp(0.9 + 0.5 * spend[paid.row] + 0.3 * wealth[paid.row] + 0.8 * rng.normal(size=total))
    age = 1.0 + rng.exponential(12 * DAY, total).astype(np.int64)
    revenue = np.round(count * price, 2)

    own = catalogue.advertiser_bundle[advertiser]
    in_bundle = np.bincount(paid.row, bundle == own[paid.row], number) > 0
    same = catalogue.bundle_category[bundle] == catalogue.bundle_category[own][paid.row]
    in_category = np.bincount(paid.row, same, number) > 0
    category_revenue = np.bincount(paid.row, revenue * same, number)
    newest = np.full(number, np.inf)
    np.minimum.at(newest, paid.row, age)
    appeal = catalogue.advertiser_appeal
    appeal = (1 - 0.5 * moved) * appeal + 0.5 * moved * np.roll(appeal, 1)
    ios = catalogue.make_system[catalogue.model.parent[model]]
    odds = 1.3 * spend + 0.6 * activity + appeal[advertiser] + catalogue.country_effect[country] + 0.9 * in_bundle
    odds += 0.6 * in_category + 0.8 * np.exp(-newest / (14 * DAY)) + 0.3 * ios + _hour_effect(hour)
    log_amount = world.level + 0.25 * moved + 0.5 * spend + 0.3 * wealth + catalogue.advertiser_value[advertiser]
    return Population(
        second=second,
        spend=spend,
        activity=activity,
        wealth=wealth,
        advertiser=advertiser,
        country=country,
        model=model,
        paid=paid,
        paid_score=score,
        paid_bundle=bundle,
        paid_count=count,
        paid_revenue=revenue,
        paid_time=second - age.astype(np.int64),
        probability=sigmoid(world.intercept + odds),
        log_amount=log_amount + 0.3 * np.log1p(category_revenue),
    )


def labels(people: Population, rng: np.random.Generator) -> dict[str, NDArray]:
    """Draw the 17 labels: nested buyer flags, rising amounts, counts, registration and retention."""
    number = len(people)
    amount = np.maximum(np.round(np.exp(people.log_amount + SIGMA * rng.normal(size=number)), 2), 0.01)
    buys: dict[str, NDArray] = {"d7": rng.random(number) < people.probability}
    buys["d1"] = buys["d7"] & (rng.random(number) < 0.42)
    money: dict[str, NDArray] = {"d7": np.where(buys["d7"], amount, 0.0)}
    counts: dict[str, NDArray] = {"d7": np.where(buys["d7"], 1 + rng.poisson(0.8, number), 0)}
    for before, horizon, again, first in (("d7", "d14", 0.40, 0.18), ("d14", "d28", 0.45, 0.20)):
        more = np.where(buys[before], rng.random(number) < again, rng.random(number) < first * people.probability)
        extra = np.maximum(np.round(amount * rng.exponential(0.6, number), 2), 0.01)
        buys[horizon] = buys[before] | more
        money[horizon] = np.round(money[before] + np.where(more, extra, 0.0), 2)
        counts[horizon] = counts[before] + more * (1 + rng.poisson(0.5, number))
    returns = sigmoid(-1.2 + 0.6 * people.activity)
    day = {name: rng.random(number) < returns * share for name, share in (("1", 1.0), ("3", 0.7), ("7", 0.5))}
    week = day["1"] | day["3"] | day["7"]
    out: dict[str, NDArray] = {f"buyer_{horizon}": buys[horizon] for horizon in ("d1", "d7", "d14", "d28")}
    out |= {f"buy_{horizon}": counts[horizon] for horizon in ("d7", "d14", "d28")}
    out |= {f"iap_revenue_{horizon}": money[horizon] for horizon in ("d7", "d14", "d28")}
    out["registration"] = rng.random(number) < sigmoid(-2.0 + 0.3 * people.activity)
    out |= {"retention_d1_to_d7": week, "retention_d3_to_d7": day["3"] | day["7"]}
    out["retention_d7_to_d14"] = rng.random(number) < returns * 0.4
    return out | {"retention_d1": day["1"], "retention_d3": day["3"], "retentiond7": day["7"]}


def _paid_bundles(catalogue: Catalogue, paid: Ragged, advertiser: NDArray, rng: np.random.Generator) -> NDArray:
    """A fifth of first payments were in the advertiser's own app, a quarter of all in an app of its taxonomy level."""
    own = catalogue.advertiser_bundle[advertiser[paid.row]]
    near = catalogue.bundle.draw(catalogue.bundle.parent[own], rng)
    anywhere = catalogue.popularity["bundle"].draw(len(own), rng) % BUNDLES
    kind = rng.random(len(own))
    return np.where((kind < 0.2) & (paid.position == 0), own, np.where(kind < 0.45, near, anywhere))


def _hour_effect(hour: int) -> float:
    return 0.25 * float(np.cos(2 * np.pi * (hour - 20) / 24))


def _uniform(score: NDArray) -> NDArray[np.float64]:
    """The normal distribution function by its logistic approximation, kept below one."""
    return np.minimum(sigmoid(1.702 * score), 1 - 1e-9)
