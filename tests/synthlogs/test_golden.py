"""The same seed gives the same rows today as when a log was first written.

The hashes are of the rows, not of the files: another release of pyarrow may write other bytes for the same rows, and
another processor other last bits of an exponential, so numbers with a fraction count by six digits.
"""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from synthlogs import ads, baskets, friends, purchases, shop


def content(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".npy")):
        total.update(str(path.relative_to(folder)).encode())
        if path.suffix == ".npy":
            total.update(repr(rounded(np.load(path).tolist())).encode())
            continue
        for name, column in zip((table := pq.ParquetFile(path).read()).column_names, table.columns, strict=True):
            total.update(f"{name}{rounded(column.to_pylist())}".encode())
    return total.hexdigest()


def rounded(value):
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return f"{value:.6g}" if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("generate", "config", "wanted"),
    [
        (
            shop.generate,
            shop.ShopConfig(clients=777, end="2023-01-31 12:00:00", days=200, log_seed=123456789012),
            "f504676acfda6f03c901bdef02fbd359813ac7ebf22f01e0eead8872d278f217",
        ),
        (
            shop.generate,
            shop.ShopConfig(clients=100, target_categories=2, target_skus=2, target_new_skus=2),
            "3722dcc367899711e0fdc24aefd10be57505530cb81a46af83edba10f197bde1",
        ),
        (
            ads.generate,
            ads.AdsConfig(rows=600, hours=3, test_rows=70, test_hours=2, gap_hours=2, seed=5),
            "3f5a4f705f44d2582e5faf6a0194025aee19e53eb89e717c988249d15b91da79",
        ),
        (
            ads.generate,
            ads.AdsConfig(rows=300, hours=2, test_rows=0, test_hours=0, drift=1.0, buyer_rate=0.4),
            "d4bc6af1f99b43032a5ce42a39b8ca4d4470aba36dd133e665519038d904561f",
        ),
        (
            purchases.generate,
            purchases.PurchasesConfig(rows=2000, products=200, days=40, start="2019-11-25", seed=3),
            "fd52716866ee642783aa261088dfcd9a4c4921ed691450637f82d1809c43f6e4",
        ),
        (
            baskets.generate,
            baskets.BasketsConfig(customers=30, products=100, weeks=4, stores=3, seed=4),
            "af00dc959977d868ee8f7c62eb276913e8f409b1ffd3b1a19380755a48b6629c",
        ),
        (
            friends.generate,
            friends.FriendsConfig(users=200, days=10, community_size=20, seed=5),
            "e686df03b7079d6a16fdb065c11092bc4c111fb73a639f68710a14f3213022e8",
        ),
    ],
    ids=lambda value: "",
)
def test_rows_are_those_first_written(generate, config, wanted, tmp_path):
    generate(tmp_path / "log", config)
    assert content(tmp_path / "log") == wanted
