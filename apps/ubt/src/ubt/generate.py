"""Write a log in the RecSys Challenge 2025 layout, at any scale, with signal planted in it.

The statistics follow the published ones of the challenge data: 9.4 events a client on average with median 2 and a
log-normal tail, 88.8 % page visits, 5.8 % searches, 3.2 % cart additions, 1.1 % cart removals, 1.0 % purchases, the
share of duplicate rows of each table, Zipf popularity of skus, categories and URLs, price buckets that are quantiles,
and 16 integers 0..255 per name and per query, written as numpy prints them.

A client is simulated session by session; what can be learned from the past is planted in five places, so that no
kind of model is favoured by construction:

- **activity** (counts and recency see it): every client has a pace, a session size, a loyalty and a readiness to buy;
- **taste** (co-occurrence and aggregates see it): a client draws three topics from one of a few personas and keeps a
  price level, to which the nearest of three items is chosen; items, URLs, names and queries all belong to topics;
- **order** (only the sequence shows it): visits serve missions. A mission stays on one topic for several sessions and
  ripens from browsing over carts to a purchase; after it, the next topic often is the fixed successor of the last
  one, or, for consumable topics, the same topic again after that topic's own period;
- **launches** (taste shows them, nothing else can): some skus of well-sold categories cannot be had before train_start;
  from then on they are half of what is looked for in their category, by whoever looks there at that price. They are
  the targets of propensity_new_sku;
- **mood** (recent patterns show it): a slowly drifting satisfaction moves return gaps, cart removals, visits to
  service pages and the hazard of going quiet; buying something durable raises that hazard, something consumable
  lowers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ubt.config import GenerateConfig
from ubt.progress import progress
from ubt.rundir import temporary_directory, write_json

DAY = 86400
WIDTH = 16
TOPICS, PERSONAS = 32, 12
CHUNK_CLIENTS = 100_000
# Published share of rows that repeat an earlier row.
DUPLICATES = {"product_buy": 0.1597, "search_query": 0.0564, "remove_from_cart": 0.0538, "add_to_cart": 0.0189}
TABLES = ("product_buy", "add_to_cart", "remove_from_cart", "page_visit", "search_query")
# Lies in every folder that was generated and says how.
MARK = "generated.json"


def generate(data_dir: str | Path, config: GenerateConfig) -> Path:
    """Write the five event tables, the item table and the challenge's ``.npy`` files below `data_dir`.

    Clients are simulated in chunks that are streamed to disk, so memory grows with the catalogue and one chunk only.
    The same config gives the same bytes. The directory appears in one step, when it is complete.

    Raises:
        ValueError: if the config leaves no client, no history or no catalogue.
    """
    config.check()
    final = Path(data_dir)
    if final.exists() and not (final / MARK).exists() and any(final.iterdir()):
        raise ValueError(f"data_dir: {final} holds something that `ubt generate` did not write; it is left alone")
    rng = np.random.default_rng([config.log_seed, 0])
    catalogue = Catalogue.draw(config, rng)
    client_ids = rng.permutation(config.clients).astype(np.int64) * 7 + 3
    end = int(datetime.fromisoformat(config.end + "+00:00").timestamp())
    start = end - config.days * DAY
    history_end = (end - 27 * DAY) // DAY * DAY
    events_before = np.zeros(config.clients, np.int64)
    buys_before = np.zeros(config.clients, np.int64)
    category_sales = np.zeros(len(catalogue.category_id), np.int64)
    sku_sales = np.zeros(len(catalogue.sku_id), np.int64)
    train_sales = np.zeros(len(catalogue.sku_id), np.int64)
    with temporary_directory(final) as folder:
        writers = {name: pq.ParquetWriter(folder / f"{name}.parquet", _schema(name)) for name in TABLES}
        with progress(config.clients, "generate", unit="client") as bar:
            for number, first in enumerate(range(0, config.clients, CHUNK_CLIENTS)):
                clients = min(CHUNK_CLIENTS, config.clients - first)
                simulation = Simulation(
                    catalogue, clients, start, end, history_end, np.random.default_rng([config.log_seed, 1, number])
                )
                for name, (client, second, value) in simulation.tables().items():
                    past = second < history_end
                    here = slice(first, first + clients)
                    events_before[here] += np.bincount(client[past], minlength=clients)
                    if name == "product_buy":
                        buys_before[here] += np.bincount(client[past], minlength=clients)
                        sku_sales += np.bincount(value[past], minlength=len(sku_sales))
                        train = ~past & (second < history_end + 14 * DAY)
                        train_sales += np.bincount(value[train], minlength=len(sku_sales))
                    ids = client_ids[client + first]
                    writers[name].write_table(_event_table(name, ids, second, value, catalogue))
                bar.update(clients)
        for writer in writers.values():
            writer.close()
        np.add.at(category_sales, catalogue.sku_category, sku_sales)
        pq.write_table(_item_table(catalogue), folder / "product_properties.parquet")
        relevant = _relevant(events_before, buys_before, config, rng)
        (folder / "input").mkdir()
        (folder / "target").mkdir()
        np.save(folder / "input" / "relevant_clients.npy", client_ids[relevant])
        np.save(folder / "target" / "active_clients.npy", client_ids[relevant[buys_before[relevant] > 0]])
        price_sales = np.bincount(catalogue.sku_price, sku_sales, minlength=100)
        target = folder / "target"
        _save_popular(target, "category", catalogue.category_id, category_sales, config.target_categories)
        _save_popular(target, "sku", catalogue.sku_id, sku_sales, config.target_skus)
        _save_popular(target, "price", np.arange(100), price_sales, 100)
        # Nobody bought these before train_start: their popularity is that of the train window.
        launched = catalogue.launched
        _save_popular(target, "new_sku", catalogue.sku_id[launched], train_sales[launched], len(launched))
        write_json(folder / MARK, settings_of(config))
    return final


def settings_of(config: GenerateConfig) -> dict[str, object]:
    """Return the settings that determine a generated log."""
    return {name: value for name, value in asdict(config).items() if name != "if_missing"}


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
    def draw(cls, config: GenerateConfig, rng: np.random.Generator) -> Catalogue:
        """Draw a catalogue whose size grows with the number of clients as in the challenge data."""
        categories = max(TOPICS * 2, int(1.57 * config.clients**0.5))
        skus = max(categories * 4, int(0.0674 * config.clients))
        urls = max(categories * 6, int(0.677 * config.clients))
        queries = categories * 12
        topic = np.sort(np.r_[np.arange(TOPICS), rng.integers(0, TOPICS, categories - TOPICS)])
        popularity = rng.permutation(_zipf(categories, 0.8))
        sku_category = _children(categories, skus, popularity, rng)
        url_category = _children(categories, urls - 40, popularity, rng)
        query_category = _children(categories, queries, popularity, rng)
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
            sku_of_category=Choice.within(sku_category, categories, _zipf_within(sku_category, 1.3)),
            launch_of_category=launch_of_category,
            stand_in=stand_in,
            url_of_category=Choice.within(url_category, categories, _zipf_within(url_category, 1.0)),
            query_of_category=Choice.within(query_category, categories, _zipf_within(query_category, 1.0)),
            generic_url=Choice.within(np.zeros(32, np.int64), 1, _zipf(32, 1.0), base=urls - 40),
            service_url=Choice.within(np.zeros(8, np.int64), 1, _zipf(8, 1.0), base=urls - 8),
        )

    @property
    def launched(self) -> NDArray[np.int64]:
        """Skus that cannot be had before train_start."""
        return self.launch_of_category[self.launch_of_category >= 0]


@dataclass
class Choice:
    """Weighted choice of a child given its parent, for many parents at once, by one search in a cumulative sum."""

    cumulative: NDArray[np.float64]
    first: NDArray[np.float64]
    mass: NDArray[np.float64]
    base: int

    @classmethod
    def within(cls, parent: NDArray[np.int64], parents: int, weight: NDArray[np.float64], base: int = 0) -> Choice:
        mass = np.bincount(parent, weight, minlength=parents).astype(np.float64)
        first = np.r_[0.0, np.cumsum(mass)[:-1]]
        return cls(np.cumsum(weight), first, mass, base)

    def __call__(self, parent: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        point = self.first[parent] + rng.random(len(parent)) * self.mass[parent]
        found = np.searchsorted(self.cumulative, point, side="right")
        return np.minimum(found, len(self.cumulative) - 1) + self.base


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
        wish = _sigmoid(self.readiness[who] + 0.55 * stage + 0.25 * mood - 5.4)
        adds = rng.poisson(1.9 * wish * (1 + 0.35 * visits**0.7))
        buying = rng.random(len(who)) < (adds > 0) * _sigmoid(
            0.5 * self.readiness[who] + 0.6 * stage + 0.5 * mood - 3.5
        )
        buys = np.where(buying, 1 + rng.poisson(0.25, len(who)), 0)
        removes = rng.binomial(adds, _sigmoid(-0.4 - 0.9 * mood))
        service = (rng.random(len(who)) < 0.25 * _sigmoid(-1.5 * mood - 0.8)) & (visits > 1)

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
        quiet = rng.random(len(who)) < _sigmoid(
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


def vector_text(vectors: NDArray[np.uint8]) -> pa.Array:
    """Return each row [n, width] as numpy would print it, e.g. ``[109  77  31]``, as an Arrow string array [n]."""
    if not len(vectors):
        return pa.array([], pa.string())
    digits = 1 + (vectors.max(1) >= 10).astype(np.int64) + (vectors.max(1) >= 100)
    if (digits == 3).all():
        return _fixed_width_text(vectors, 3)
    order, pieces = [], []
    for width in np.unique(digits):
        order.append(np.flatnonzero(digits == width))
        pieces.append(_fixed_width_text(vectors[order[-1]], int(width)))
    return pa.concat_arrays(pieces).take(pa.array(np.argsort(np.concatenate(order))))


def time_text(seconds: NDArray[np.int64]) -> pa.Array:
    """Return seconds since 1970 [n] as ``YYYY-MM-DD HH:MM:SS`` in an Arrow string array [n]."""
    text = seconds.astype("datetime64[s]").astype("S19")
    letters = np.frombuffer(text.tobytes(), np.uint8).reshape(-1, 19).copy()
    letters[:, 10] = ord(" ")
    return _strings(letters)


def _fixed_width_text(vectors: NDArray[np.uint8], digits: int) -> pa.Array:
    table = np.array([f"{value:{digits}d} " for value in range(256)], f"S{digits + 1}")
    table = np.frombuffer(table.tobytes(), np.uint8).reshape(256, digits + 1)
    letters = np.empty((len(vectors), 1 + vectors.shape[1] * (digits + 1)), np.uint8)
    letters[:, 0] = ord("[")
    letters[:, 1:] = table[vectors].reshape(len(vectors), -1)
    letters[:, -1] = ord("]")
    return _strings(letters)


def _strings(letters: NDArray[np.uint8]) -> pa.Array:
    offsets = np.arange(len(letters) + 1, dtype=np.int32) * letters.shape[1]
    return pa.StringArray.from_buffers(len(letters), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(letters)))


def _schema(name: str) -> pa.Schema:
    value = {"page_visit": ("url", pa.int64()), "search_query": ("query", pa.string())}.get(name, ("sku", pa.int64()))
    return pa.schema([("client_id", pa.int64()), ("timestamp", pa.string()), value])


def _event_table(name: str, client: NDArray, second: NDArray, value: NDArray, catalogue: Catalogue) -> pa.Table:
    if name == "search_query":
        column = vector_text(catalogue.query[value])
    else:
        column = pa.array(catalogue.url_id[value] if name == "page_visit" else catalogue.sku_id[value])
    return pa.table([pa.array(client), time_text(second), column], schema=_schema(name))


def _item_table(catalogue: Catalogue) -> pa.Table:
    columns = {
        "sku": catalogue.sku_id,
        "category": catalogue.category_id[catalogue.sku_category],
        "price": catalogue.sku_price,
        "name": vector_text(catalogue.sku_name),
    }
    return pa.table(columns)


def _relevant(events: NDArray, buys: NDArray, config: GenerateConfig, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw clients seen in the history, half of them buyers, the busier the likelier; in random order."""
    wanted = max(1, round(config.clients * config.relevant_share))
    buyers, others = np.flatnonzero(buys > 0), np.flatnonzero((buys == 0) & (events > 0))
    first = min(len(buyers), max(round(wanted * 0.51), wanted - len(others)))
    chosen = []
    for group, number, power in ((buyers, first, 0.0), (others, min(wanted - first, len(others)), 0.8)):
        # Weighted sampling without replacement: the smallest exponential clocks win.
        clock = rng.exponential(size=len(group)) / np.maximum(events[group], 1) ** power
        chosen.append(group[np.argsort(clock)[:number]])
    return rng.permutation(np.concatenate(chosen))


