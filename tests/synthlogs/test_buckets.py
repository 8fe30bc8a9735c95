"""Rows come back from their buckets in the order in which they were added, and the files go."""

import numpy as np

from synthlogs.buckets import Buckets
from synthlogs.text import uuids_of


def test_rows_come_back_by_bucket_in_order(tmp_path):
    kind = np.dtype([("x", "<i4"), ("y", "<f4")])
    rng = np.random.default_rng(0)
    bucket, x = rng.integers(0, 12, (2, 1000))
    with Buckets(tmp_path / "parts", kind) as buckets:
        for part in np.array_split(np.arange(1000), 7):
            buckets.add(bucket[part], {"x": x[part], "y": x[part] / 2})
        read = dict(buckets.read())
        assert list(read) == sorted(set(bucket.tolist()))
        for number, rows in read.items():
            assert rows["x"].tolist() == x[bucket == number].tolist()
            assert (rows["y"] * 2 == rows["x"]).all()
    assert not list(tmp_path.iterdir())


def test_ids_of_numbers_are_distinct_and_depend_on_the_seed():
    numbers = np.arange(20_000)
    ids = uuids_of(numbers, 0).to_pylist()
    assert len(set(ids)) == len(ids) and uuids_of(numbers[5:6], 0)[0].as_py() == ids[5]
    assert not set(ids) & set(uuids_of(numbers, 2**63 + 5).to_pylist())
