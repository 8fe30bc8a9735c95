"""The generated baskets have the published layout, and the planted elasticities, relations and missions are in them."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from synthlogs.baskets import BasketsConfig, generate
from synthlogs.baskets.generate import fiscal

SMALL = BasketsConfig(customers=900, products=200, weeks=45, stores=15, promo=0.15, seed=2)
COLUMNS = [
    "SHOP_WEEK",
    "SHOP_DATE",
    "SHOP_WEEKDAY",
    "SHOP_HOUR",
    "QUANTITY",
    "SPEND",
    "PROD_CODE",
    "PROD_CODE_10",
    "PROD_CODE_20",
    "PROD_CODE_30",
    "PROD_CODE_40",
    "CUST_CODE",
    "seg_1",
    "seg_2",
    "BASKET_ID",
    "BASKET_SIZE",
    "BASKET_PRICE_SENSITIVITY",
    "BASKET_TYPE",
    "BASKET_DOMINANT_MISSION",
    "STORE_CODE",
    "STORE_FORMAT",
    "STORE_REGION",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baskets") / "log"
    generate(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def log(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "transactions.parquet")


@pytest.fixture(scope="module")
def truth(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "truth.parquet").set_index("PROD_CODE")


@pytest.fixture(scope="module")
def weekly(folder: Path, log: pd.DataFrame) -> pd.DataFrame:
    """Price, base price and units of every product and week."""
    prices = pd.read_parquet(folder / "truth" / "prices.parquet").set_index(["PROD_CODE", "SHOP_WEEK"])
    units = log.groupby(["PROD_CODE", "SHOP_WEEK"])["QUANTITY"].sum()
    return prices.assign(units=units.reindex(prices.index).fillna(0.0))


def test_the_columns_are_those_published(folder, log):
    schema = pq.read_schema(folder / "transactions.parquet")
    assert schema.names == COLUMNS
    kinds = {"SHOP_WEEKDAY": "int8", "SHOP_HOUR": "int8", "SPEND": "double", "BASKET_ID": "int64"}
    kinds |= dict.fromkeys(("SHOP_WEEK", "SHOP_DATE", "QUANTITY"), "int32")
    assert {name: str(schema.field(name).type) for name in COLUMNS} == {n: kinds.get(n, "string") for n in COLUMNS}
    for column, pattern in {
        "PROD_CODE": r"PRD09\d{5}",
        "PROD_CODE_10": r"CL\d{5}",
        "PROD_CODE_20": r"DEP\d{5}",
        "PROD_CODE_30": r"G\d{5}",
        "PROD_CODE_40": r"D0000[1-9]",
        "STORE_CODE": r"STORE\d{5}",
        "STORE_FORMAT": "LS|MS|SS|XLS",
        "STORE_REGION": "[ENSW]0[123]",
        "BASKET_SIZE": "S|M|L",
        "BASKET_PRICE_SENSITIVITY": "LA|MM|UM",
        "BASKET_TYPE": "Full Shop|Top Up|Small Shop",
        "BASKET_DOMINANT_MISSION": "Fresh|Grocery|Nonfood|Mixed",
    }.items():
        assert log[column].str.fullmatch(pattern).all(), column
    known = log.dropna(subset=["CUST_CODE"])
    assert known["CUST_CODE"].str.fullmatch(r"CUST\d{10}").all() and known["seg_1"].isin(["AZ", "CT", "BG"]).all()
    anonymous = log.drop_duplicates("BASKET_ID")["CUST_CODE"].isna().mean()
    assert anonymous == pytest.approx(SMALL.anonymous, abs=0.08) and log["seg_1"].isna().equals(log["CUST_CODE"].isna())
    # A strict tree: one parent each.
    for child, parent in pairwise(COLUMNS[6:11]):
        assert (log.groupby(child)[parent].nunique() == 1).all()


def test_a_basket_is_one_trip_and_a_product_is_in_it_once(log):
    of_basket = [c for c in COLUMNS if c not in ("QUANTITY", "SPEND") and not c.startswith("PROD")]
    assert (log.groupby("BASKET_ID")[of_basket].nunique() <= 1).all(axis=None)
    assert not log.duplicated(["BASKET_ID", "PROD_CODE"]).any()
    time = log["SHOP_DATE"].astype(np.int64) * 100 + log["SHOP_HOUR"]
    assert time.is_monotonic_increasing and log["BASKET_ID"].is_monotonic_increasing
    assert log["BASKET_ID"].astype(str).str.len().eq(15).all() and log["SHOP_HOUR"].between(8, 22).all()
    items = log.groupby("BASKET_ID").size()
    size = log.groupby("BASKET_ID")["BASKET_SIZE"].first()
    assert (size == np.select([items <= 2, items <= 5], ["S", "M"], "L")).all()


def test_weeks_are_fiscal_and_the_time_table_has_them(folder, log):
    assert [fiscal(week) for week in (0, 45, 46, 98)] == [200607, 200652, 200701, 200801]
    table = pd.read_csv(folder / "time.csv")
    assert table.columns.tolist() == ["shop_week", "date_from", "date_to"] and len(table) == SMALL.weeks
    assert table.iloc[0].tolist() == [200607, 20060410, 20060416] and table.iloc[36].tolist() == [
        200643,
        20061218,
        20061224,
    ]
    dates = log.merge(table, left_on="SHOP_WEEK", right_on="shop_week", validate="many_to_one")
    assert len(dates) == len(log) and dates["SHOP_DATE"].between(dates["date_from"], dates["date_to"]).all()
    day = pd.to_datetime(log["SHOP_DATE"].astype(str)).map(pd.Timestamp.weekday)
    assert (log["SHOP_WEEKDAY"] == (day + 1) % 7 + 1).all()


def test_spend_is_quantity_times_the_weeks_price_except_for_weighed_goods(log, truth, weekly):
    price = weekly["price"].reindex(pd.MultiIndex.from_frame(log[["PROD_CODE", "SHOP_WEEK"]])).to_numpy()
    weighed = truth["weighed"].loc[log["PROD_CODE"]].to_numpy()
    np.testing.assert_allclose(log["SPEND"][~weighed], (log["QUANTITY"] * price)[~weighed], atol=0.0051)
    ratio = (log["SPEND"] / log["QUANTITY"] / price)[weighed]
    assert 0.25 < np.log(ratio).std() < 0.45


def test_promotions_have_depth_and_share_as_asked_for(weekly):
    assert weekly["promo"].mean() == pytest.approx(SMALL.promo, rel=0.25)
    on = weekly[weekly["promo"]]
    assert on["depth"].between(0.05, 0.56).all() and (weekly.loc[~weekly["promo"], "depth"] == 0).all()
    np.testing.assert_allclose(on["depth"], 1 - on["price"] / on["base_price"])


def test_units_move_with_prices_as_the_planted_elasticities_say(truth, weekly):
    """Units in weeks at other prices, divided by what the law foretells from the weeks at base price, are one."""
    wide = {name: weekly[name].unstack() for name in ("price", "units")}
    change = np.log(wide["price"]).sub(np.log(truth["base_price"]), axis=0)
    own = change.mul(truth["elasticity"], axis=0)
    cross = pd.DataFrame(0.0, own.index, own.columns)
    for relation in ("substitute", "complement"):
        partner = truth[relation].dropna()
        moved = change.loc[partner].set_axis(partner.index)
        cross.loc[partner.index] += moved.mul(truth.loc[partner.index, f"{relation}_elasticity"], axis=0)
    level = wide["units"].sum(axis=1) / np.exp(own + cross).sum(axis=1)
    expected = np.exp(own + cross).mul(level, axis=0)

    def ratio(chosen):
        return (wide["units"] * chosen).to_numpy().sum() / (expected * chosen).to_numpy().sum()

    steep = truth["elasticity"] < truth["elasticity"].median()
    for products in (steep, ~steep):
        cut = (change < -0.2).mul(products, axis=0)
        assert ratio(cut) == pytest.approx(1, abs=0.08) and (expected * cut).to_numpy().sum() > 2000
    # Without its own price the law would miss by far.
    flat = np.exp(cross).mul(level, axis=0)
    cut = change < -0.2
    assert (wide["units"] * cut).to_numpy().sum() > 1.5 * (flat * cut).to_numpy().sum()
    # A partner's promotion takes from a substitute and gives to a complement.
    for chosen in ((cross < -0.05) & (own.abs() < 0.1), (cross > 0.05) & (own.abs() < 0.1)):
        assert ratio(chosen) == pytest.approx(1, abs=0.12)


def test_complements_meet_more_often_than_by_chance_and_substitutes_never(log, truth):
    baskets = log.groupby("PROD_CODE")["BASKET_ID"].agg(set)
    number = log["BASKET_ID"].nunique()
    met, chance = {}, {}
    for relation in ("complement", "substitute"):
        pairs = [(a, b) for a, b in truth[relation].dropna().items() if a < b and a in baskets and b in baskets]
        assert all(truth.loc[b, relation] == a for a, b in pairs) and len(pairs) > 10
        met[relation] = sum(len(baskets[a] & baskets[b]) for a, b in pairs)
        chance[relation] = sum(len(baskets[a]) * len(baskets[b]) / number for a, b in pairs)
    assert met["complement"] > 2.5 * chance["complement"] and chance["substitute"] > 20 and met["substitute"] == 0


def test_missions_decide_type_size_and_focus(folder, log):
    mission = pd.read_parquet(folder / "truth" / "baskets.parquet").set_index("BASKET_ID")["mission"]
    baskets = log.groupby("BASKET_ID").agg(
        type=("BASKET_TYPE", "first"), items=("PROD_CODE", "size"), focus=("BASKET_DOMINANT_MISSION", "first")
    )
    assert mission.index.equals(baskets.index)
    joined = baskets.join(mission)
    assert (joined.groupby("mission")["type"].nunique() == 1).all() and joined["mission"].nunique() == 8
    items = joined.groupby("type")["items"].mean()
    assert items["Full Shop"] > 1.5 * items["Top Up"] > 3 * items["Small Shop"] / 1.5
    fresh = (joined["focus"] == "Fresh").groupby(joined["mission"]).mean()
    assert fresh["small fresh"] > 0.6 > 0.3 > fresh["small grocery"]


def test_customers_keep_their_store_their_habits_and_their_price_level(folder, log, truth):
    known = log.dropna(subset=["CUST_CODE"])
    customers = pd.read_parquet(folder / "truth" / "customers.parquet").set_index("CUST_CODE")
    trips = known.drop_duplicates("BASKET_ID")
    home = customers["store"].loc[trips["CUST_CODE"]].to_numpy() == trips["STORE_CODE"].to_numpy()
    assert home.mean() > 0.75
    half = known["SHOP_WEEK"] < fiscal(SMALL.weeks // 2)
    before = set(zip(known["CUST_CODE"][half], known["PROD_CODE"][half], strict=True))
    later = known[~half & known["CUST_CODE"].isin(known["CUST_CODE"][half])].drop_duplicates(["CUST_CODE", "PROD_CODE"])
    again = np.mean([pair in before for pair in zip(later["CUST_CODE"], later["PROD_CODE"], strict=True)])
    swapped = np.roll(later["CUST_CODE"].to_numpy(), 50)
    assert again > 1.5 * np.mean([pair in before for pair in zip(swapped, later["PROD_CODE"], strict=True)])
    dear = truth["relative_price"].loc[known["PROD_CODE"]].groupby(known["seg_1"].to_numpy()).mean()
    assert dear["AZ"] < dear["CT"] - 0.05 < dear["BG"] - 0.1


def test_the_seed_decides_every_byte_and_the_counts_are_those_written(tmp_path):
    def written(name, seed):
        result = generate(tmp_path / name, BasketsConfig(customers=30, products=100, weeks=3, stores=3, seed=seed))
        assert result["rows"] == pq.read_metadata(tmp_path / name / "transactions.parquet").num_rows
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    first = written("a", 1)
    assert first == written("b", 1) and set(first.values()).isdisjoint(
        digest for name, digest in written("a", 2).items() if name != "time.csv"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [({"customers": 5}, "customers: got 5"), ({"weeks": 0}, "weeks"), ({"promo": 0.5}, r"promo: got 0\.5")],
)
def test_settings_without_sense_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "log", BasketsConfig(**change))
    assert not list(tmp_path.iterdir())
