"""How the clients of a generated shop behave, session by session."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from synthlogs.draws import sigmoid
from synthlogs.shop.catalogue import DAY, PERSONAS, TOPICS, Catalogue

# Published share of rows that repeat an earlier row.
DUPLICATES = {"product_buy": 0.1597, "search_query": 0.0564, "remove_from_cart": 0.0538, "add_to_cart": 0.0189}
TABLES = ("product_buy", "add_to_cart", "remove_from_cart", "page_visit", "search_query")


class Simulation:
    """One chunk of clients, advanced session by session; all clients that still have time left move together."""

    def __init__(self, catalogue: Catalogue, clients: int, start: int, end: int, launch: int, rng: np.random.Generator):
        self.catalogue, self.rng, self.end, self.launch = catalogue, rng, end, launch
        persona = rng.integers(0, PERSONAS, clients)
        cumulative = np.cumsum(catalogue.persona_topics, axis=1)
        draws = rng.random((clients, 3))
        self.taste = np.stack([(cumulative[persona] < draws[:, [i]]).sum(1) for i in range(3)], 1).clip(0, TOPICS - 1)
        self.price = rng.beta(1.5, 1.5, clients) * 99
        self.loyalty = rng.normal(0.0, 1.9, clients)
        self.pace = np.exp(rng.normal(2.0, 0.8, clients) - 0.25 * self.loyalty) * DAY
        self.size = np.exp(rng.normal(-0.75, 0.95, clients) + 0.18 * self.loyalty)
        self.readiness = rng.normal(0.0, 1.3, clients)
        self.mood = rng.normal(0.0, 1.0, clients)
        self.topic = self._taste(np.arange(clients))
        self.stage = np.zeros(clients)
        early = rng.random(clients) < 0.15
        self.time = start + np.where(early, self.pace * rng.random(clients), (end - start) * rng.random(clients))

    def tables(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Return per table the client [n] (position in this chunk), the second [n] and the value [n], in time order."""
        parts: dict[str, list[tuple[NDArray, NDArray, NDArray]]] = {name: [] for name in TABLES}
        for events in self._sessions():
            for name, rows in events.items():
                parts[name].append(rows)
        result = {}
        for name, sessions in parts.items():
            client, second, value = (np.concatenate([rows[i] for rows in sessions]).astype(np.int64) for i in range(3))
            kept = np.flatnonzero(second <= self.end)
            share = DUPLICATES.get(name, 0.0)
            kept = np.repeat(kept, 1 + (self.rng.random(len(kept)) < share / (1 - share)))
            kept = kept[np.argsort(second[kept], kind="stable")]
            result[name] = client[kept], second[kept], value[kept]
        return result

    def _sessions(self) -> Iterator[dict[str, tuple[NDArray, NDArray, NDArray]]]:
        who = np.flatnonzero(self.time < self.end)
        while len(who):
            yield self._session(who)
            who = who[self.time[who] < self.end]

    def _session(self, who: NDArray[np.int64]) -> dict[str, tuple[NDArray, NDArray, NDArray]]:
        rng, catalogue = self.rng, self.catalogue
        mood, stage, topic, begin = self.mood[who], self.stage[who], self.topic[who], self.time[who]
        effort = self.size[who] * np.exp(0.12 * mood + 0.1 * stage)
        visits = 1 + rng.poisson(effort * rng.gamma(0.8, 1.25, len(who)))
        searches = rng.poisson(0.065 * visits**0.8 * np.exp(0.12 * stage))
        # Carts come with ripe missions; a buyer's session holds at least one cart addition.
        wish = sigmoid(self.readiness[who] + 0.55 * stage + 0.25 * mood - 5.4)
        adds = rng.poisson(1.9 * wish * (1 + 0.35 * visits**0.7))
        buying = rng.random(len(who)) < (adds > 0) * sigmoid(0.5 * self.readiness[who] + 0.6 * stage + 0.5 * mood - 3.5)
        buys = np.where(buying, 1 + rng.poisson(0.25, len(who)), 0)
        removes = rng.binomial(adds, sigmoid(-0.4 - 0.9 * mood))
        service = (rng.random(len(who)) < 0.25 * sigmoid(-1.5 * mood - 0.8)) & (visits > 1)

        length = visits * rng.uniform(15, 90, len(who))
        focus = self._item(who, topic)
        of_visit, of_search, of_add = (np.repeat(np.arange(len(who)), n) for n in (visits, searches, adds))
        of_remove, of_buy = np.repeat(np.arange(len(who)), removes), np.repeat(np.arange(len(who)), buys)

        def moment(of: NDArray, low: float, high: float) -> NDArray[np.int64]:
            return (begin[of] + length[of] * rng.uniform(low, high, len(of))).astype(np.int64)

        url = catalogue.url_of_category(
            catalogue.category_of_topic(self._near(who[of_visit], topic[of_visit], 0.8), rng), rng
        )
        on_focus = rng.random(len(url)) < 0.35
        url[on_focus] = catalogue.url_of_category(catalogue.sku_category[focus[of_visit[on_focus]]], rng)
        generic = rng.random(len(url)) < 0.2
        url[generic] = catalogue.generic_url(np.zeros(generic.sum(), np.int64), rng)
        last_visit = np.cumsum(visits) - 1
        url[last_visit[service]] = catalogue.service_url(np.zeros(service.sum(), np.int64), rng)
        query = catalogue.query_of_category(
            catalogue.category_of_topic(self._near(who[of_search], topic[of_search], 0.85), rng), rng
        )

        events = {
            "page_visit": (who[of_visit], moment(of_visit, 0, 1), url),
            "search_query": (who[of_search], moment(of_search, 0, 0.6), query),
            "add_to_cart": (who[of_add], moment(of_add, 0.5, 0.9), self._cart(who, topic, focus, of_add)),
            "remove_from_cart": (who[of_remove], moment(of_remove, 0.9, 1.0), self._cart(who, topic, focus, of_remove)),
            "product_buy": (who[of_buy], moment(of_buy, 1.0, 1.1), self._cart(who, topic, focus, of_buy)),
        }
        self._advance(who, begin + length, buys > 0, removes, service)
        return events

    def _advance(self, who: NDArray, now: NDArray, bought: NDArray, removes: NDArray, service: NDArray) -> None:
        rng, catalogue = self.rng, self.catalogue
        topic, period = self.topic[who], catalogue.period[self.topic[who]]
        mood = 0.85 * self.mood[who] + 0.5 * rng.normal(size=len(who))
        mood += 0.35 * bought - 0.25 * np.minimum(removes, 2) - 0.3 * service
        durable, consumable = bought & (period == 0), bought & (period > 0)
        quiet = rng.random(len(who)) < sigmoid(
            1.5 - self.loyalty[who] - 0.8 * mood - 0.12 * self.stage[who] + 1.3 * durable - 1.6 * consumable
        )
        gap = self.pace[who] * np.exp(-0.45 * mood - 0.25 * self.stage[who]) * rng.gamma(0.7, 1 / 0.7, len(who))
        again = consumable & (rng.random(len(who)) < 0.7)
        gap = np.where(again, period * np.exp(0.12 * rng.normal(size=len(who))), gap)
        gap = np.where(quiet & ~again, gap + rng.exponential(80 * DAY, len(who)), gap)
        over = bought | quiet | (rng.random(len(who)) < 0.1)
        choice = rng.random(len(who))
        following = np.where(choice < 0.45, catalogue.successor[topic], self._taste(who))
        following = np.where(again, topic, following)
        self.topic[who] = np.where(over, following, topic)
        self.stage[who] = np.where(
            again, 3.0, np.where(over, 0.0, np.minimum(self.stage[who] + rng.exponential(0.9, len(who)), 5.0))
        )
        self.mood[who] = mood
        self.time[who] = now + np.maximum(gap, 1800.0)

    def _taste(self, who: NDArray) -> NDArray[np.int64]:
        which = np.searchsorted([0.55, 0.85], self.rng.random(len(who)))
        return self.taste[who, which]

    def _near(self, who: NDArray, topic: NDArray, share: float) -> NDArray[np.int64]:
        return np.where(self.rng.random(len(who)) < share, topic, self._taste(who))

    def _item(self, who: NDArray, topic: NDArray) -> NDArray[np.int64]:
        rng, catalogue = self.rng, self.catalogue
        drawn = [catalogue.sku_of_category(catalogue.category_of_topic(topic, rng), rng) for _ in range(3)]
        skus = np.stack(drawn, 1)
        late = (self.time[who] >= self.launch)[:, None]
        launched = catalogue.launch_of_category[catalogue.sku_category[skus]]
        wanted = (launched >= 0) & (rng.random(skus.shape) < 0.5)
        skus = np.where(late, np.where(wanted, launched, skus), catalogue.stand_in[skus])
        distance = np.abs(catalogue.sku_price[skus] - self.price[who, None])
        return skus[np.arange(len(who)), distance.argmin(1)]

    def _cart(self, who: NDArray, topic: NDArray, focus: NDArray, of: NDArray) -> NDArray[np.int64]:
        other = self._item(who[of], topic[of])
        return np.where(self.rng.random(len(of)) < 0.7, focus[of], other)
