"""The published log of 84 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltv_stack import Schema, smadex_features, smadex_schema


def schema(days: Mapping[str, int]) -> Schema:
    """Return the declared columns; `days` is horizon -> days."""
    return smadex_schema(horizons=tuple(days), d1_revenue="iap_revenue_d1")


def features() -> dict[str, Any]:
    """Return the full feature catalogue."""
    return smadex_features()
