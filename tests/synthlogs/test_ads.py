"""The generated log has the published layout and statistics, and the truth that was planted in it can be found."""

import hashlib
import json
from datetime import datetime, timezone
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from synthlogs.ads import AdsConfig, generate
from synthlogs.ads.schema import LABELS, LISTS, NULLS, STRUCT_LISTS, labelled_schema, unlabelled_schema

SMALL = AdsConfig(rows=40_000, hours=24, test_rows=2_000, test_hours=3, gap_hours=5, seed=3)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log") / "raw"
    totals = generate(folder, SMALL)
    return folder, totals, ds.dataset(folder / "train" / "train").to_table()


def test_the_layout_is_the_published_one(log):
    folder, _, table = log
    assert len(labelled_schema()) == 84 and len(LABELS) == 17
    assert table.schema.names == labelled_schema().names
    for name in table.schema.names:
        wanted = labelled_schema().field(name).type
        assert table.schema.field(name).type.equals(wanted) or pa.types.is_nested(wanted), name
    assert pa.types.is_map(table.schema.field("cpm").type)
    assert pa.types.is_map(table.schema.field("user_actions_bundles_action_count").type.item_type)
    assert all(pa.types.is_struct(table.schema.field(name).type.value_type) for name in STRUCT_LISTS)
    assert all(pa.types.is_string(table.schema.field(name).type.value_type) for name in LISTS)
    hours = sorted(path.name for path in (folder / "train" / "train").iterdir())
    assert hours[0] == "datetime=2025-10-01-00-00" and hours[-1] == "datetime=2025-10-01-23-00" and len(hours) == 24
    tests = sorted((folder / "test" / "test").rglob("*.parquet"))
    assert [path.parent.name for path in tests] == [f"datetime=2025-10-02-0{h}-00" for h in (5, 6, 7)]
    assert pq.read_schema(tests[0]).names == unlabelled_schema().names
    assert table.num_rows == 40_000 and sum(pq.read_metadata(p).num_rows for p in tests) == 2_000


def test_hours_of_one_row_have_the_same_types(tmp_path):
    generate(tmp_path / "raw", AdsConfig(rows=30, hours=30, test_rows=2, test_hours=2))

    def plain(kind):
        if pa.types.is_map(kind):
            return plain(kind.key_type), plain(kind.item_type)
        return (plain(kind.value_type),) if pa.types.is_list(kind) else str(kind)

    for path in (tmp_path / "raw" / "train").rglob("*.parquet"):
        for field in pq.read_schema(path):
            assert plain(field.type) == plain(labelled_schema().field(field.name).type), (path, field.name)


def test_nulls_come_at_the_published_rates(log):
    _, _, table = log
    for name in table.schema.names:
        rate = NULLS.get(name, 0.0)
        assert abs(table[name].null_count / table.num_rows - rate) < 0.015, name
        assert rate > 0 or table[name].null_count == 0, name


def test_buyers_and_amounts_are_as_published(log):
    _, totals, table = log
    amount = table["iap_revenue_d7"].to_numpy()
    bought = amount[amount > 0]
    assert 0.029 < totals["buyer_rate_d7"] < 0.037
    assert abs(np.log1p(bought).mean() - 2.04) < 0.12
    assert 0.055 < np.log1p(amount).mean() < 0.08
    # A log-normal tail: the logarithm is nearly symmetric, the mean far above the median.
    logs = np.log(bought)
    assert abs(((logs - logs.mean()) ** 3).mean() / logs.std() ** 3) < 0.4
    assert bought.mean() > 3 * np.median(bought)


def test_horizons_are_ordered_and_flags_agree_with_amounts(log):
    _, _, table = log
    amounts = [table[f"iap_revenue_{h}"].to_numpy() for h in ("d7", "d14", "d28")]
    flags = [table[f"buyer_{h}"].to_numpy() for h in ("d1", "d7", "d14", "d28")]
    for before, after in (*pairwise(amounts), *pairwise(flags)):
        assert (before <= after).all() and (before < after).any()
    for horizon, amount in zip(("d7", "d14", "d28"), amounts, strict=True):
        assert ((amount > 0) == table[f"buyer_{horizon}"].to_numpy().astype(bool)).all()
        assert ((amount > 0) == (table[f"buy_{horizon}"].to_numpy() > 0)).all()


