from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest


def oracle_ids(values: pd.Series, fit: pd.Series, min_count: int = 1) -> np.ndarray:
    """Ids by the book: 0 null, 1 unknown, 2.. by falling count before the cutoff, ties by value."""
    counts = values[fit].dropna().value_counts()
    ranked = sorted((-n, value) for value, n in counts.items() if n >= min_count)
    ids = {value: i + 2 for i, (_, value) in enumerate(ranked)}
    return np.array([0 if pd.isna(v) else ids.get(v, 1) for v in values], np.int32)


def oracle_order(frame: pd.DataFrame, user: str, time: str) -> pd.DataFrame:
    """Rows by user, then time, then input order."""
    return frame.sort_values([user, time], kind="stable").reset_index(drop=True)


def random_log(seed: int = 0, rows: int = 3000, users: int = 100) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user": rng.integers(0, users, rows),
            "time": rng.integers(0, rows // 4, rows),
            "item": rng.zipf(1.4, rows) % 50,
            "brand": [None if k == 0 else f"b{k}" for k in rng.integers(0, 9, rows)],
            "price": rng.random(rows),
            "row": np.arange(rows, dtype=np.float64),
        }
    )


@pytest.fixture
def oracle() -> SimpleNamespace:
    return SimpleNamespace(ids=oracle_ids, order=oracle_order, log=random_log)
