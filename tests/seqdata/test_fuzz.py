"""The fuzzer of the read side holds for its first stores; `hatch run fuzz seqdata_read` goes on."""

from __future__ import annotations

from tests.fuzz import seqdata_read


def test_some_stores_equal_the_oracle():
    counts = seqdata_read.tries(seed=7, seconds=2)
    assert set(counts) == {"stores", "views", "batches", "pickles", "damaged files"}
    assert min(counts.values()) > 0
