"""The 67 feature columns of a generated chunk: the noisy traces the latents of ``population.py`` leave behind."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from synthlogs.ads.catalogue import ACTIONS, BOTTOMS, CATEGORIES, FORMATS, Catalogue
from synthlogs.ads.population import DAY, Population
from synthlogs.ads.schema import NULLS
from synthlogs.draws import quantile, sigmoid
from synthlogs.ragged import Ragged, texts
from synthlogs.text import uuids

# Share of map entries that repeat a key of their row, as counted in the published log.
REPEATED_KEYS = 0.0008


def feature_columns(
    catalogue: Catalogue, people: Population, hour: int, weekday: int, rng: np.random.Generator
) -> dict[str, pa.Array]:
    """Return every feature column of the chunk by name.

    Args:
        hour: hour of the day, 0 .. 23
        weekday: 0 = Monday
    """
    columns = _request(catalogue, people, hour, weekday, rng)
    columns |= _payments(catalogue, people, rng)
    columns |= _installed(catalogue, people, rng)
    columns |= _habits(catalogue, people, rng)
    columns |= _market(catalogue, people, rng)
    return columns | _actions(catalogue, people, rng)


def _request(
    catalogue: Catalogue, people: Population, hour: int, weekday: int, rng: np.random.Generator
) -> dict[str, pa.Array]:
    number, names = len(people), catalogue.names
    own = catalogue.advertiser_bundle[people.advertiser]
    bottom = catalogue.bundle.parent[own]
    subcategory = catalogue.bottom.parent[bottom]
    make = catalogue.model.parent[people.model]
    system = catalogue.make_system[make]
    seen = people.second - rng.exponential(60 * DAY, number).astype(np.int64) - 1
    active = sigmoid(0.7 * people.activity + 0.6 * rng.normal(size=number))

    def missing(name: str) -> NDArray:
        return rng.random(number) < NULLS[name]

    return {
        "row_id": uuids(number, rng),
        "advertiser_bundle": texts(own, names["bundle"]),
        "advertiser_category": texts(catalogue.subcategory.parent[subcategory], names["category"]),
        "advertiser_subcategory": texts(subcategory, names["subcategory"]),
        "advertiser_bottom_taxonomy_level": texts(bottom, names["bottom"]),
        "carrier": texts(catalogue.carrier.draw(people.country, rng), names["carrier"], missing("carrier")),
        "country": texts(people.country, names["country"]),
        "region": texts(catalogue.region.draw(people.country, rng), names["region"], missing("region")),
        "dev_make": texts(make, names["make"]),
        "dev_model": texts(people.model, names["model"]),
        "dev_os": texts(system, names["system"]),
        "dev_osv": texts(catalogue.version.draw(system, rng), names["version"], missing("dev_osv")),
        "hour": texts(np.full(number, hour), names["hour"]),
        "release_date": texts(catalogue.model_release[people.model], names["release"], missing("release_date")),
        "last_advertiser_action": texts(
            catalogue.popularity["advertiser_action"].draw(number, rng),
            names["advertiser_action"],
            missing("last_advertiser_action"),
        ),
        "weekday": pa.array(np.full(number, weekday, np.int32)),
        "release_msrp": pa.array(np.round(catalogue.model_price[people.model]), mask=missing("release_msrp")),
        "avg_act_days": pa.array(30 * active, mask=missing("avg_act_days")),
        "avg_days_ins": pa.array(rng.exponential(40, number), mask=missing("avg_days_ins")),
        "weekend_ratio": pa.array(rng.beta(2, 5, number), mask=missing("weekend_ratio")),
        "weeks_since_first_seen": pa.array(
            np.floor((people.second - seen) / (7 * DAY)), mask=missing("weeks_since_first_seen")
        ),
        "wifi_ratio": pa.array(
            sigmoid(0.5 + 0.6 * people.wealth + rng.normal(size=number)), mask=missing("wifi_ratio")
        ),
        "first_request_ts": pa.array(seen.astype(float), mask=missing("first_request_ts")),
    }


def _payments(catalogue: Catalogue, people: Population, rng: np.random.Generator) -> dict[str, pa.Array]:
    names, paid = catalogue.names, people.paid

    def known(column: str) -> NDArray:
        return people.paid_score > quantile(NULLS[column])

    levels = {
        "bundle": (people.paid_bundle, len(names["bundle"]), names["bundle"]),
        "category": (catalogue.bundle_category[people.paid_bundle], CATEGORIES, names["category"]),
        "category_bottom_taxonomy": (catalogue.bundle.parent[people.paid_bundle], BOTTOMS, names["bottom"]),
    }
    columns: dict[str, pa.Array] = {}
    for level, (code, size, keys) in levels.items():
        lists, key, entry = paid.group(code, size)
        count = np.bincount(entry, people.paid_count, len(key)).astype(np.int64)
        # Without entries bincount counts whole numbers.
        revenue = np.round(np.bincount(entry, people.paid_revenue, len(key)).astype(float), 2)
        kept, at = lists.restrict(known(f"num_buys_{level}"))
        columns[f"num_buys_{level}"] = kept.map(texts(key[at], keys), count[at])
        columns[f"iap_revenue_usd_{level}"] = kept.map(texts(key[at], keys), revenue[at])
        if level != "category_bottom_taxonomy":
            newest = np.zeros(len(key), np.int64)
            np.maximum.at(newest, entry, people.paid_time)
            kept, at = lists.restrict(known(f"last_buy_ts_{level}"))
            columns[f"last_buy_ts_{level}"] = kept.map(texts(key[at], keys), newest[at])
    last = np.zeros(len(people), np.int64)
    np.maximum.at(last, paid.row, people.paid_time)
    columns["last_buy"] = pa.array(last.astype(float), mask=~known("last_buy"))
    kept, at = paid.restrict(known("rev_by_adv"))
    columns["rev_by_adv"] = kept.map(texts(people.paid_bundle[at], names["bundle"]), people.paid_revenue[at])
    kept, at = paid.restrict(known("whale_users_bundle_num_buys_prank"))
    keys = texts(people.paid_bundle[at], names["bundle"])
    rank = sigmoid(1.2 * (people.spend[kept.row] - 1.5) + 0.5 * rng.normal(size=len(at)))
    columns["whale_users_bundle_num_buys_prank"] = kept.map(keys, np.round(rank, 4))
    columns["whale_users_bundle_revenue_prank"] = kept.map(keys, np.round(rank**1.5, 4))
    whales = rng.poisson(20 * rank + 1).astype(float)
    columns["whale_users_bundle_total_num_buys"] = kept.map(keys, whales)
    columns["whale_users_bundle_total_revenue"] = kept.map(keys, np.round(whales * rng.exponential(9, len(at)), 2))
    return columns


def _installed(catalogue: Catalogue, people: Population, rng: np.random.Generator) -> dict[str, pa.Array]:
    number, names = len(people), catalogue.names
    score = 0.5 * people.activity + np.sqrt(0.75) * rng.normal(size=number)

    def known(column: str) -> NDArray:
        return score > quantile(NULLS[column])

    present = known("bundles_ins")
    lists = Ragged(present, 1 + np.minimum(rng.poisson(2.5 * np.exp(0.3 * people.activity)), 20))
    drawn = catalogue.popularity["bundle"].draw(len(lists.row), rng)
    lists, bundle, _ = lists.group(drawn, len(names["bundle"]))
    repeated = np.flatnonzero((rng.random(len(bundle)) < REPEATED_KEYS) & (lists.position > 0))
    bundle[repeated] = bundle[repeated - 1]
    total = len(bundle)
    installed = people.second - 1 - rng.exponential(30 * DAY, total).astype(np.int64)
    requested = installed - rng.exponential(5 * DAY, total).astype(np.int64)
    sessions = np.round(np.exp(0.2 + 0.5 * people.activity[lists.row] + 0.5 * rng.normal(size=total)), 3)
    minutes = 3 + 0.3 * people.activity[lists.row] + 0.25 * people.spend[lists.row] + 0.5 * rng.normal(size=total)

    def of_bundles(column: str, values: NDArray) -> pa.Array:
        kept, at = lists.restrict(known(column))
        return kept.map(texts(bundle[at], names["bundle"]), values[at])

    columns = {
        "avg_daily_sessions": of_bundles("avg_daily_sessions", sessions),
        "avg_duration": of_bundles("avg_duration", np.round(np.exp(minutes), 2)),
        "first_request_ts_bundle": of_bundles("first_request_ts_bundle", requested),
        "last_install_ts_bundle": of_bundles("last_install_ts_bundle", installed),
        "bundles_ins": lists.list(texts(bundle, names["bundle"])),
        "user_bundles": lists.list(texts(bundle, names["bundle"])),
    }
    # An app that was not opened for four weeks leaves the shorter list; a null list stays null, a list may be empty.
    recent = people.second - installed < 28 * DAY
    lengths = np.bincount(lists.row, recent, number)
    columns["user_bundles_l28d"] = Ragged(present, lengths).list(texts(bundle[recent], names["bundle"]))
    kept, at = lists.restrict(known("new_bundles"))
    newest = (kept.position < 2) & known("new_bundles")[kept.row]
    lengths = np.bincount(kept.row, newest, number)
    columns["new_bundles"] = Ragged(kept.present, lengths).list(texts(bundle[at][newest], names["bundle"]))
    for suffix, code, size, keys in (
        ("", catalogue.bundle_category[bundle], CATEGORIES, names["category"]),
        ("_bottom_taxonomy", catalogue.bundle.parent[bundle], BOTTOMS, names["bottom"]),
    ):
        merged, key, entry = lists.group(code, size)
        count = np.bincount(entry, minlength=len(key))
        used = np.bincount(entry, sessions, len(key))
        kept, at = merged.restrict(known(f"bundles_cat{suffix}"))
        columns[f"bundles_cat{suffix}"] = kept.map(texts(key[at], keys), count[at])
        columns[f"bcat{suffix}"] = kept.map(texts(key[at], keys), rng.poisson(3 * used[at]) + 1)
        name = "last_install_ts_category" if not suffix else "first_request_ts_category_bottom_taxonomy"
        extreme = np.full(len(key), 0 if not suffix else people.second)
        (np.maximum if not suffix else np.minimum).at(extreme, entry, installed if not suffix else requested)
        kept, at = merged.restrict(known(name))
        columns[name] = kept.map(texts(key[at], keys), extreme[at])
    last = np.zeros(number, np.int64)
    np.maximum.at(last, lists.row, installed)
    columns["last_ins"] = pa.array(last.astype(float), mask=~known("last_ins"))
    return columns


def _habits(catalogue: Catalogue, people: Population, rng: np.random.Generator) -> dict[str, pa.Array]:
    number, names = len(people), catalogue.names
    columns: dict[str, pa.Array] = {}
    present = rng.random(number) >= NULLS["city_hist"]
    requests = 1 + rng.poisson(np.exp(1.0 + 0.5 * people.activity))
    places = {
        "city_hist": (catalogue.popularity["city"], None, "city", 3),
        "country_hist": (None, people.country, "country", 2),
        "region_hist": (None, catalogue.region.draw(people.country, rng), "region", 3),
        "dev_language_hist": (catalogue.popularity["language"], None, "language", 2),
        "dev_osv_hist": (
            None,
            catalogue.version.draw(catalogue.make_system[_make(catalogue, people)], rng),
            "version",
            2,
        ),
    }
    for column, (popularity, home, key, longest) in places.items():
        lists = Ragged(present, 1 + np.minimum(rng.poisson(0.35, number), longest - 1))
        first = popularity.draw(number, rng) if popularity else home
        assert first is not None
        code = (first[lists.row] + 7 * lists.position) % len(names[key])
        count = 1 + (requests[lists.row] // (1 + 2 * lists.position))
        columns[column] = lists.map(texts(code, names[key]), count)
    lists = Ragged(rng.random(number) >= NULLS["hour_ratio"], rng.integers(2, 6, number))
    start = rng.integers(0, 24, number)
    weight = rng.exponential(size=len(lists.row)) + 0.05
    share = weight / np.bincount(lists.row, weight, number)[lists.row]
    code = (start[lists.row] + 3 * lists.position) % 24
    return columns | {"hour_ratio": lists.map(texts(code, names["hour"]), np.round(share, 4))}


def _market(catalogue: Catalogue, people: Population, rng: np.random.Generator) -> dict[str, pa.Array]:
    """What the ad market knows: it pays more for those who spend, and the active ones click."""
    number, keys = len(people), catalogue.names["format"]
    start = rng.integers(0, len(FORMATS), number)
    drawn = Ragged(np.ones(number, bool), rng.integers(1, len(FORMATS) + 1, number))
    code = (start[drawn.row] + drawn.position) % len(FORMATS)
    total = len(code)
    price = 0.5 + 0.5 * people.spend + 0.3 * people.wealth + 0.35 * rng.normal(size=number)
    click = 0.5 * people.activity + 0.6 * rng.normal(size=number)
    cpm = price[drawn.row] + 0.3 * rng.normal(size=total) + 0.4 * code
    ctr = click[drawn.row] + 0.3 * rng.normal(size=total)
    values = {
        "cpm": np.round(np.exp(cpm), 4),
        "cpm_pct_rk": np.round(sigmoid(1.4 * (cpm - 0.9)), 4),
        "ctr": np.round(0.02 * np.exp(ctr), 5),
        "ctr_pct_rk": np.round(sigmoid(2 * ctr), 4),
        "rwd_prank": np.round(sigmoid(people.activity[drawn.row] + rng.normal(size=total)), 4),
    }
    columns: dict[str, pa.Array] = {}
    asked = rng.random(number)
    for column, value in values.items():
        kept, at = drawn.restrict(asked >= NULLS[column])
        columns[column] = kept.map(texts(code[at], keys), value[at])
    return columns


def _actions(catalogue: Catalogue, people: Population, rng: np.random.Generator) -> dict[str, pa.Array]:
    number, names = len(people), catalogue.names
    score = 0.4 * people.activity + np.sqrt(0.84) * rng.normal(size=number)
    outer = Ragged(score > quantile(NULLS["user_actions_bundles_action_count"]), rng.integers(1, 4, number))
    bundle = texts(catalogue.popularity["bundle"].draw(len(outer.row), rng), names["bundle"])
    inner = Ragged(np.ones(len(outer.row), bool), rng.integers(1, 4, len(outer.row)))
    who = outer.row[inner.row]
    start = catalogue.popularity["action"].draw(len(outer.row), rng)
    action = texts((start[inner.row] + 5 * inner.position) % ACTIONS, names["action"])
    count = 1 + rng.poisson(np.exp(0.3 + 0.4 * people.spend[who] + 0.3 * people.activity[who]))
    time = people.second - 1 - rng.exponential(10 * DAY, len(who)).astype(np.int64)
    lists = Ragged(rng.random(number) >= NULLS["advertiser_actions_action_count"], rng.integers(1, 4, number))
    code = (people.advertiser[lists.row] + 3 * lists.position) % len(names["advertiser_action"])
    events = texts(code, names["advertiser_action"])
    done = 1 + rng.poisson(np.exp(0.5 * people.spend[lists.row]))
    when = people.second - 1 - rng.exponential(10 * DAY, len(code)).astype(np.int64)

    def structs(values: NDArray) -> pa.Array:
        return lists.list(pa.StructArray.from_arrays([events, pa.array(values)], ["action", "value"]))

    return {
        "user_actions_bundles_action_count": outer.map(bundle, inner.map(action, count)),
        "user_actions_bundles_action_last_timestamp": outer.map(bundle, inner.map(action, time)),
        "advertiser_actions_action_count": structs(done),
        "advertiser_actions_action_last_timestamp": structs(when),
    }


def _make(catalogue: Catalogue, people: Population) -> NDArray:
    return catalogue.model.parent[people.model]
