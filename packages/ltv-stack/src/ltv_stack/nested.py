"""Statistics of nested Arrow columns straight from their offsets: no Python object is made for any entry."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .columns import Floats, array_numbers, as_text, has_numbers, is_nested, is_text, one_chunk

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

STATISTICS = ("count", "sum", "mean", "std", "min", "max", "top1_share", "top3_share", "entropy")
ALL_STATISTICS = (*STATISTICS, "distinct")
_OF_ALL = ("sum", "mean", "std", "min", "max")
_OF_POSITIVE = ("top1_share", "top3_share", "entropy")
# Rows of up to so many entries are worked on together, one entry of each at a time.
_SHORT = 32


@dataclass(frozen=True)
class Entries:
    """The entries of a nested column, flattened in row order.

    Args:
        lengths: how many entries each row has; 0 for a null row [N].
        keys: the outermost key of every entry [E], or None where the column has no keys.
        values: the innermost value of every entry [E].
        present: False where the row is null [N].
    """

    lengths: Ints
    keys: pa.Array | None
    values: pa.Array
    present: Bools

    @property
    def rows(self) -> Ints:
        """The row every entry belongs to, non-decreasing [E]."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int64), self.lengths)


def flatten_nested(array: pa.Array) -> Entries:
    """Flatten a map, list, list of (key, value) structs, or any of these inside each other, to its entries.

    Slices, null rows that hide entries, and offsets that leave gaps are taken as Arrow defines them: a null row has no
    entries. Duplicate keys are kept, every one an entry. Of a struct the first field is the key and the second the
    value, or the other way round where only the second is text; of nested maps the outermost key is kept.

    Args:
        array: the column [N].

    Returns:
        the entries, and how many each row has.

    Raises:
        TypeError: the column is not nested.
    """
    if not is_nested(array.type):
        raise TypeError(f"array: got Arrow type {array.type}, needs a map or a list type")
    present = np.asarray(pc.is_valid(array))
    starts, lengths = _extents(array)
    lengths = np.where(present, lengths, 0)
    total = int(lengths.sum())
    child = array.values
    # One contiguous stretch is sliced; a null row that hides entries leaves a gap, so those are gathered.
    if total == 0:
        child = child.slice(0, 0)
    elif _has_offsets(array.type) and starts[-1] + lengths[-1] - starts[0] == total:
        child = child.slice(int(starts[0]), total)
    else:
        first = np.cumsum(lengths) - lengths
        child = child.take(pa.array(np.repeat(starts - first, lengths) + np.arange(total)))
    keys, values = _keys_and_values(child)
    if is_nested(values.type):
        inner = flatten_nested(values)
        keys = inner.keys if keys is None else keys.take(pa.array(inner.rows))
        outer = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
        inner_lengths = np.bincount(outer[inner.rows], minlength=len(lengths)).astype(np.int64)
        return Entries(inner_lengths, keys, inner.values, present)
    return Entries(lengths, keys, values, present)


def nested_statistics(array: pa.Array | pa.ChunkedArray, statistics: Sequence[str] = STATISTICS) -> dict[str, Floats]:
    """Per-row statistics of a nested column: count, sum, mean, std, min, max, top-k shares, entropy, distinct.

    A null row has count 0 and NaN elsewhere; an empty one has count 0, sum 0, distinct 0 and NaN elsewhere. Null and
    non-finite values count as entries and are left out of everything else. Shares and entropy (natural log) are over
    the positive values, entry by entry; std is the population's. A row's result depends on that row alone, bit by bit.

    Args:
        array: map, list, list of structs, or map of maps [N].
        statistics: names out of `ALL_STATISTICS`.

    Returns:
        name -> float64 [N], in the order asked. Text values know count and distinct only; the others are NaN.

    Raises:
        ValueError: an unknown statistic, named.
    """
    unknown = [name for name in statistics if name not in ALL_STATISTICS]
    if unknown:
        raise ValueError(f"statistics: got {unknown}, needs names out of {list(ALL_STATISTICS)}")
    if isinstance(array, pa.ChunkedArray):
        parts = [nested_statistics(chunk, statistics) for chunk in array.chunks]
        return {name: np.concatenate([p[name] for p in parts] or [np.empty(0)]) for name in statistics}
    if pa.types.is_null(array.type):
        return {name: np.full(len(array), 0.0 if name == "count" else np.nan) for name in statistics}
    entries = flatten_nested(array)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        return _statistics(entries, statistics)


