"""Write the generated grocer's log, week by week and block of shoppers by block of shoppers."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from synthlogs.baskets.range import Range
from synthlogs.baskets.trips import FORMATS, LEVELS, MISSIONS, REGIONS, TYPES, Grocer, Shoppers, Stores, Week, dominant
from synthlogs.folder import progress, whole_folder, write_mark
from synthlogs.ragged import texts
from synthlogs.settings import BasketsConfig

BLOCK_SHOPPERS = 20_000
FILES = ("transactions.parquet", "time.csv", "truth.parquet", "truth/*.parquet")
# Week 200607; a fiscal year has 52 weeks, and 200601 began on 27 February.
MONDAY, FIRST_WEEK = date(2006, 4, 10), 6
FIRST_BASKET = 994_100_100_000_000
SEGMENTS = (("AZ", "CT", "BG"), ("BU", "DI", "AT", "CZ", "FN", "EQ"))
FOCUS_NAMES = ("Fresh", "Grocery", "Nonfood", "Mixed")


def generate(folder: str | Path, config: BasketsConfig, *, bar: bool = True) -> dict[str, float]:
    """Write ``transactions.parquet``, ``time.csv``, ``truth.parquet`` and ``truth/``.

    The same config gives the same bytes. The folder appears in one step, when it is complete; memory holds the range
    with its weekly prices, the shoppers and one week.

    Args:
        bar: show a progress bar where stderr is a terminal

    Returns:
        Rows, baskets, units and spend.

    Raises:
        ValueError: if a size or share of the config cannot be.
        FileExistsError: if `folder` holds something that this function did not write.
    """
    config.check()
    totals: dict[str, float] = dict.fromkeys(("rows", "baskets", "units", "spend"), 0)
    with whole_folder(folder, FILES) as new, progress(config.weeks, "generate", "week", bar) as shown:
        rng = np.random.default_rng([config.seed, 0])
        sold, stores = Range.draw(config, rng), Stores.draw(config.stores, rng)
        shoppers = Shoppers.draw(config, stores, rng)
        shop = Grocer(sold, stores, shoppers, config, rng)
        (new / "truth").mkdir()
        _write_truth(new, shop, config)
        with (
            pq.ParquetWriter(new / "transactions.parquet", _schema(), store_schema=False) as rows,
            pq.ParquetWriter(new / "truth" / "baskets.parquet", _basket_schema(), store_schema=False) as missions,
        ):
            for week in range(config.weeks):
                table, baskets = _week(shop, config, week, int(totals["baskets"]))
                rows.write_table(table)
                missions.write_table(baskets)
                totals["rows"] += len(table)
                totals["baskets"] += len(baskets)
                totals["units"] += int(table["QUANTITY"].to_numpy().sum())
                totals["spend"] = round(totals["spend"] + float(table["SPEND"].to_numpy().sum()), 2)
                shown.update()
        lines = [f"{fiscal(week)},{_day(week, 0):%Y%m%d},{_day(week, 6):%Y%m%d}" for week in range(config.weeks)]
        (new / "time.csv").write_text("\n".join(["shop_week,date_from,date_to", *lines]) + "\n")
        write_mark(new, {"log": "baskets", "config": asdict(config), "result": totals})
    return totals


def fiscal(week: int) -> int:
    """Return the fiscal label YYYYWW of a week, counted from 200607 = 0."""
    year, number = divmod(FIRST_WEEK + week, 52)
    return (2006 + year) * 100 + number + 1


def _day(week: int, day: int) -> date:
    return MONDAY + timedelta(days=7 * week + day)


def _week(shop: Grocer, config: BasketsConfig, week: int, baskets: int) -> tuple[pa.Table, pa.Table]:
    """The week's rows and its baskets, both in time order; baskets are numbered on from `baskets`."""
    parts = []
    for number, first in enumerate(range(0, len(shop.shoppers.rate), BLOCK_SHOPPERS)):
        last = min(first + BLOCK_SHOPPERS, len(shop.shoppers.rate))
        parts.append(shop.week(week, first, last, np.random.default_rng([config.seed, 1, week, number])))
    trips = np.cumsum([0, *(len(part.shopper) for part in parts)])
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Week.__dataclass_fields__}
    joined["trip"] = np.concatenate([part.trip + start for part, start in zip(parts, trips[:-1], strict=True)])
    # A trip on which nothing was taken leaves no basket; the others are numbered in time order.
    order = np.lexsort((joined["hour"], joined["day"]))
    order = order[np.isin(order, joined["trip"])]
    place = np.full(trips[-1], -1)
    place[order] = np.arange(len(order))
    basket = place[joined["trip"]]
    rows = np.lexsort((joined["product"], basket))
    taken = {name: joined[name][rows] for name in ("product", "quantity", "spend")}
    trip = {name: joined[name][order] for name in ("shopper", "mission", "day", "hour", "store")}
    identity = FIRST_BASKET + baskets + np.arange(len(order))
    truth = pa.table([pa.array(identity), texts(trip["mission"], _mission_names()).cast(pa.string())], _basket_schema())
    return _table(shop, config, week, basket[rows], taken, trip, identity), truth


