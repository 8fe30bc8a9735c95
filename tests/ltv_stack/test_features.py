"""Feature groups: what is fitted is frozen, and every value is what its name says."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ltv_stack import (
    Column,
    FeatureBuilder,
    FeatureConfig,
    Horizon,
    LTVConfig,
    Schema,
    from_table,
    open_partitions,
    smadex_features,
    smadex_schema,
)

HORIZON = [Horizon("d7", "y")]


def built(table: pa.Table, columns: list[Column], features: dict, time: str | None = None) -> tuple:
    schema = Schema(columns, HORIZON, time=time, id=None)
    builder = FeatureBuilder(schema, features).fit(from_table(table))
    matrix = builder.transform(table.combine_chunks().to_batches()[0])
    return builder, {name: matrix[:, i] for i, name in enumerate(builder.names)}


def test_dictionary_has_rare_buckets_and_unseen_values_share_one() -> None:
    values = ["b"] * 5 + ["a"] * 5 + ["rare"] + [None]
    table = pa.table({"c": values})
    builder, found = built(table, [Column("c")], {"categorical": {"min_count": 2}, "temporal": {"enabled": False}})
    assert found["c__code"].tolist() == [3] * 5 + [2] * 5 + [1, 0]
    fresh = builder.transform(pa.record_batch({"c": ["new", None, "a"]}))
    assert fresh[:, builder.names.index("c__code")].tolist() == [1, 0, 2]
    assert found["c__missing"].tolist() == [0] * 11 + [1]
    np.testing.assert_allclose(found["c__freq"][0], np.log(6) - np.log(13), rtol=1e-6)


def test_recency_is_in_days_before_the_row_s_own_hour_with_a_true_half_life() -> None:
    hour = datetime(2025, 10, 1, 12)
    seconds = (hour - datetime(1970, 1, 1)).total_seconds()
    table = pa.table(
        {
            "datetime": pa.array([hour, hour], pa.timestamp("us")),
            "t": [seconds - 30 * 86400, None],
            "m": pa.array([[("a", seconds - 86400), ("b", seconds - 2 * 86400)], None], pa.map_("string", "float64")),
            "k": ["b", "a"],
        }
    )
    columns = [Column("t", kind="unix_seconds"), Column("m", kind="nested_time", lookup=("k",)), Column("k")]
    _, found = built(table, columns, {"recency": {"half_life_days": 30}}, "datetime")
    assert found["t__days_ago"][0] == 30 and np.isnan(found["t__days_ago"][1])
    assert found["t__decay"][0] == pytest.approx(0.5)
    assert (found["m__days_ago"][0], found["m__oldest_days_ago"][0]) == (1, 2)
    assert found["m__days_ago_at_k"][0] == 2
    assert found["hour_sin"][0] == pytest.approx(np.sin(np.pi), abs=1e-6)
    assert (found["day_part"][0], found["is_weekend"][0]) == (2, 0)


def test_terms_ranks_and_deviations() -> None:
    table = pa.table({"g": ["a"] * 300 + ["b"] * 300, "x": [*range(300), *range(1000, 1300)], "y": [1.0] * 600})
    features = {
        "interactions": {"terms": [{"name": "xx", "op": "product", "left": "x", "right": "x"}]},
        "behavioural": {"terms": [{"name": "r", "op": "ratio", "left": "x", "right": "x"}]},
        "local_distribution": {"by": ["g"], "features": ["x"], "min_rows": 100},
    }
    builder, found = built(table, [Column("g"), Column("x")], features)
    assert found["xx"][7] == 49
    assert found["r"][3] == pytest.approx(3 / 4)
    assert found["x__dev_in_g"][0] == pytest.approx(-149.5) and found["x__dev_in_g"][300] == pytest.approx(-149.5)
    assert found["x__rank_in_g"][0] == 0 and found["x__rank_in_g"][599] == 1
    assert found["x__rank_in_g"][450] == pytest.approx(0.5, abs=0.03)
    assert builder.groups["x__rank_in_g"] == "local_distribution" and builder.source["xx"] == "x"


def test_groups_switch_off(world: Path, schema: Schema, config: Callable[..., LTVConfig]) -> None:
    data = open_partitions(world, max_partitions=1)
    full = FeatureBuilder(schema, config().features).fit(data)
    for group in set(full.groups.values()) - {"numbers"}:
        settings = {**json.loads(json.dumps(_features())), "lookups": None}
        settings.pop("lookups")
        if group == "lookups":
            settings["nested"] = {"lookups": False}
        else:
            settings[group] = {**settings.get(group, {}), "enabled": False}
        less = FeatureBuilder(schema, settings).fit(data)
        assert group not in less.groups.values(), group
        assert len(less.names) < len(full.names)


def _features() -> dict:
    return {
        "categorical": {"min_count": 5},
        "interactions": {"terms": [{"name": "i", "op": "product", "left": "age", "right": "noise"}]},
        "local_distribution": {"by": ["country"], "features": ["age"], "min_rows": 50},
    }


def test_transform_is_frozen_and_invariant_to_chunks_and_json(
    world: Path, schema: Schema, config: Callable[..., LTVConfig]
) -> None:
    data = open_partitions(world, max_partitions=3)
    builder = FeatureBuilder(schema, config().features).fit(data)
    small = FeatureBuilder(schema, config().features).fit(open_partitions(world, max_partitions=3, chunk_size=64))
    assert small.to_json() == builder.to_json()
    again = FeatureBuilder.from_json(json.loads(json.dumps(builder.to_json())))
    batch = next(iter(data))
    whole = builder.transform(batch)
    assert again.transform(batch).tobytes() == whole.tobytes()
    for size in (1, 13):
        parts = [builder.transform(batch.slice(i, size)) for i in range(0, 260, size)]
        assert np.concatenate(parts).tobytes() == whole[:260].tobytes()


def test_missing_values_stay_unknown_and_an_all_null_column_is_harmless() -> None:
    table = pa.table({"x": pa.array([1.0, None, np.inf]), "n": pa.nulls(3), "m": pa.nulls(3)})
    columns = [Column("x"), Column("n"), Column("m", kind="nested")]
    builder, found = built(table, columns, {})
    assert np.isnan(found["x"][1]) and np.isfinite(found["x"][2])
    assert "n" not in builder.kinds and np.isnan(found["m__sum"]).all() and (found["m__count"] == 0).all()


def test_a_column_that_vanishes_is_an_error_that_names_it() -> None:
    table = pa.table({"x": [1.0, 2.0], "z": [1.0, 2.0]})
    builder, _ = built(table, [Column("x"), Column("z")], {})
    with pytest.raises(ValueError, match="column 'z' is missing"):
        builder.transform(pa.record_batch({"x": [1.0]}))


def test_configuration_errors_name_group_and_setting() -> None:
    with pytest.raises(ValueError, match="features: got group 'nesting'"):
        FeatureConfig.from_dict({"nesting": {}})
    with pytest.raises(ValueError, match=r"features\.nested: got \['stats'\]"):
        FeatureConfig.from_dict({"nested": {"stats": []}})
    with pytest.raises(ValueError, match="op of term 'a': got 'power'"):
        FeatureConfig.from_dict({"interactions": {"terms": [{"name": "a", "op": "power", "left": "x", "right": "y"}]}})
    with pytest.raises(ValueError, match="half_life_days: got 0"):
        FeatureConfig.from_dict({"recency": {"half_life_days": 0}})
    with pytest.raises(ValueError, match=r"local_distribution\.by: \['y'\] are not declared features"):
        built(
            pa.table({"x": [1.0], "y": [0.0]}), [Column("x")], {"local_distribution": {"by": ["y"], "features": ["x"]}}
        )


def test_the_published_layout_has_84_columns() -> None:
    schema = smadex_schema()
    names = {c.name for c in schema.columns} - {"datetime"}
    assert len(names) == 84
    assert len(schema.label_columns) == 17
    assert [h.revenue for h in schema.horizons] == [None, "iap_revenue_d7", "iap_revenue_d14", "iap_revenue_d28"]
    terms = FeatureConfig.from_dict(smadex_features())
    assert terms.local_by == ("country", "dev_os", "advertiser_category")
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


TEXT = ["a", "b", None, "a"]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view(), pa.binary(), pa.large_binary(), pa.binary(1)])
def test_text_is_read_whatever_arrow_calls_it(kind: pa.DataType) -> None:
    schema = Schema([Column("x")], [Horizon("d7", "y")], time=None, id=None)
    raw = TEXT if kind == pa.string_view() else [None if v is None else v.encode() for v in TEXT]
    data = from_table(pa.table({"x": pa.array(raw, kind), "n": range(4)}), sample_frac=0.999)
    plain = from_table(pa.table({"x": TEXT, "n": range(4)}), sample_frac=0.999)
    config = {"categorical": {"min_count": 1}}
    builders = [FeatureBuilder(schema, config).fit(one) for one in (data, plain)]
    matrices = [b.transform(next(iter(one))) for b, one in zip(builders, (data, plain), strict=True)]
    assert builders[0].names == builders[1].names == ["x__missing", "x__code", "x__freq"]
    np.testing.assert_array_equal(*matrices)
    with pytest.raises(ValueError, match=r"column x: its bytes .* are not UTF-8 text"):
        FeatureBuilder(schema, config).fit(from_table(pa.table({"x": pa.array([b"\xff"], pa.binary())})))


def test_a_struct_is_a_map_of_its_numbers_and_other_types_say_that_they_are_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [{"wins": 3, "share": 0.5, "name": "x"}, None, {"wins": None, "share": 2.0, "name": None}, {"wins": 1}]
    struct = pa.array(rows, pa.struct([("wins", pa.int32()), ("share", pa.float64()), ("name", pa.string())]))
    maps = [[("wins", 3.0), ("share", 0.5)], None, [("share", 2.0)], [("wins", 1.0)]]
    table = pa.table(
        {
            "x": struct,
            "key": ["wins", "wins", "wins", "share"],
            "words": [{"a": "b"}] * 4,
            "wait": pa.array([1, 2, 3, 4], pa.duration("s")),
        }
    )
    schema = Schema(
        [Column("x", lookup=("key",)), Column("key", role="ignore"), Column("words"), Column("wait")],
        [Horizon("d7", "y")],
        time=None,
        id=None,
    )
    found = FeatureBuilder(schema).fit(from_table(table))
    same = table.set_column(0, "x", pa.array(maps, pa.map_(pa.string(), pa.float64())))
    expected = FeatureBuilder(schema).fit(from_table(same))
    assert found.names == expected.names and "x__at_key" in found.names
    for first in (0, 1):
        one, other = (b.transform(t.slice(first).to_batches()[0]) for b, t in ((found, table), (expected, same)))
        np.testing.assert_array_equal(one, other)
    assert "column words of Arrow type struct<a: string> is not used: this type is not read" in caplog.text
    assert "column wait of Arrow type duration[s] is not used: this type is not read" in caplog.text