def nested_lookup(
    array: pa.Array | pa.ChunkedArray,
    keys: pa.Array | pa.ChunkedArray,
    how: Literal["sum", "max", "count"] = "sum",
) -> Floats:
    """The value each row's nested column holds under that row's own key, NaN where it holds none.

    Args:
        array: a nested column with keys [N]; of nested maps the outermost key is looked up.
        keys: the key wanted by each row, text [N]; null finds nothing.
        how: what to do with several entries under one key: their sum, their largest, or how many there are.

    Returns:
        float64 [N].

    Raises:
        ValueError: there are more or fewer keys than rows.
    """
    array, keys = one_chunk(array), one_chunk(keys)
    if len(array) != len(keys):
        raise ValueError(f"keys: got {len(keys)} rows, needs {len(array)}, one for each row of array")
    result = np.full(len(array), np.nan)
    if pa.types.is_null(array.type) or pa.types.is_null(keys.type):
        return result
    entries = flatten_nested(array)
    held = entries.keys if entries.keys is not None else entries.values
    rows = entries.rows
    wanted = as_text(keys).take(pa.array(rows))
    match = np.asarray(pc.fill_null(pc.equal(as_text(held), wanted), False))
    if not match.any():
        return result
    rows = rows[match]
    if how == "count" or entries.keys is None:
        values = np.ones(len(rows))
    else:
        values = array_numbers(entries.values)[match]
        rows, values = rows[np.isfinite(values)], values[np.isfinite(values)]
    starts, _, owners = _segments(np.bincount(rows, minlength=len(result)))
    if len(owners):
        result[owners] = (np.maximum if how == "max" else np.add).reduceat(values, starts)
    return result


def nested_recency(array: pa.Array | pa.ChunkedArray, now: Floats) -> dict[str, Floats]:
    """Days from the newest and from the oldest time in each row to the row's own time.

    Args:
        array: nested column of unix seconds or timestamps [N].
        now: each row's own time, unix seconds [N].

    Returns:
        "days_ago" (newest) and "oldest_days_ago", float64 [N]; NaN where the row holds no time.
    """
    bounds = nested_statistics(array, ("min", "max"))
    return {"days_ago": (now - bounds["max"]) / 86400.0, "oldest_days_ago": (now - bounds["min"]) / 86400.0}


def _extents(array: pa.Array) -> tuple[Ints, Ints]:
    """Where each row's entries begin in `array.values`, and how many there are."""
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        width = kind.list_size
        return (np.arange(len(array), dtype=np.int64) + array.offset) * width, np.full(len(array), width, np.int64)
    offsets = np.asarray(array.offsets).astype(np.int64)
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return offsets, np.asarray(array.sizes).astype(np.int64)
    return offsets[:-1], np.diff(offsets)


def _keys_and_values(child: pa.Array) -> tuple[pa.Array | None, pa.Array]:
    if not pa.types.is_struct(child.type):
        return None, child
    # flatten, unlike field, honours the struct's own offset and nulls.
    fields = child.flatten()
    if not fields:
        return None, pa.nulls(len(child))
    if len(fields) == 1:
        return None, fields[0]
    key, value = fields[:2]
    # (count, hash) as well as (hash, count): text is the key, wherever it stands.
    return (value, key) if is_text(value.type) and not is_text(key.type) and not is_nested(key.type) else (key, value)


def _statistics(entries: Entries, statistics: Sequence[str]) -> dict[str, Floats]:
    result: dict[str, Floats] = {}
    if "count" in statistics:
        result["count"] = entries.lengths.astype(np.float64)
    if "distinct" in statistics:
        result["distinct"] = _distinct(entries)
    if any(name not in ("count", "distinct") for name in statistics):
        result |= _moments(entries, statistics)
    return {name: result[name] for name in statistics}


def _moments(entries: Entries, statistics: Sequence[str]) -> dict[str, Floats]:
    values = array_numbers(entries.values)
    all_lengths = entries.lengths
    finite = np.isfinite(values)
    if not finite.all():
        all_lengths, values = _keep(all_lengths, finite), values[finite]
    blank = np.where(entries.present, 0.0, np.nan)
    result: dict[str, Floats] = {}

    def put(found: dict[str, Floats], owners: Ints) -> None:
        for name, column in found.items():
            zero = name == "sum" and has_numbers(entries.values.type)
            result[name] = blank.copy() if zero else np.full(len(blank), np.nan)
            result[name][owners] = column

    own = [name for name in statistics if name in _OF_ALL]
    if own:
        put(*_folds(values, all_lengths, own))
    own = [name for name in statistics if name in _OF_POSITIVE]
    if own:
        positive = values > 0
        if not positive.all():
            all_lengths, values = _keep(all_lengths, positive), values[positive]
        put(*_folds(values, all_lengths, own))
    return result


def _folds(values: Floats, row_lengths: Ints, names: Sequence[str]) -> tuple[dict[str, Floats], Ints]:
    """Statistics of the rows that have values, and these rows; short rows all at once, place by place."""
    starts, lengths, owners = _segments(row_lengths)
    short = lengths <= _SHORT
    order = np.argsort(_SHORT - lengths[short].astype(np.uint8), kind="stable")
    found = _by_place(values, starts[short][order], lengths[short][order], names)
    rows = owners[short][order]
    if short.all():
        return found, rows
    long = ~short
    more = _by_row(values[np.repeat(long, lengths)], lengths[long], names)
    return {name: np.concatenate([found[name], more[name]]) for name in names}, np.concatenate([rows, owners[long]])


