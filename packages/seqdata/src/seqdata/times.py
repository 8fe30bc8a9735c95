"""Times of any spelling to int64 microseconds UTC."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata.fields import is_text

MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
UTC = ("UTC", "utc", "GMT", "Etc/UTC", "Z", "+00:00")
UTC_ENDING = r"(?i)(z|[+-]00:?00|\s?utc|\s?gmt)$"
ZONE = r"(?i)(z|[+-]\d\d:?\d\d|\s?utc|\s?gmt)$"


class TimeParser:
    """Parses the batches of one table; remembers whether its times carry a zone, so that a mix is refused.

    unit: unit of integer times, "s", "ms", "us" or "ns"; integers without it are refused.
    format: strptime format of texts (or of integers such as 20060410).
    """

    def __init__(self, column: str, unit: str | None = None, format: str | None = None) -> None:
        if unit is not None and unit not in (*MICROSECONDS, "ns"):
            raise ValueError(f"time_unit={unit!r}: needs 's', 'ms', 'us' or 'ns'")
        self.column, self.unit, self.format = column, unit, format
        # "text" and "bare" (typed) without a zone, "utc" and "zone" (any other) with one; None: nothing that says
        self.zone: str | None = None
        self.zoned: bool | None = None

    def parse(self, values: pa.Array, first_row: int, where: str) -> np.ndarray:
        """int64 microseconds [n] of an array of times; `first_row` and `where` only serve the error messages.

        Args:
            values: timestamps, dates, text or whole numbers [n]
            first_row: row of the log that the first value stands in
            where: what the table is called

        Raises:
            ValueError: a time is missing or does not parse, or the type is none of these; names column, row and value
        """
        if values.null_count:
            row = first_row + int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
            raise ValueError(
                f"time column {self.column!r} of {where}: {values.null_count} null value(s), the first at row {row};"
                " every event needs a time"
            )
        if pa.types.is_dictionary(values.type):
            known = self.parse_distinct(values.dictionary, values.indices, first_row, where)
            return known[values.indices.to_numpy(zero_copy_only=False)]
        kind = values.type
        if self.format is not None or is_text(kind):
            coded = values.cast(pa.string()).dictionary_encode()
            known = self.parse_distinct(coded.dictionary, coded.indices, first_row, where)
            return known[coded.indices.to_numpy()]
        if pa.types.is_timestamp(kind):
            self.zone = "bare" if kind.tz is None else "utc" if kind.tz in UTC else "zone"
            ticks = values.cast(pa.int64()).to_numpy()
            return _scale(ticks, kind.unit, self.column, where)
        if pa.types.is_date(kind):
            return values.cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
        if pa.types.is_floating(kind):
            try:
                values = values.cast(pa.int64())
            except pa.ArrowInvalid:
                raise ValueError(
                    f"time column {self.column!r} of {where}: holds fractions ({kind}); needs timestamps, text or whole"
                    " numbers"
                ) from None
            kind = values.type
        if pa.types.is_integer(kind):
            if self.unit is None:
                raise ValueError(
                    f"time column {self.column!r} of {where} holds integers ({kind}): say what they count with"
                    " time_unit='s', 'ms', 'us' or 'ns', or time_format='%Y%m%d'"
                )
            try:
                ticks = values.cast(pa.int64()).to_numpy()
            except pa.ArrowInvalid as error:
                raise ValueError(f"time column {self.column!r} of {where}: {error}") from None
            return _scale(ticks, self.unit, self.column, where)
        raise ValueError(
            f"time column {self.column!r} of {where} has type {kind}; needs timestamps, dates, text or integers with"
            " time_unit="
        )

    def parse_distinct(self, texts: pa.Array, codes: pa.Array, first_row: int, where: str) -> np.ndarray:
        """int64 microseconds of distinct values; `codes` finds the row of a value that does not parse.

        Args:
            texts: distinct values [k]
            codes: which of them each row has [n]
            first_row: row of the log that the first code stands in
            where: what the table is called

        Raises:
            ValueError: a value does not parse; names column, row and value
        """
        texts = texts.cast(pa.string())
        if self.format is None and self.unit is not None:
            numbers, bad = _integers(texts)
            known = _scale(numbers, self.unit, self.column, where)
            need = f"whole numbers in unit {self.unit!r}"
        elif self.format is not None:
            known, bad = _strptime(texts, self.format)
            need = f"text in the format {self.format!r}"
        else:
            known, bad = self._iso(texts, where)
            need = (
                "ISO text such as '2022-06-23 14:05:00' or '2022-06-23T14:05:00Z' (or name time_format= / time_unit=)"
            )
        if bad.any():
            rows = bad[codes.to_numpy(zero_copy_only=False)]
            if rows.any():
                at = int(np.argmax(rows))
                value = texts[int(codes[at].as_py())].as_py()
                raise ValueError(
                    f"time column {self.column!r} of {where}: {int(rows.sum())} value(s) do not parse, the first"
                    f" {value!r} at row {first_row + at}; needs {need}"
                )
        return known

    def _iso(self, texts: pa.Array, where: str) -> tuple[np.ndarray, np.ndarray]:
        if self.zoned is not True:
            # the common case, texts without a zone, needs no look at each of them
            try:
                known = texts.cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
                if len(texts):
                    self.zone, self.zoned = "text", False
                return known, np.zeros(len(texts), bool)
            except pa.ArrowInvalid:
                pass
        texts = pc.utf8_trim_whitespace(texts)
        zoned = pc.and_(pc.match_substring_regex(texts, ZONE), pc.greater(pc.utf8_length(texts), 10)).to_numpy(
            zero_copy_only=False
        )
        zoned = zoned.astype(bool)
        if len(zoned):
            if zoned.any() != zoned.all() or (self.zoned is not None and self.zoned != zoned[0]):
                with_zone = texts[int(np.argmax(zoned))].as_py() if zoned.any() else "earlier rows"
                without = texts[int(np.argmin(zoned))].as_py() if not zoned.all() else "earlier rows"
                raise ValueError(
                    f"time column {self.column!r} of {where} mixes values with a zone ({with_zone!r}) and without one"
                    f" ({without!r}): make them all one kind, times without a zone are read as UTC"
                )
            self.zoned = bool(zoned[0])
            self.zone = self.zone or ("utc" if self.zoned else "text")
            if self.zoned and not pc.all(pc.match_substring_regex(texts, UTC_ENDING)).as_py():
                self.zone = "zone"
        if self.zoned:
            texts = pc.replace_substring_regex(texts, r"(?i)(z|\s?utc|\s?gmt)$", "+00:00")
            kind = pa.timestamp("us", "UTC")
        else:
            kind = pa.timestamp("us")
        return _cast_or_mark(texts, kind)


def parse_cutoff(value: object, name: str = "cutoff") -> int:
    """int64 microseconds UTC of a datetime, date, ISO string or integer microseconds; without a zone it is UTC.

    Args:
        value: the moment
        name: of the argument, for messages

    Raises:
        TypeError: something else
        ValueError: a text that is no ISO time
    """
    if isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: needs a datetime, an ISO string or integer microseconds")
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, np.datetime64):
        return int(value.astype("datetime64[us]").astype(np.int64))
    if isinstance(value, str):
        text = value.strip()
        if text.upper().endswith(("UTC", "GMT")):
            text = text[:-3].rstrip() + "+00:00"
        elif text.upper().endswith("Z"):
            text = text[:-1] + "+00:00"
        try:
            value = dt.datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"{name}={value!r}: needs an ISO time such as '2022-06-23 14:05:00'") from None
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime(value.year, value.month, value.day)
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            value = value.replace(tzinfo=dt.timezone.utc)
        return (value - dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)) // dt.timedelta(microseconds=1)
    raise TypeError(f"{name}={value!r}: needs a datetime, an ISO string or integer microseconds")


def parse_moment(value: object, name: str, first: int, last: int) -> int:
    """`parse_cutoff`, for events from `first` to `last`: integers that count seconds or milliseconds are refused.

    Integer moments are microseconds since 1970. One that lies before all events, but among them as seconds or
    milliseconds, as the timestamps of batches are, is a ValueError.

    Args:
        value: the moment
        name: of the argument, for messages
        first: int64 microseconds of the first event
        last: int64 microseconds of the last event

    Raises:
        TypeError: something else than a moment
        ValueError: a text that is no ISO time, or an integer in another unit
    """
    moment = parse_cutoff(value, name)
    if isinstance(value, int | np.integer) and moment < first:
        for unit in ("s", "ms"):
            if first <= moment * MICROSECONDS[unit] <= last:
                raise ValueError(
                    f"{name}={value!r}: integers are microseconds since 1970, which makes this {format_time(moment)},"
                    f" before the first event; as {unit} it is {format_time(moment * MICROSECONDS[unit])}: pass"
                    f" {value} * {MICROSECONDS[unit]:_} or a datetime"
                )
    return moment


def event_range(shards: Sequence[Mapping[str, int]]) -> tuple[int, int]:
    """First and last moment of the events of some shards, int64 microseconds."""
    return min(shard["time_min"] for shard in shards), max(shard["time_max"] for shard in shards)


def parse_span(value: object, name: str) -> int:
    """int64 microseconds of a timedelta or of integer microseconds; needs to be more than nothing.

    Args:
        value: the span
        name: of the argument, for messages

    Raises:
        ValueError: something else, or no time at all
    """
    span = value
    if isinstance(value, np.timedelta64):
        span = int(value.astype("timedelta64[us]").astype(np.int64))
    elif isinstance(value, dt.timedelta):
        span = value // dt.timedelta(microseconds=1)
    if isinstance(span, bool) or not isinstance(span, int | np.integer) or span <= 0:
        raise ValueError(f"{name}={value!r}: needs a timedelta or integer microseconds > 0")
    return int(span)


def format_time(microseconds: int) -> str:
    """ISO text of int64 microseconds UTC."""
    return str(np.datetime64(int(microseconds), "us")).removesuffix(".000000") + "Z"


def _scale(ticks: np.ndarray, unit: str, column: str, where: str) -> np.ndarray:
    if unit == "ns":
        return ticks // 1000
    factor = MICROSECONDS[unit]
    if factor > 1 and len(ticks):
        limit = np.iinfo(np.int64).max // factor
        low, high = int(ticks.min()), int(ticks.max())
        if high > limit or low < -limit:
            raise ValueError(
                f"time column {column!r} of {where}: {high if high > limit else low} {unit} is beyond what int64"
                " microseconds hold; is the unit right?"
            )
    return ticks * factor if factor > 1 else ticks


def _cast_or_mark(texts: pa.Array, kind: pa.DataType) -> tuple[np.ndarray, np.ndarray]:
    # digits behind the microseconds are cut off, as those of typed times are
    for shape in (lambda: texts, lambda: pc.replace_substring_regex(texts, r"(\.\d{6})\d{1,3}", r"\1")):
        try:
            return shape().cast(kind).cast(pa.int64()).to_numpy(), np.zeros(len(texts), bool)
        except pa.ArrowInvalid:
            continue
    return _one_by_one(texts, lambda piece: piece.cast(kind))


def _strptime(texts: pa.Array, format: str) -> tuple[np.ndarray, np.ndarray]:
    stamps = pc.strptime(texts, format=format, unit="us", error_is_null=True)
    bad = stamps.is_null().to_numpy(zero_copy_only=False)
    return pc.fill_null(stamps.cast(pa.int64()), 0).to_numpy(), bad


def _integers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    try:
        return texts.cast(pa.int64()).to_numpy(), np.zeros(len(texts), bool)
    except pa.ArrowInvalid:
        return _one_by_one(texts, lambda piece: piece.cast(pa.int64()))


def _one_by_one(texts: pa.Array, cast: Callable[[pa.Array], pa.Array]) -> tuple[np.ndarray, np.ndarray]:
    # only reached on the way to an error message, so a loop over distinct values is fine
    known, bad = np.zeros(len(texts), np.int64), np.zeros(len(texts), bool)
    for i in range(len(texts)):
        try:
            known[i] = cast(texts.slice(i, 1)).cast(pa.int64())[0].as_py()
        except pa.ArrowInvalid:
            bad[i] = True
    return known, bad