def test_nothing_a_feature_knows_lies_after_its_hour(log):
    folder, _, _ = log
    for path in sorted((folder / "train" / "train").rglob("*.parquet"))[::7]:
        start = datetime.strptime(path.parent.name, "datetime=%Y-%m-%d-%H-%M").replace(tzinfo=timezone.utc).timestamp()
        table = pq.read_table(path)
        for name in table.schema.names:
            if name in ("first_request_ts", "last_buy", "last_ins"):
                values = [v for v in table[name].to_pylist() if v is not None]
            elif "_ts_" in name:
                values = [v for row in table[name].to_pylist() if row for _, v in row]
            elif name == "user_actions_bundles_action_last_timestamp":
                values = [v for row in table[name].to_pylist() if row for _, inner in row for _, v in inner]
            elif name == "advertiser_actions_action_last_timestamp":
                values = [entry["value"] for row in table[name].to_pylist() if row for entry in row]
            else:
                continue
            assert not values or (min(values) > 1.3e9 and max(values) < start), name


def test_some_maps_repeat_a_key_and_some_lists_are_empty(log):
    _, _, table = log
    maps = [row for row in table["avg_daily_sessions"].to_pylist() if row]
    repeated = sum(len(row) != len({key for key, _ in row}) for row in maps)
    assert 0 < repeated < 0.02 * len(maps)
    assert any(row == [] for row in table["user_bundles_l28d"].to_pylist())


def test_the_planted_truth_is_in_the_labels_and_in_the_traces(log):
    folder, _, table = log
    truth = ds.dataset(folder / "truth" / "train").to_table()
    assert truth["row_id"].equals(table["row_id"]) and truth["iap_revenue_d28"].equals(table["iap_revenue_d28"])
    bought = table["buyer_d7"].to_numpy()
    probability = truth["oracle_buyer_d7"].to_numpy()
    assert abs(probability.mean() - bought.mean()) < 0.004
    assert roc_auc_score(bought, probability) > 0.85
    amount, log1p = table["iap_revenue_d7"].to_numpy(), truth["oracle_log1p_iap_revenue_d7"].to_numpy()
    assert np.mean((np.log1p(amount) - log1p) ** 2) < 0.85 * np.var(np.log1p(amount))
    # The lookup "has paid in this advertiser's own app before" was planted and must pay off.
    own = [
        bool(row) and bundle in dict(row)
        for row, bundle in zip(
            table["num_buys_bundle"].to_pylist(), table["advertiser_bundle"].to_pylist(), strict=True
        )
    ]
    assert sum(own) > 100 and bought[np.array(own)].mean() > 5 * bought.mean()
    cpm = np.array([sum(v for _, v in row) / len(row) if row else np.nan for row in table["cpm"].to_pylist()])
    seen = ~np.isnan(cpm)
    assert roc_auc_score(bought[seen], cpm[seen]) > 0.65


def test_row_ids_are_distinct_uuids(log):
    folder, _, table = log
    ids = table["row_id"].to_pylist()
    others = ds.dataset(folder / "test" / "test").to_table(columns=["row_id"])["row_id"].to_pylist()
    assert len({*ids, *others}) == len(ids) + len(others)
    assert all(len(i) == 36 and i[14] == "4" and [i[k] for k in (8, 13, 18, 23)] == ["-"] * 4 for i in ids[:200])


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(p.relative_to(folder)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_rows(tmp_path):
    config = {"rows": 300, "hours": 2, "test_rows": 50, "test_hours": 1}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(tmp_path / name, AdsConfig(**config, seed=seed))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    same = set(digest(tmp_path / "a")) & set(digest(tmp_path / "c"))
    assert not same
    record = json.loads((tmp_path / "a" / "generated.json").read_text())
    assert record["config"]["seed"] == 1 and record["result"]["train_rows"] == 300


def test_drift_moves_the_population_and_its_absence_does_not(tmp_path):
    def rates(drift):
        folder = tmp_path / str(drift)
        generate(folder, AdsConfig(rows=24_000, hours=48, test_rows=1, test_hours=1, gap_hours=0, drift=drift))
        parts = [
            ds.dataset(sorted((folder / "train" / "train").iterdir())[h]).to_table(columns=["country", "buyer_d7"])
            for h in range(48)
        ]
        first, last = pa.concat_tables(parts[:24]), pa.concat_tables(parts[24:])
        share = [sum(c == "AA" for c in t["country"].to_pylist()) / t.num_rows for t in (first, last)]
        return share, [t["buyer_d7"].to_numpy().mean() for t in (first, last)]

    (still_a, still_b), _ = rates(0.0)
    (moved_a, moved_b), (early, late) = rates(1.0)
    assert abs(still_a - still_b) < 0.02
    assert moved_b < moved_a - 0.02
    assert late < early


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rows": 3, "hours": 4}, "rows"),
        ({"buyer_rate": 0.0}, "buyer_rate"),
        ({"drift": 2.0}, "drift"),
        ({"gap_hours": -1}, "gap_hours"),
        ({"start": "2025-10-01"}, "start"),
    ],
)
def test_a_log_that_cannot_be_is_refused_by_name(tmp_path, change, name):
    with pytest.raises(ValueError, match=name):
        generate(tmp_path / "x", AdsConfig(**change))
    assert not (tmp_path / "x").exists()