def _by_place(values: Floats, starts: Ints, lengths: Ints, names: Sequence[str]) -> dict[str, Floats]:
    """Of rows in order of falling length: those that have a value at a place are always the first so many."""
    reach = [int(n) for n in np.searchsorted(-lengths, -np.arange(lengths.max(initial=0)), side="left")]
    entries = [values[starts[:n] + place] for place, n in enumerate(reach)]

    def fold(operation: np.ufunc, columns: Iterable[Floats], start: float) -> Floats:
        result = np.full(len(lengths), start)
        for column in columns:
            operation(result[: len(column)], column, out=result[: len(column)])
        return result

    total = fold(np.add, entries, 0.0)
    mean = total / np.maximum(lengths, 1)
    result: dict[str, Floats] = {"sum": total, "mean": mean}
    if "std" in names:
        spread = fold(np.add, (np.square(e - mean[: len(e)]) for e in entries), 0.0)
        result["std"] = np.sqrt(spread / np.maximum(lengths, 1))
    if "min" in names:
        result["min"] = fold(np.minimum, entries, np.inf)
    if "max" in names:
        result["max"] = fold(np.maximum, entries, -np.inf)
    shares = [e / total[: len(e)] for e in entries] if set(names) & set(_OF_POSITIVE) else []
    if "entropy" in names:
        result["entropy"] = np.maximum(-fold(np.add, (_surprise(share) for share in shares), 0.0), 0.0)
    if "top1_share" in names:
        result["top1_share"] = fold(np.maximum, shares, 0.0)
    if "top3_share" in names:
        first, second, third = (np.zeros(len(lengths)) for _ in range(3))
        for share in shares:
            n = len(share)
            third[:n] = np.maximum(third[:n], np.minimum(second[:n], share))
            second[:n] = np.maximum(second[:n], np.minimum(first[:n], share))
            first[:n] = np.maximum(first[:n], share)
        result["top3_share"] = np.where(lengths <= 3, 1.0, np.minimum(first + second + third, 1.0))
    return {name: result[name] for name in names}


def _by_row(values: Floats, lengths: Ints, names: Sequence[str]) -> dict[str, Floats]:
    """Of rows longer than three values, one after another."""
    starts = np.cumsum(lengths) - lengths
    total = np.add.reduceat(values, starts)
    mean = total / lengths
    result: dict[str, Floats] = {"sum": total, "mean": mean}
    if "std" in names:
        result["std"] = np.sqrt(np.add.reduceat(np.square(values - np.repeat(mean, lengths)), starts) / lengths)
    if "min" in names:
        result["min"] = np.minimum.reduceat(values, starts)
    if "max" in names:
        result["max"] = np.maximum.reduceat(values, starts)
    if set(names) & set(_OF_POSITIVE):
        share = values / np.repeat(total, lengths)
        result["entropy"] = np.maximum(-np.add.reduceat(_surprise(share), starts), 0.0)
        result["top1_share"] = np.maximum.reduceat(share, starts)
        result["top3_share"] = _three_largest(share, starts, lengths)
    return {name: result[name] for name in names}


def _surprise(share: Floats) -> Floats:
    # A share that underflowed to 0 surprises nobody: 0 · log(tiny) = 0.
    return share * np.log(np.maximum(share, 5e-324))


def _three_largest(share: Floats, starts: Ints, lengths: Ints) -> Floats:
    """Sum of the three largest shares of each row, found by taking the largest away."""
    rest = share.copy()
    owner = np.repeat(np.arange(len(starts)), lengths)
    total = np.zeros(len(starts))
    for _ in range(3):
        top = np.maximum.reduceat(rest, starts)
        total += top
        where = np.flatnonzero(rest == top[owner])
        first = np.ones(len(where), dtype=bool)
        first[1:] = owner[where[1:]] != owner[where[:-1]]
        rest[where[first]] = -1.0
    return np.minimum(total, 1.0)


def _distinct(entries: Entries) -> Floats:
    held = entries.keys if entries.keys is not None else entries.values
    codes = pc.dictionary_encode(held, null_encoding="encode").indices
    code = np.asarray(codes).astype(np.int64)
    width = int(code.max(initial=0)) + 1
    pairs = np.unique(entries.rows * width + code)
    result = np.bincount(pairs // width, minlength=len(entries.present)).astype(np.float64)
    return np.where(entries.present, result, np.nan)


def _segments(lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """Of the rows that have entries: where they begin, how many there are, and the rows themselves."""
    owners = np.flatnonzero(lengths)
    own = lengths[owners]
    return np.cumsum(own) - own, own, owners


def _keep(lengths: Ints, kept: Bools) -> Ints:
    """How many entries of each row are kept."""
    rows = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    return np.bincount(rows[kept], minlength=len(lengths)).astype(np.int64)


def _has_offsets(kind: pa.DataType) -> bool:
    """Whether rows lie one after another in the child."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind)
