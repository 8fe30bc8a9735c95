"""Nested parsing against a literal Python oracle, on every Arrow layout that can hold nested values."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltv_stack.columns import column_numbers
from ltv_stack.nested import ALL_STATISTICS, nested_lookup, nested_recency, nested_statistics

VALUES = st.one_of(
    st.none(),
    st.floats(-1e6, 1e6, allow_nan=False),
    st.just(float("nan")),
    st.just(float("inf")),
    st.sampled_from([0.0, 1.0, 2.0, 2.0]),
)
KEYS = st.sampled_from(["a", "b", "c", "ä", ""])
ROW = st.one_of(st.none(), st.lists(st.tuples(KEYS, VALUES), max_size=7))
COLUMN = st.lists(ROW, max_size=9)
MAP = pa.map_(pa.string(), pa.float64())
STRUCTS = pa.list_(pa.struct([("hash", pa.string()), ("count", pa.float64())]))
NESTED = pa.map_(pa.string(), MAP)


def oracle(row: list[tuple[str | None, float | None]] | None, name: str) -> float:
    """One statistic of one row, written the slow way."""
    if row is None:
        return 0.0 if name == "count" else math.nan
    if name == "count":
        return float(len(row))
    if name == "distinct":
        return float(len({key for key, _ in row}))
    values = [v for _, v in row if v is not None and math.isfinite(v)]
    if name == "sum":
        return math.fsum(values)
    if name in ("mean", "std", "min", "max"):
        if not values:
            return math.nan
        mean = math.fsum(values) / len(values)
        if name == "std":
            return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        return {"mean": mean, "min": min(values), "max": max(values)}[name]
    positive = sorted((v for v in values if v > 0), reverse=True)
    if not positive:
        return math.nan
    total = math.fsum(positive)
    if name == "entropy":
        return -math.fsum(v / total * math.log(v / total) for v in positive if v / total > 0)
    return math.fsum(positive[: {"top1_share": 1, "top3_share": 3}[name]]) / total


def lookup_oracle(row: list[tuple[str, float | None]] | None, key: str | None, how: str) -> float:
    held = [v for k, v in row or [] if k == key and key is not None]
    if how == "count":
        return float(len(held)) if held else math.nan
    values = [v for v in held if v is not None and math.isfinite(v)]
    if not values:
        return math.nan
    return math.fsum(values) if how == "sum" else max(values)


def assert_matches(array: pa.Array | pa.ChunkedArray, rows: list[list[tuple[str, float | None]] | None]) -> None:
    found = nested_statistics(array, ALL_STATISTICS)
    for name in ALL_STATISTICS:
        expected = np.array([oracle(row, name) for row in rows])
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-6 if name == "std" else 1e-9, err_msg=name)


def as_structs(rows: list[list[tuple[str, float | None]] | None]) -> pa.Array:
    return pa.array([None if r is None else [{"hash": k, "count": v} for k, v in r] for r in rows], STRUCTS)


@settings(max_examples=150, deadline=None)
@given(COLUMN, st.data())
def test_every_layout_equals_the_oracle(rows: list, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    cut = data.draw(st.integers(0, len(rows)))
    for array in (pa.array(rows, MAP), as_structs(rows)):
        assert_matches(array, rows)
        assert_matches(array.slice(start, stop - start), rows[start:stop])
        assert_matches(pa.chunked_array([array.slice(cut), array.slice(0, cut)], array.type), rows[cut:] + rows[:cut])
    keys = data.draw(st.lists(st.one_of(st.none(), KEYS), min_size=len(rows), max_size=len(rows)))
    for how in ("sum", "max", "count"):
        expected = np.array([lookup_oracle(row, key, how) for row, key in zip(rows, keys, strict=True)])
        found = nested_lookup(pa.array(rows, MAP).slice(start), pa.array(keys, pa.string()).slice(start), how)
        np.testing.assert_allclose(found, expected[start:], rtol=1e-9, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.none(), st.lists(st.tuples(KEYS, ROW), max_size=4)), max_size=6), st.data())
def test_map_of_map_equals_the_oracle_on_its_flattened_rows(rows: list, data: st.DataObject) -> None:
    flat = [None if row is None else [(key, v) for key, inner in row for _, v in inner or []] for row in rows]
    start = data.draw(st.integers(0, len(rows)))
    array = pa.array(rows, NESTED)
    assert_matches(array, flat)
    assert_matches(array.slice(start), flat[start:])
    keys = data.draw(st.lists(KEYS, min_size=len(rows), max_size=len(rows)))
    expected = np.array([lookup_oracle(row, key, "sum") for row, key in zip(flat, keys, strict=True)])
    np.testing.assert_allclose(nested_lookup(array, pa.array(keys, pa.string())), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(COLUMN, st.integers(1, 4))
def test_results_do_not_depend_on_the_chunks_bit_by_bit(rows: list, size: int) -> None:
    array = pa.array(rows, MAP)
    whole = nested_statistics(array)
    parts = [nested_statistics(array.slice(i, size)) for i in range(0, len(rows), size)]
    for name, column in whole.items():
        joined = np.concatenate([part[name] for part in parts] or [np.empty(0)])
        assert joined.tobytes() == column.tobytes(), name


def test_long_rows_do_not_depend_on_their_neighbours() -> None:
    rng = np.random.default_rng(0)
    rows = [[("k", float(v)) for v in rng.lognormal(size=n)] for n in (1, 1000, 3, 257, 129, 8)]
    array = pa.array(rows, MAP)
    assert_matches(array, rows)
    whole = nested_statistics(array)
    for i in range(len(rows)):
        alone = nested_statistics(array.slice(i, 1))
        assert all(alone[name][0] == whole[name][i] for name in whole)


def test_a_null_row_that_hides_entries_contributes_nothing() -> None:
    offsets = pa.array([0, 2, 4, 5], pa.int32())
    mask = pa.array([False, True, False])
    array = pa.ListArray.from_arrays(offsets, pa.array([1.0, 2.0, 100.0, 100.0, 7.0]), mask=mask)
    assert array.offsets.to_pylist() == [0, 2, 4, 5]
    found = nested_statistics(array, ("count", "sum", "max"))
    np.testing.assert_array_equal(found["count"], [2, 0, 1])
    np.testing.assert_array_equal(found["sum"], [3, np.nan, 7])
    np.testing.assert_array_equal(found["max"], [2, np.nan, 7])


def test_a_null_struct_inside_a_list_is_an_entry_without_a_value() -> None:
    array = pa.array([[{"hash": "a", "count": 2.0}, None], [None]], STRUCTS)
    found = nested_statistics(array, ("count", "sum", "mean"))
    np.testing.assert_array_equal(found["count"], [2, 1])
    np.testing.assert_array_equal(found["sum"], [2, 0])
    np.testing.assert_array_equal(found["mean"], [2, np.nan])


def test_a_sliced_struct_child_is_read_from_its_own_offset() -> None:
    child = pa.array([{"k": "x", "v": 9.0}, {"k": "a", "v": 1.0}, {"k": "b", "v": 2.0}]).slice(1)
    array = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), child)
    np.testing.assert_array_equal(nested_statistics(array, ("sum",))["sum"], [1, 2])
    np.testing.assert_array_equal(nested_lookup(array, pa.array(["a", "x"])), [1, np.nan])


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int32(), 2), pa.list_view(pa.int32()), pa.large_list_view(pa.int32()), pa.large_list(pa.int32())],
    ids=str,
)
def test_other_list_layouts_and_their_slices(kind: pa.DataType) -> None:
    array = pa.array([[1, 2], None, [3, 4], [5, 6]], kind)
    for start in range(4):
        expected = [3, np.nan, 7, 11][start:]
        np.testing.assert_array_equal(nested_statistics(array.slice(start), ("sum",))["sum"], expected)


def test_duplicate_keys_are_all_counted() -> None:
    array = pa.array([[("a", 1.0), ("a", 2.0), ("b", 3.0)]], MAP)
    found = nested_statistics(array, ALL_STATISTICS)
    assert (found["count"][0], found["sum"][0], found["distinct"][0]) == (3, 6, 2)
    assert nested_lookup(array, pa.array(["a"]))[0] == 3


def test_sets_of_text_know_their_size_and_members() -> None:
    array = pa.array([["x", "y", "x"], [], None, [None]], pa.list_(pa.string()))
    found = nested_statistics(array, ALL_STATISTICS)
    np.testing.assert_array_equal(found["count"], [3, 0, 0, 1])
    np.testing.assert_array_equal(found["distinct"], [2, 0, np.nan, 1])
    assert np.isnan(found["sum"]).all()
    np.testing.assert_array_equal(nested_lookup(array, pa.array(["x", "x", "x", "x"])), [2, np.nan, np.nan, np.nan])


def test_dictionary_encoded_keys_and_integer_values() -> None:
    kind = pa.map_(pa.dictionary(pa.int32(), pa.string()), pa.int16())
    items = pa.array([3, 4, 5], pa.int16())
    keys = pa.array(["a", "b", "a"]).dictionary_encode()
    array = pa.MapArray.from_arrays(pa.array([0, 2, 3], pa.int32()), keys, items).cast(kind)
    np.testing.assert_array_equal(nested_lookup(array, pa.array(["b", "a"])), [4, 5])


def test_recency_is_against_the_row_s_own_time() -> None:
    now = np.array([1_758_474_000.0, 1_758_560_400.0, 1_758_560_400.0])
    array = pa.array(
        [[("g", 1_758_474_000 - 86_400), ("h", 1_758_474_000 - 2 * 86_400)], [], None], pa.map_("string", "int64")
    )
    found = nested_recency(array, now)
    np.testing.assert_array_equal(found["days_ago"], [1, np.nan, np.nan])
    np.testing.assert_array_equal(found["oldest_days_ago"], [2, np.nan, np.nan])


def test_an_all_null_column_of_no_type() -> None:
    found = nested_statistics(pa.nulls(3), ("count", "sum"))
    np.testing.assert_array_equal(found["count"], [0, 0, 0])
    assert np.isnan(found["sum"]).all()
    assert np.isnan(nested_lookup(pa.nulls(2), pa.array(["a", "b"]))).all()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="statistics: got \\['median'\\]"):
        nested_statistics(pa.array([[1.0]]), ("median",))
    with pytest.raises(TypeError, match="array: got Arrow type int64"):
        nested_statistics(pa.array([1]))
    with pytest.raises(ValueError, match="keys: got 1 rows, needs 2"):
        nested_lookup(pa.array([[("a", 1.0)], []], MAP), pa.array(["a"]))


def test_flat_columns_become_numbers() -> None:
    np.testing.assert_array_equal(column_numbers(pa.array(["07", " +1.5e1 ", "x", None, ""])), [7, 15, *[np.nan] * 3])
    np.testing.assert_array_equal(column_numbers(pa.array([True, None, False])), [1, np.nan, 0])
    moment = pa.array([0, 1_500_000, None], pa.int64()).cast(pa.timestamp("us"))
    np.testing.assert_array_equal(column_numbers(moment), [0, 1.5, np.nan])
    np.testing.assert_array_equal(column_numbers(pa.chunked_array([[1], [None]], pa.int8())), [1, np.nan])


def test_text_is_the_key_wherever_it_stands() -> None:
    rows = [[("a", 1.0), ("b", 3.0)], None, [], [("a", None)]]
    fields = [("hash", pa.string()), ("count", pa.float64())]
    ordered = pa.array([r and [dict(hash=k, count=v) for k, v in r] for r in rows], pa.list_(pa.struct(fields)))
    turned = pa.array([r and [dict(hash=k, count=v) for k, v in r] for r in rows], pa.list_(pa.struct(fields[::-1])))
    for name, values in nested_statistics(ordered).items():
        np.testing.assert_array_equal(nested_statistics(turned)[name], values)
    keys = pa.array(["b", "a", "a", "a"])
    np.testing.assert_array_equal(nested_lookup(turned, keys), [3.0, np.nan, np.nan, np.nan])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[b"1", b"2"], None], pa.list_(pa.binary())),
        pa.array([[("k", {"c": 1})], None], pa.map_(pa.string(), pa.struct([("c", pa.int64())]))),
        pa.array([["1x"], None]),
    ],
)
def test_entries_that_are_no_numbers_are_counted_and_have_no_sum(column: pa.Array) -> None:
    found = nested_statistics(column)
    assert found["count"][0] == len(column[0].as_py()) and np.isnan(found["sum"]).all() and np.isnan(found["max"]).all()
