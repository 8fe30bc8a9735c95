"""What `ltv import` writes: one row a customer, at the end of the first days."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ltv_stack import Column, Horizon, Schema

NUMBERS = (
    "orders",
    "active_days",
    "repeat_days",
    "recency_days",
    "spend_per_repeat_day",
    "spend",
    "spend_per_order",
    "first_order",
    "largest_order",
    "last_order",
    "units",
    "lines",
    "returned",
    "mean_gap_days",
    "first_weekday",
    "first_hour",
)


def schema(days: Mapping[str, int]) -> Schema:
    """Return the declared columns; `days` is horizon -> days."""
    columns = [Column(name, kind="number") for name in NUMBERS]
    columns += [Column(name, kind="unix_seconds") for name in ("first_time", "last_time")]
    columns += [Column(name, kind="nested") for name in ("spend_by_day", "spend_by_item")]
    columns += [Column("country", kind="category"), Column("customer", role="id"), Column("datetime", role="time")]
    for name, number in days.items():
        known = timedelta(days=number)
        columns += [Column(f"{kind}_{name}", role="label", available_at=known) for kind in ("revenue", "buyer")]
    horizons = [Horizon(name, revenue=f"revenue_{name}", buyer=f"buyer_{name}") for name in days]
    return Schema(columns, horizons, time="datetime", id="customer", segments=("country",))


def features() -> dict[str, Any]:
    """Return the full feature catalogue."""
    groups = ("missing_indicators", "nested", "recency", "categorical", "temporal", "interactions", "behavioural")
    catalogue: dict[str, Any] = {group: {"enabled": True} for group in (*groups, "local_distribution")}
    catalogue["categorical"] |= {"min_count": 10}
    catalogue["interactions"]["terms"] = [
        {"name": "spend_per_unit", "op": "ratio", "left": "spend", "right": "units"},
        {"name": "largest_share", "op": "ratio", "left": "largest_order", "right": "spend"},
    ]
    catalogue["local_distribution"]["enabled"] = False
    return catalogue | {"exclude": []}
