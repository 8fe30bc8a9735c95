"""The leakage guard refuses by name: future-dated and label-derived columns, copies of labels, shuffled labels."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ltv_stack import (
    Column,
    Dataset,
    LeakageError,
    LTVConfig,
    LTVPipeline,
    Schema,
    audit,
    from_table,
    open_partitions,
)

FEATURES = {
    "local_distribution": {"by": ["country"], "features": ["spend__sum", "age"], "min_rows": 50},
    "interactions": {"terms": [{"name": "spent_by_age", "op": "product", "left": "spend__sum", "right": "age"}]},
}


@pytest.fixture(scope="module")
def plain(world: Path) -> pa.Table:
    return open_partitions(world).read()


def kinds(data: Dataset, schema: Schema) -> dict[str, str]:
    return {finding.column: finding.kind for finding in audit(data, schema, num_threads=1)}


def with_column(plain: pa.Table, name: str, values: object) -> Dataset:
    return from_table(plain.append_column(name, pa.array(values, from_pandas=True)))


def test_honest_columns_pass(plain: pa.Table, schema: Schema) -> None:
    assert kinds(from_table(plain), schema) == {}


@pytest.mark.parametrize("declared", [True, False])
def test_a_future_dated_column_is_refused_by_name(plain: pa.Table, schema: Schema, declared: bool) -> None:
    now = plain["datetime"].cast(pa.int64()).to_numpy() / 1e6
    rng = np.random.default_rng(0)
    stamp = np.where(rng.random(len(now)) < 0.1, now + rng.uniform(7200, 7 * 86400, len(now)), now - 86400)
    data = with_column(plain, "next_buy", stamp)
    column = Column("next_buy", kind="unix_seconds" if declared else "number")
    assert kinds(data, schema.with_columns(column)) == {"next_buy": "future_dated"}


def test_future_times_inside_a_map_are_seen(plain: pa.Table, schema: Schema) -> None:
    now = plain["datetime"].cast(pa.int64()).to_numpy() / 1e6
    rows = [[("a", t - 5), ("b", t + 86400)] if i % 20 == 0 else None for i, t in enumerate(now)]
    data = from_table(plain.append_column("buys", pa.array(rows, pa.map_(pa.string(), pa.float64()))))
    assert kinds(data, schema.with_columns(Column("buys", kind="nested_time"))) == {"buys": "future_dated"}


@pytest.mark.parametrize(
    "derive",
    [
        lambda y, rng: y,
        lambda y, rng: np.log1p(y) * 3 + 1,
        lambda y, rng: -np.sqrt(y),
        lambda y, rng: (y > 0).astype(float),
        lambda y, rng: y * rng.lognormal(0, 0.02, len(y)),
        lambda y, rng: np.where(y > 0, 2 * y, rng.choice(y[y > 0], len(y))),
    ],
    ids=["copy", "log", "negative root", "flag", "noisy", "hidden among amounts of others"],
)
def test_a_label_derived_column_is_refused_by_name(plain: pa.Table, schema: Schema, derive: Callable) -> None:
    leak = derive(plain["revenue_d7"].to_numpy(), np.random.default_rng(0))
    found = kinds(with_column(plain, "innocent_name", leak), schema.with_columns(Column("innocent_name")))
    assert found.keys() == {"innocent_name"}
    assert found["innocent_name"] in ("label_derived", "label_copy")


def test_a_shuffled_copy_of_a_label_is_refused_by_name(plain: pa.Table, schema: Schema) -> None:
    shuffled = np.random.default_rng(0).permutation(plain["revenue_d7"].to_numpy())
    found = kinds(with_column(plain, "revenue_elsewhere", shuffled), schema.with_columns(Column("revenue_elsewhere")))
    assert found == {"revenue_elsewhere": "label_copy"}


def test_a_shuffled_label_is_refused_by_name(plain: pa.Table, schema: Schema) -> None:
    order = np.random.default_rng(0).permutation(plain.num_rows)
    names = ("revenue_d1", "revenue_d7", "revenue_d14", "buyer_d7")
    table = plain
    for name in names:
        at = table.column_names.index(name)
        table = table.set_column(at, name, plain[name].take(pa.array(order)))
    assert kinds(from_table(table), schema) == dict.fromkeys(names, "unpredictable_label")


def test_declarations_refuse_without_looking_at_values(schema: Schema) -> None:
    late = Column("later", available_at=timedelta(days=3))
    child = Column("a", derived_from=("b",))
    parent = Column("b", role="ignore", derived_from=("revenue_d7",))
    empty = from_table(pa.table({"x": pa.array([], pa.float64())}))
    found = audit(empty, schema.with_columns(late, child, parent))
    assert [(f.column, f.kind) for f in found] == [("later", "declared_future"), ("a", "label_derived")]
    with pytest.raises(ValueError, match="are labels of a horizon and cannot be features"):
        schema.with_columns(Column("revenue_d7", role="feature"))


def test_fit_refuses_all_leaks_at_once_unless_told_to_report(
    plain: pa.Table, schema: Schema, config: Callable[..., LTVConfig]
) -> None:
    y = plain["revenue_d7"].to_numpy()
    now = plain["datetime"].cast(pa.int64()).to_numpy() / 1e6
    table = plain.append_column("later", pa.array(now + 86400)).append_column("spoiler", pa.array(y * 2))
    leaky = schema.with_columns(Column("later", kind="unix_seconds"), Column("spoiler"))
    pipe = LTVPipeline(leaky, config())
    with pytest.raises(LeakageError, match=r"(?s)later: future_dated.*spoiler: label_derived"):
        pipe.fit(from_table(table))
    assert not pipe.fitted
    reported = LTVPipeline(leaky, config(guard="report")).fit(from_table(table))
    assert [leak.split(":")[0] for leak in reported.report_["leaks"]] == ["later", "spoiler"]
    assert LTVPipeline(leaky.without("later", "spoiler"), config()).fit(from_table(table)).fitted


def buyers_of(plain: pa.Table) -> np.ndarray:
    return np.nan_to_num(plain["revenue_d7"].to_numpy(zero_copy_only=False)) > 0


@pytest.mark.parametrize(
    "leak",
    [
        lambda buyer: np.where(buyer, "payer", "free").tolist(),
        lambda buyer: ["payer" if one else None for one in buyer],
        lambda buyer: [["a", "gold"] if one else ["a"] for one in buyer],
        lambda buyer: [[("gold", 1.0)] if one else [("tin", 1.0)] for one in buyer],
        lambda buyer: [i % 7 if one else None for i, one in enumerate(buyer)],
    ],
    ids=["text", "null text", "elements", "keys", "missing"],
)
def test_a_label_told_by_text_keys_or_absence_is_refused(plain: pa.Table, schema: Schema, leak: Callable) -> None:
    values = leak(buyers_of(plain))
    kind = (
        pa.map_(pa.string(), pa.float64())
        if any(v and isinstance(v, list) and v[0][0] == "tin" for v in values)
        else None
    )
    data = from_table(plain.append_column("tier", pa.array(values, kind)))
    assert kinds(data, schema.with_columns(Column("tier"))) == {"tier": "label_derived"}


@pytest.mark.parametrize(
    "kind", [pa.map_(pa.string(), pa.float64()), pa.struct([("k", pa.float64()), ("n", pa.float64())])]
)
def test_a_label_under_one_key_is_seen_beside_louder_ones(plain: pa.Table, schema: Schema, kind: pa.DataType) -> None:
    noise = 50 + 1000 * np.abs(np.random.default_rng(0).normal(size=plain.num_rows))
    rows = [{"k": y, "n": n} for y, n in zip(plain["revenue_d7"].to_pylist(), noise, strict=True)]
    if pa.types.is_map(kind):
        rows = [list(row.items()) for row in rows]
    found = audit(from_table(plain.append_column("mixed", pa.array(rows, kind))), schema.with_columns(Column("mixed")))
    assert [(f.column, f.kind) for f in found] == [("mixed", "label_copy")]


def test_the_difference_of_two_labels_and_other_labels_are_seen(plain: pa.Table, schema: Schema) -> None:
    later = plain["revenue_d14"].to_numpy() - plain["revenue_d7"].to_numpy()
    assert kinds(with_column(plain, "later", later), schema.with_columns(Column("later"))) == {"later": "label_copy"}
    back = (np.random.default_rng(0).random(plain.num_rows) < 0.3).astype(float)
    data = from_table(plain.append_column("returned", pa.array(back)).append_column("echo", pa.array(back)))
    declared = schema.with_columns(Column("returned", role="label", available_at=timedelta(days=3)), Column("echo"))
    assert kinds(data, declared) == {"echo": "label_derived"}


def test_a_mark_that_only_some_buyers_bear_is_refused_where_few_rows_buy(plain: pa.Table, schema: Schema) -> None:
    rng = np.random.default_rng(0)
    buyers = buyers_of(plain)
    thin = plain.filter(pa.array(~buyers | (rng.random(len(buyers)) < 0.3)))
    marked = buyers_of(thin) & (rng.random(thin.num_rows) < 0.4)
    assert buyers_of(thin).mean() < 0.1 and marked.sum() >= 30
    for values in (marked.astype(float), np.where(marked, "x", "y").tolist(), -marked.astype(float)):
        assert kinds(with_column(thin, "mark", values), schema.with_columns(Column("mark"))) == {
            "mark": "label_derived"
        }
    half = marked | (rng.random(thin.num_rows) < marked.mean())
    assert kinds(with_column(thin, "mark", half.astype(float)), schema.with_columns(Column("mark"))) == {}


def test_a_time_that_is_there_for_buyers_only_is_refused(plain: pa.Table, schema: Schema) -> None:
    now = plain["datetime"].cast(pa.int64()).to_numpy() / 1e6
    data = with_column(plain, "paid", np.where(buyers_of(plain), now - 60, np.nan))
    assert kinds(data, schema.with_columns(Column("paid", kind="unix_seconds"))) == {"paid": "label_derived"}


@pytest.mark.parametrize("form", ["milliseconds", "microseconds", "text", "day"])
def test_future_dates_are_seen_in_any_form(plain: pa.Table, schema: Schema, form: str) -> None:
    now = plain["datetime"].cast(pa.int64()).to_numpy() / 1e6
    late = np.where(np.arange(len(now)) % 10 == 0, now + 5 * 86400, now - 86400).astype("datetime64[s]")
    values = {
        "milliseconds": late.astype("datetime64[ms]").astype(np.int64),
        "microseconds": late.astype("datetime64[us]").astype(np.int64),
        "text": [f"{one}Z" for one in late],
        "day": [str(one)[:10] for one in late],
    }[form]
    assert kinds(with_column(plain, "due", values), schema.with_columns(Column("due"))) == {"due": "future_dated"}


def test_an_excluded_column_is_not_looked_at(plain: pa.Table, schema: Schema) -> None:
    data = with_column(plain, "leak", buyers_of(plain).astype(float))
    wider = schema.with_columns(Column("leak"), Column("later", available_at=timedelta(days=1)))
    assert {f.column for f in audit(data, wider, num_threads=1)} == {"leak", "later"}
    assert audit(data, wider, {"exclude": ["leak", "later"]}, num_threads=1) == []


@pytest.mark.parametrize("column", ["country", "bundle", "spend", "age"])
def test_an_excluded_column_is_used_nowhere(
    plain: pa.Table, schema: Schema, config: Callable[..., LTVConfig], column: str
) -> None:
    """Not as a group, not as a key that is looked up, not in a feature made of others."""
    features = {**FEATURES, "exclude": [column]}
    assert audit(from_table(plain), schema, features, num_threads=1) == []
    pipe = LTVPipeline(schema, config(features=features)).fit(from_table(plain))
    assert column not in pipe.builder.columns
    assert not [name for name in pipe.builder.names if column in name]
    batch = plain.drop_columns([column]).to_batches()[0]
    assert pipe.predict_batch(batch).num_rows == batch.num_rows


def test_presence_tells_for_nans_and_for_empty_maps_of_times(plain: pa.Table, schema: Schema) -> None:
    buyer = buyers_of(plain)
    now = plain["datetime"].cast(pa.int64()).to_numpy() / 1e6
    nans = np.where(buyer, np.random.default_rng(0).random(len(buyer)), np.nan)
    data = from_table(plain.append_column("score", pa.array(nans, from_pandas=False)))
    assert kinds(data, schema.with_columns(Column("score"))) == {"score": "label_derived"}
    times = [[(f"shop {i}", now[i] - 60)] if one else [] for i, one in enumerate(buyer)]
    data = from_table(plain.append_column("paid", pa.array(times, pa.map_(pa.string(), pa.float64()))))
    assert kinds(data, schema.with_columns(Column("paid", kind="nested_time"))) == {"paid": "label_derived"}


def test_zeros_do_not_hide_future_times(plain: pa.Table, schema: Schema) -> None:
    now = plain["datetime"].cast(pa.int64()).to_numpy() / 1e3
    due = np.where(np.arange(len(now)) % 4 == 0, now + 5 * 86400e3, 0.0)
    assert kinds(with_column(plain, "due", due), schema.with_columns(Column("due"))) == {"due": "future_dated"}


def test_what_cannot_be_tested_is_said(plain: pa.Table, schema: Schema, caplog: pytest.LogCaptureFixture) -> None:
    audit(from_table(plain.slice(0, 300)), schema, num_threads=1)
    assert "were not looked for" in caplog.text and "was not tested" in caplog.text
