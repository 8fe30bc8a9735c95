"""The generated purchases have the published layout, and what was planted in them can be found."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synthlogs.purchases import PurchasesConfig, generate

SMALL = PurchasesConfig(rows=150_000, products=3000, days=60, ratio=30, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("purchases") / "log"
    generate(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def log(folder: Path) -> pd.DataFrame:
    months = [f"{name}.parquet" for name in ("2019-Nov", "2019-Dec")]
    rows = pd.concat([pd.read_parquet(folder / name) for name in months], ignore_index=True)
    truth = pd.concat([pd.read_parquet(folder / "truth" / name) for name in months], ignore_index=True)
    return pd.concat([rows, truth], axis=1, verify_integrity=True)


@pytest.fixture(scope="module")
def products(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "truth" / "products.parquet").set_index("product_id")


@pytest.fixture(scope="module")
def users(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "truth" / "users.parquet").set_index("user_id")


def test_the_layout_is_the_published_one_in_time_order(folder, log, products, users):
    schema = pq.read_schema(folder / "2019-Nov.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "event_time": "timestamp[ms, tz=UTC]",
        "event_type": "string",
        "product_id": "int32",
        "category_id": "int64",
        "category_code": "string",
        "brand": "string",
        "price": "double",
        "user_id": "int32",
        "user_session": "string",
    }
    assert sorted(path.name for path in folder.iterdir()) == [
        "2019-Dec.parquet",
        "2019-Nov.parquet",
        "generated.json",
        "truth",
    ]
    assert log["event_time"].is_monotonic_increasing
    assert log["event_time"].min() >= pd.Timestamp("2019-11-01", tz="UTC")
    assert log["event_time"].max() < pd.Timestamp("2019-12-31", tz="UTC")
    assert (
        log["user_session"].str.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}").all()
    )
    assert (log.groupby("user_session")["user_id"].nunique() == 1).all()
    assert (log.groupby("product_id")[["category_id"]].nunique() == 1).all(axis=None)
    assert set(log["user_id"]) <= set(users.index) and set(log["product_id"]) <= set(products.index)
    assert (log["price"] > 0).all()


def test_sizes_and_shares_are_about_those_asked_for_and_published(log):
    assert len(log) == pytest.approx(SMALL.rows, rel=0.1)
    kinds = log["event_type"].value_counts()
    assert kinds["view"] / kinds["purchase"] == pytest.approx(30, rel=0.15)
    assert 0.1 < log["category_code"].isna().mean() < 0.55 and 0.05 < log["brand"].isna().mean() < 0.3
    events = log.groupby("user_session").size()
    assert events.mean() == pytest.approx(4.3, rel=0.25) and events.median() == 2
    assert events.quantile(0.9) == pytest.approx(10, abs=2) and events.quantile(0.99) == pytest.approx(29, rel=0.3)
    by_user = log.groupby("user_id").size()
    assert by_user.quantile(0.99) > 15 * by_user.median() and by_user.max() > 100 * by_user.median()
    shares = log["product_id"].value_counts(normalize=True)
    assert shares.iloc[:30].sum() > 0.15 and log["product_id"].nunique() > 0.6 * SMALL.products


def test_every_purchase_was_looked_at_in_its_session_before(log):
    views = log[log["event_type"] == "view"].groupby(["user_session", "product_id"])["event_time"].min()
    later = log[log["event_type"] != "view"].groupby(["user_session", "product_id"])["event_time"].max()
    assert (views.reindex(later.index) < later).all()


def test_the_propensity_is_the_chance_that_the_session_buys_the_product(log):
    pair = ["user_session", "product_id"]
    looked = log[log["event_type"] == "view"].drop_duplicates(pair)
    bought = set(log[log["event_type"] == "purchase"].set_index(pair).index)
    looked = looked.assign(bought=[key in bought for key in zip(looked[pair[0]], looked[pair[1]], strict=True)])
    assert not looked.loc[looked["propensity"] == 0, "bought"].any()
    looked = looked[looked["propensity"] > 0]
    tenth = pd.qcut(looked["propensity"], 10, labels=False)
    for _, rows in looked.groupby(tenth):
        error = np.sqrt(rows["propensity"].mean() / len(rows))
        assert abs(rows["bought"].mean() - rows["propensity"].mean()) < 4.5 * error
    assert looked["propensity"].quantile(0.95) > 10 * looked["propensity"].quantile(0.05)


def test_launched_products_are_seen_from_their_launch_on_only(log, products):
    launch = products["launch"].reindex(log["product_id"])
    assert (log["event_time"].to_numpy() >= launch.to_numpy()).all()
    new = products[products["launch"] > products["launch"].min()]
    assert len(new) == pytest.approx(0.2 * SMALL.products, rel=0.2)
    late = log[log["event_time"] >= pd.Timestamp("2019-12-24", tz="UTC")]
    assert 0.02 < late["product_id"].isin(new.index).mean() < 0.3


def test_what_a_user_sees_and_buys_fits_taste_price_and_interest(log, products, users):
    pairs = log[log["event_type"] == "purchase"].drop_duplicates(["user_id", "product_id"])
    taste, style = (
        np.stack(table) for table in (users["taste"].loc[pairs["user_id"]], products["style"].loc[pairs["product_id"]])
    )
    other = np.roll(style, 1, axis=0)
    assert (taste * style).sum(1).mean() > (taste * other).sum(1).mean() + 0.5
    wealth = users["wealth"].loc[pairs["user_id"]].to_numpy()
    relative = products["relative_price"].loc[pairs["product_id"]].to_numpy()
    assert np.corrcoef(wealth, relative)[0, 1] > 0.25
    interests = users["interests"].loc[pairs["user_id"]]
    inside = [c in i for c, i in zip(pairs["category_id"], interests, strict=True)]
    assert np.mean(inside) > 0.4


def test_half_of_the_wishes_after_a_purchase_are_for_its_complement(log, products):
    bought = log[log["event_type"] == "purchase"].drop_duplicates("user_session").sort_values(["user_id", "event_time"])
    complement = products.drop_duplicates("category_id").set_index("category_id")["complement_category_id"]
    user, category = bought["user_id"].to_numpy(), bought["category_id"].to_numpy()
    again = user[1:] == user[:-1]
    assert again.sum() > 300
    rate = (complement.reindex(category[:-1][again]).to_numpy() == category[1:][again]).mean()
    assert rate > 0.35


def test_a_discount_sells(log):
    views = log[log["event_type"] == "view"]
    cut = 1 - views["price"] / views.groupby("product_id")["price"].transform("max")
    assert set(cut.round(1)) == {0.0, 0.1, 0.2, 0.3}
    focus = views["propensity"] > 0
    chance = views[focus].groupby(cut[focus].round(1))["propensity"].mean()
    assert chance[0.3] > 1.5 * chance[0.0]


def test_never_seen_purchases_rank_above_popularity_by_interest_and_liking(log, products, users):
    """A score that knows the planted latents must beat popularity where repeating views cannot help."""
    cut = pd.Timestamp("2019-12-16", tz="UTC")
    past, later = log[log["event_time"] < cut], log[(log["event_time"] >= cut) & (log["event_type"] == "purchase")]
    pair = ["user_id", "product_id"]
    seen = set(past.set_index(pair).index)
    new = [key for key in dict.fromkeys(later.set_index(pair).index) if key not in seen and key[0] in users.index]
    assert len(new) > 300
    popularity = past["product_id"].value_counts().reindex(products.index).fillna(0).to_numpy()
    place = {product: number for number, product in enumerate(products.index)}
    style, category = np.stack(products["style"]), products["category_id"].to_numpy()
    by_popularity, by_law = [], []
    for user, product in new[:300]:
        one = users.loc[user]
        liking = (
            style @ one["taste"] - 0.8 * abs(products["relative_price"] - one["wealth"]) + 0.3 * products["quality"]
        )
        score = np.log(popularity + 0.5) + liking.to_numpy() + 3.0 * np.isin(category, one["interests"])
        by_popularity.append((popularity > popularity[place[product]]).sum())
        by_law.append((score > score[place[product]]).sum())
    assert np.median(by_law) < 0.4 * np.median(by_popularity)


def test_purchases_may_be_as_rare_as_one_in_4000_and_another_seed_gives_other_rows(tmp_path, folder):
    def digest(name):
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(p.relative_to(tmp_path / name)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    rare = PurchasesConfig(rows=100_000, products=1000, days=20, ratio=4000)
    result = generate(tmp_path / "a", rare)
    assert 8 <= result["purchase"] <= 60 and result["purchase"] <= result["cart"]
    generate(tmp_path / "b", rare)
    assert digest("a") == digest("b")
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "a").glob("*.parquet")) == sum(
        result[kind] for kind in ("view", "cart", "purchase")
    )
    assert pa.types.is_float32(pq.read_schema(tmp_path / "a" / "truth" / "2019-Nov.parquet").field(0).type)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 10}, "rows: got 10"),
        ({"ratio": 9.0}, r"ratio: got 9\.0"),
        ({"ratio": float("nan")}, "ratio: got nan"),
        ({"new_share": 1.0}, "new_share"),
        ({"start": "1.11.2019"}, "start: got"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_without_sense_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "log", PurchasesConfig(**change))
    assert not list(tmp_path.iterdir())
