"""Features of time: gaps, hours, weekdays, seasons, recency."""

from __future__ import annotations

from typing import Any

import numpy as np

from seqdata.jagged import Jagged
from seqdata.times import parse_moment

DAY = 86_400


def time_features(jagged: Jagged, cutoff: Any = None, buckets: int = 128) -> dict[str, np.ndarray]:
    """Features of the timestamps of a numpy Jagged, in UTC.

    Args:
        jagged: with "timestamp", int64 seconds [T]
        cutoff: moment that recency counts from
        buckets: number of log buckets, the last one open; their scale is that of `log_bucket`

    Returns:
        [T] each: gap_bucket, log bucket of the seconds since the sequence's previous event, 0 for its first; hour
        0..23, weekday 0..6 (Monday is 0), month 0..11; with a cutoff recency_bucket, log bucket of the seconds from the
        event to it; all int32; and season, the place in the year from 0 to 1, float32
    """
    seconds, offsets = jagged["timestamp"], jagged.offsets
    gaps = np.diff(seconds, prepend=seconds[:1])
    gaps[offsets[:-1][jagged.lengths > 0]] = 0
    days = seconds // DAY
    dates = days.astype("datetime64[D]")
    year = dates.astype("datetime64[Y]")
    features = {
        "gap_bucket": log_bucket(gaps, buckets),
        "hour": (seconds % DAY // 3600).astype(np.int32),
        # the epoch was a Thursday
        "weekday": ((days + 3) % 7).astype(np.int32),
        "month": (dates.astype("datetime64[M]") - year.astype("datetime64[M]")).astype(np.int32),
        "season": ((dates - year.astype("datetime64[D]")).astype(np.int64) / 366).astype(np.float32),
    }
    if cutoff is not None:
        first, last = (int(one) * 1_000_000 for one in (seconds.min(), seconds.max())) if len(seconds) else (0, 0)
        now = parse_moment(cutoff, "cutoff", first, last) // 1_000_000
        features["recency_bucket"] = log_bucket(now - seconds, buckets)
    return features


def log_bucket(seconds: np.ndarray, buckets: int = 128) -> np.ndarray:
    """int32 floor(ln(max(|seconds|, 1)) / 0.301), below `buckets`: the time buckets of the published HSTU.

    Args:
        seconds: whole seconds of any sign, any shape
        buckets: how many, the last one open

    Returns:
        Buckets in the shape of `seconds`, 0..buckets - 1
    """
    return np.minimum(np.log(np.maximum(np.abs(seconds), 1)) / 0.301, buckets - 1).astype(np.int32)