def _table(
    shop: Grocer,
    config: BasketsConfig,
    week: int,
    basket: NDArray,
    taken: dict[str, NDArray],
    trip: dict[str, NDArray],
    identity: NDArray,
) -> pa.Table:
    sold, product = shop.sold, taken["product"]
    dates = np.array([int(f"{_day(week, day):%Y%m%d}") for day in range(7)])
    shopper, store = trip["shopper"], trip["store"]
    anonymous = (shopper >= config.customers)[basket]
    kinds = _kinds(shop, basket, taken, len(identity))
    columns: dict[str, pa.Array] = {
        "SHOP_WEEK": pa.array(np.full(len(product), fiscal(week))),
        "SHOP_DATE": pa.array(dates[trip["day"]][basket]),
        # Sunday is 1.
        "SHOP_WEEKDAY": pa.array((trip["day"] + 1)[basket] % 7 + 1),
        "SHOP_HOUR": pa.array(trip["hour"][basket]),
        "QUANTITY": pa.array(taken["quantity"]),
        "SPEND": pa.array(taken["spend"]),
        **{name: _grouped(sold, name, product) for name in sold.codes},
        "CUST_CODE": texts(shopper[basket] % config.customers, _customer_codes(config.customers), anonymous),
        "seg_1": texts(shop.shoppers.level[shopper][basket], pa.array(SEGMENTS[0]), anonymous),
        # Of one customer in eight the second segment is not known.
        "seg_2": texts(
            shop.shoppers.stage[shopper][basket], pa.array(SEGMENTS[1]), anonymous | (shopper[basket] % 8 == 0)
        ),
        "BASKET_ID": pa.array(identity[basket]),
        "BASKET_SIZE": texts(kinds["size"][basket], pa.array("SML")),
        "BASKET_PRICE_SENSITIVITY": texts(kinds["level"][basket], pa.array(LEVELS)),
        "BASKET_TYPE": texts(np.array([one.type for one in MISSIONS])[trip["mission"]][basket], pa.array(TYPES)),
        "BASKET_DOMINANT_MISSION": texts(kinds["focus"][basket], pa.array(FOCUS_NAMES)),
        "STORE_CODE": texts(store[basket], _numbered("STORE", config.stores, 5)),
        "STORE_FORMAT": texts(shop.stores.format[store][basket], pa.array(FORMATS)),
        "STORE_REGION": texts(shop.stores.region[store][basket], pa.array(REGIONS)),
    }
    return pa.table([columns[field.name].cast(field.type) for field in _schema()], _schema())


def _kinds(shop: Grocer, basket: NDArray, taken: dict[str, NDArray], number: int) -> dict[str, NDArray[np.int64]]:
    """Size, focus and price level of each basket, from what lies in it."""
    items = np.bincount(basket, minlength=number)
    focus = shop.sold.focus[shop.sold.category[taken["product"]]]
    spent = [np.bincount(basket, taken["spend"] * (focus == kind), number) for kind in range(3)]
    dear = np.bincount(basket, shop.sold.relative_price[taken["product"]], number) / items
    return {
        "size": np.searchsorted([3, 6], items, side="right"),
        "focus": dominant(*spent),
        "level": np.searchsorted([-0.3, 0.3], dear, side="right"),
    }


def _grouped(sold: Range, name: str, product: NDArray) -> pa.Array:
    names = sold.codes[name].dictionary_encode()
    return texts(names.indices.to_numpy()[product], names.dictionary)