def _save_popular(folder: Path, what: str, ids: NDArray, sales: NDArray, number: int) -> None:
    top = np.argsort(-sales, kind="stable")[: min(number, len(ids))]
    np.save(folder / f"propensity_{what}.npy", ids[top])
    np.save(folder / f"popularity_propensity_{what}.npy", (sales[top] / max(sales.sum(), 1)).astype(np.float64))


def _children(parents: int, number: int, popularity: NDArray, rng: np.random.Generator) -> NDArray[np.int64]:
    more = rng.choice(parents, number - parents, p=popularity / popularity.sum())
    return np.sort(np.r_[np.arange(parents), more])


def _zipf(number: int, power: float) -> NDArray[np.float64]:
    weight = 1.0 / np.arange(1, number + 1) ** power
    return weight / weight.sum()


def _zipf_within(parent: NDArray[np.int64], power: float) -> NDArray[np.float64]:
    starts = np.r_[0, np.flatnonzero(np.diff(parent)) + 1]
    rank = np.arange(len(parent)) - np.repeat(starts, np.diff(np.r_[starts, len(parent)]))
    return 1.0 / (rank + 1.0) ** power


def _quantise(vectors: NDArray[np.float64]) -> NDArray[np.uint8]:
    scaled = (vectors - vectors.mean(0)) / vectors.std(0)
    return np.clip(np.round(127.5 + 50 * scaled), 0, 255).astype(np.uint8)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-x))
