"""Time features against the standard library."""

from __future__ import annotations

import datetime as dt
import math

import numpy as np
import pytest

from seqdata import Jagged, log_bucket, time_features


def test_against_datetime():
    rng = np.random.default_rng(0)
    offsets = np.array([0, 3, 3, 4, 200])
    stamps = np.sort(rng.integers(0, 2_000_000_000, 200))
    features = time_features(Jagged({"timestamp": stamps}, offsets), "2034-01-01")
    firsts = {0, 3, 4}
    for i, stamp in enumerate(stamps.tolist()):
        when = dt.datetime.fromtimestamp(stamp, dt.timezone.utc)
        assert features["hour"][i] == when.hour
        assert features["weekday"][i] == when.weekday()
        assert features["month"][i] == when.month - 1
        assert features["season"][i] == pytest.approx((when.timetuple().tm_yday - 1) / 366)
        gap = 0 if i in firsts else stamp - stamps[i - 1]
        assert features["gap_bucket"][i] == math.floor(math.log(max(gap, 1)) / 0.301)
        ahead = dt.datetime(2034, 1, 1, tzinfo=dt.timezone.utc).timestamp() - stamp
        assert features["recency_bucket"][i] == math.floor(math.log(max(ahead, 1)) / 0.301)


def test_buckets():
    assert log_bucket(np.array([0, 1, 2, 86_400, -86_400, 2**60])).tolist() == [0, 0, 2, 37, 37, 127]
    assert log_bucket(np.array([10**9]), 8).tolist() == [7]
    assert "recency_bucket" not in time_features(Jagged({"timestamp": np.zeros(0, np.int64)}, np.zeros(2, np.int64)))