def _write_truth(folder: Path, shop: Grocer, config: BasketsConfig) -> None:
    sold, code = shop.sold, shop.sold.codes["PROD_CODE"]
    products = {
        **sold.codes,
        "base_price": sold.base[:, 0],
        "elasticity": sold.own,
        "substitute": texts(sold.substitute, code, sold.substitute < 0),
        "substitute_elasticity": pa.array(sold.substitute_cross, mask=sold.substitute < 0),
        "complement": texts(sold.complement, code, sold.complement < 0),
        "complement_elasticity": pa.array(sold.complement_cross, mask=sold.complement < 0),
        "weighed": sold.weighed,
        "share_of_category": sold.share,
        "relative_price": sold.relative_price,
    }
    _save(products, folder / "truth.parquet")
    which, week = np.divmod(np.arange(sold.price.size), config.weeks)
    base, price = sold.base.ravel(), sold.price.ravel()
    prices = {
        "PROD_CODE": texts(which, code),
        "SHOP_WEEK": np.array([fiscal(week) for week in range(config.weeks)], np.int32)[week],
        "base_price": base,
        "price": price,
        "promo": price < base,
        "depth": 1 - price / base,
    }
    _save(prices, folder / "truth" / "prices.parquet")
    category = sold.codes["PROD_CODE_10"].unique()
    mission, number = np.divmod(np.arange(shop.wanted.size), len(category))
    missions = {
        "mission": texts(mission, _mission_names()),
        "type": texts(np.array([one.type for one in MISSIONS])[mission], pa.array(TYPES)),
        "PROD_CODE_10": texts(number, category),
        "weight": shop.wanted.ravel(),
    }
    _save(missions, folder / "truth" / "missions.parquet")
    _write_people(folder / "truth", shop, config)


def _write_people(folder: Path, shop: Grocer, config: BasketsConfig) -> None:
    known, names = slice(0, config.customers), _numbered("STORE", config.stores, 5)
    shoppers, mix = shop.shoppers, shop.shoppers.missions[: config.customers]
    mix = mix / mix.sum(1, keepdims=True)
    customers = {
        "CUST_CODE": _customer_codes(config.customers),
        "trips_per_week": shoppers.rate[known],
        "size": shoppers.size[known],
        "price_sensitivity": texts(shoppers.level[known], pa.array(LEVELS)),
        "store": texts(shoppers.store[known], names),
        "second_store": texts(shoppers.second_store[known], names),
        **{one.name: mix[:, number] for number, one in enumerate(MISSIONS)},
    }
    _save(customers, folder / "customers.parquet")
    stores = {
        "STORE_CODE": names,
        "STORE_FORMAT": texts(shop.stores.format, pa.array(FORMATS)),
        "STORE_REGION": texts(shop.stores.region, pa.array(REGIONS)),
    }
    _save(stores, folder / "stores.parquet")


def _save(columns: dict, path: Path) -> None:
    pq.write_table(pa.table(columns), path, store_schema=False)


def _mission_names() -> pa.Array:
    return pa.array([mission.name for mission in MISSIONS])


def _customer_codes(number: int) -> pa.Array:
    return _numbered("CUST", number, 10)


def _numbered(prefix: str, number: int, digits: int) -> pa.Array:
    return pa.array([f"{prefix}{i + 1:0{digits}d}" for i in range(number)])


def _basket_schema() -> pa.Schema:
    return pa.schema({"BASKET_ID": pa.int64(), "mission": pa.string()})


def _schema() -> pa.Schema:
    """The 22 columns as published, in their order."""
    numbers = {"SHOP_WEEK": pa.int32(), "SHOP_DATE": pa.int32(), "SHOP_WEEKDAY": pa.int8(), "SHOP_HOUR": pa.int8()}
    codes = ("PROD_CODE", *(f"PROD_CODE_{level}" for level in (10, 20, 30, 40)), "CUST_CODE", "seg_1", "seg_2")
    basket = ("BASKET_SIZE", "BASKET_PRICE_SENSITIVITY", "BASKET_TYPE", "BASKET_DOMINANT_MISSION")
    store = ("STORE_CODE", "STORE_FORMAT", "STORE_REGION")
    return pa.schema(
        {
            **numbers,
            "QUANTITY": pa.int32(),
            "SPEND": pa.float64(),
            **dict.fromkeys(codes, pa.string()),
            "BASKET_ID": pa.int64(),
            **dict.fromkeys((*basket, *store), pa.string()),
        }
    )
