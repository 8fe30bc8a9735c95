"""What a generated shop sells and shows: topics, categories, skus, URLs and queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synthlogs.draws import Choice, children, rank_within, zipf
from synthlogs.settings import ShopConfig

DAY = 86400
WIDTH = 16
TOPICS, PERSONAS = 32, 12


@dataclass
class Catalogue:
    """Topics, categories, skus, URLs and queries; children of one parent are contiguous, so a draw is one search."""

    successor: NDArray[np.int64]
    period: NDArray[np.float64]
    persona_topics: NDArray[np.float64]
    category_id: NDArray[np.int64]
    sku_id: NDArray[np.int64]
    sku_category: NDArray[np.int64]
    sku_price: NDArray[np.int64]
    sku_name: NDArray[np.uint8]
    query: NDArray[np.uint8]
    url_id: NDArray[np.int64]
    category_of_topic: Choice
    sku_of_category: Choice
    launch_of_category: NDArray[np.int64]
    stand_in: NDArray[np.int64]
    url_of_category: Choice
    query_of_category: Choice
    generic_url: Choice
    service_url: Choice

    @classmethod
    def draw(cls, config: ShopConfig, rng: np.random.Generator) -> Catalogue:
        """Draw a catalogue whose size grows with the number of clients as in the challenge data."""
        categories = max(TOPICS * 2, int(1.57 * config.clients**0.5))
        skus = max(categories * 4, int(0.0674 * config.clients))
        urls = max(categories * 6, int(0.677 * config.clients))
        queries = categories * 12
        topic = children(TOPICS, categories, rng)
        popularity = rng.permutation(_shares(categories, 0.8))
        sku_category = children(categories, skus, rng, popularity)
        url_category = children(categories, urls - 40, rng, popularity)
        query_category = children(categories, queries, rng, popularity)
        centre = rng.normal(size=(TOPICS, WIDTH))
        category_vector = centre[topic] + 0.6 * rng.normal(size=(categories, WIDTH))
        worth = rng.normal(size=categories)[sku_category] + 0.8 * rng.normal(size=skus)
        name = category_vector[sku_category] + 0.5 * rng.normal(size=(skus, WIDTH))
        name[:, 0] += worth
        query = category_vector[query_category] + 0.7 * rng.normal(size=(queries, WIDTH))
        # A topic without a period is durable: nothing of it is needed again soon.
        period = np.where(rng.random(TOPICS) < 0.5, rng.uniform(6, 30, TOPICS), 0.0) * DAY
        cycle = rng.permutation(TOPICS)
        successor = np.empty(TOPICS, np.int64)
        successor[cycle] = np.roll(cycle, -1)
        # Of some well-sold categories the last sku is new in the label windows; until then the first one stands in.
        first = np.searchsorted(sku_category, np.arange(categories))
        last = np.searchsorted(sku_category, np.arange(categories), side="right") - 1
        launching = np.argsort(-popularity * (last > first), kind="stable")[: config.target_new_skus]
        launching = launching[last[launching] > first[launching]]
        launch_of_category = np.full(categories, -1)
        launch_of_category[launching] = last[launching]
        stand_in = np.arange(skus)
        stand_in[last[launching]] = first[launching]
        # Pages that belong to no topic come last: 8 service pages after 32 generic ones.
        return cls(
            successor=successor,
            period=period,
            persona_topics=rng.dirichlet(np.full(TOPICS, 0.25), PERSONAS),
            category_id=rng.permutation(categories).astype(np.int64),
            sku_id=rng.permutation(skus).astype(np.int64),
            sku_category=sku_category,
            sku_price=(worth.argsort().argsort() * 100 // skus).astype(np.int64),
            sku_name=_quantise(name),
            query=_quantise(query),
            url_id=rng.permutation(urls).astype(np.int64),
            category_of_topic=Choice.within(topic, TOPICS, popularity),
            sku_of_category=Choice.within(sku_category, categories, zipf(rank_within(sku_category), 1.3)),
            launch_of_category=launch_of_category,
            stand_in=stand_in,
            url_of_category=Choice.within(url_category, categories, zipf(rank_within(url_category), 1.0)),
            query_of_category=Choice.within(query_category, categories, zipf(rank_within(query_category), 1.0)),
            generic_url=Choice.within(np.zeros(32, np.int64), 1, _shares(32, 1.0), base=urls - 40),
            service_url=Choice.within(np.zeros(8, np.int64), 1, _shares(8, 1.0), base=urls - 8),
        )

    @property
    def launched(self) -> NDArray[np.int64]:
        """Skus that cannot be had before train_start."""
        return self.launch_of_category[self.launch_of_category >= 0]


def _shares(number: int, power: float) -> NDArray[np.float64]:
    weight = zipf(np.arange(number), power)
    return weight / weight.sum()


def _quantise(vectors: NDArray[np.float64]) -> NDArray[np.uint8]:
    scaled = (vectors - vectors.mean(0)) / vectors.std(0)
    return np.clip(np.round(127.5 + 50 * scaled), 0, 255).astype(np.uint8)
