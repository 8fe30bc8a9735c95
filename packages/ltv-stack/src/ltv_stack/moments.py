"""The moment of a row, and what it tells: months, hours and weekdays as numbers."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import Floats, as_text, column_numbers


def row_seconds(batch: pa.RecordBatch, time: str) -> Floats:
    """Each row's own time as unix seconds [N].

    Raises:
        ValueError: the column is not there or holds neither times nor numbers.
    """
    if time not in batch.schema.names:
        raise ValueError(f"time: the data has no column {time!r}; it has {batch.schema.names[:8]} ...")
    column = batch.column(time)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.timestamp("us"))
    return column_numbers(column)


def year_months(array: pa.Array) -> Floats:
    """Months since the year 0 of text that begins with YYYY-MM [N]; NaN where it does not."""
    text = as_text(array)
    parts = pc.extract_regex(text, r"^\s*(?P<y>\d{4})-(?P<m>\d{1,2})")
    year, month = (column_numbers(part) for part in parts.flatten())
    return year * 12 + month - 1


def months(now: Floats) -> Floats:
    """Months since the year 0 of unix seconds [N]."""
    moment = np.where(np.isnan(now), 0, now).astype("datetime64[s]").astype("datetime64[M]").astype(np.float64)
    return np.where(np.isnan(now), np.nan, moment + 1970 * 12)


def cycles(now: Floats) -> dict[str, Floats]:
    """Hour and weekday on circles, quarter of the day and weekend of unix seconds [N], in UTC."""
    hour = np.floor(now / 3600.0) % 24
    # 1970-01-01 was a Thursday; Monday is 0.
    weekday = (np.floor(now / 86400.0) + 3) % 7
    part = np.floor(hour / 6.0)
    return {
        "hour_sin": np.sin(2 * np.pi * hour / 24),
        "hour_cos": np.cos(2 * np.pi * hour / 24),
        "weekday_sin": np.sin(2 * np.pi * weekday / 7),
        "weekday_cos": np.cos(2 * np.pi * weekday / 7),
        "day_part": part,
        "is_weekend": np.where(np.isnan(weekday), np.nan, (weekday >= 5).astype(np.float64)),
    }
