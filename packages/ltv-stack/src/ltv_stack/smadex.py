"""The 84 columns of the mobile-advertising revenue data the method comes from, and the feature groups for them."""

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from .schema import Column, Horizon, Schema

_LABEL_DAYS = {
    "buyer_d1": 1,
    "buyer_d7": 7,
    "buyer_d14": 14,
    "buyer_d28": 28,
    "buy_d7": 7,
    "buy_d14": 14,
    "buy_d28": 28,
    "iap_revenue_d7": 7,
    "iap_revenue_d14": 14,
    "iap_revenue_d28": 28,
    "registration": 28,
    "retention_d1_to_d7": 7,
    "retention_d3_to_d7": 7,
    "retention_d7_to_d14": 14,
    "retention_d1": 1,
    "retention_d3": 3,
    "retentiond7": 7,
}
_CATEGORIES = (
    "advertiser_bundle",
    "advertiser_category",
    "advertiser_subcategory",
    "advertiser_bottom_taxonomy_level",
    "carrier",
    "country",
    "region",
    "dev_make",
    "dev_model",
    "dev_os",
    "dev_osv",
    "hour",
    "last_advertiser_action",
)
_NUMBERS = (
    "release_msrp",
    "weekday",
    "avg_act_days",
    "avg_days_ins",
    "weekend_ratio",
    "weeks_since_first_seen",
    "wifi_ratio",
)
_TIMES = ("first_request_ts", "last_buy", "last_ins")
_BUNDLE, _CATEGORY, _TAXONOMY = "advertiser_bundle", "advertiser_category", "advertiser_bottom_taxonomy_level"
# Nested columns and the scalar column whose value may be one of their keys.
_NESTED: dict[str, tuple[str, ...]] = {
    "cpm": (),
    "cpm_pct_rk": (),
    "ctr": (),
    "ctr_pct_rk": (),
    "hour_ratio": ("hour",),
    "iap_revenue_usd_bundle": (_BUNDLE,),
    "iap_revenue_usd_category": (_CATEGORY,),
    "iap_revenue_usd_category_bottom_taxonomy": (_TAXONOMY,),
    "num_buys_bundle": (_BUNDLE,),
    "num_buys_category": (_CATEGORY,),
    "num_buys_category_bottom_taxonomy": (_TAXONOMY,),
    "rev_by_adv": (_BUNDLE,),
    "rwd_prank": (),
    "whale_users_bundle_num_buys_prank": (_BUNDLE,),
    "whale_users_bundle_revenue_prank": (_BUNDLE,),
    "whale_users_bundle_total_num_buys": (_BUNDLE,),
    "whale_users_bundle_total_revenue": (_BUNDLE,),
    "avg_daily_sessions": (_BUNDLE,),
    "avg_duration": (_BUNDLE,),
    "bcat": (_CATEGORY,),
    "bcat_bottom_taxonomy": (_TAXONOMY,),
    "bundles_cat": (_CATEGORY,),
    "bundles_cat_bottom_taxonomy": (_TAXONOMY,),
    "city_hist": (),
    "country_hist": ("country",),
    "region_hist": ("region",),
    "dev_language_hist": (),
    "dev_osv_hist": ("dev_osv",),
    "user_actions_bundles_action_count": (_BUNDLE,),
    "advertiser_actions_action_count": (_BUNDLE,),
}
_NESTED_TIMES: dict[str, tuple[str, ...]] = {
    "first_request_ts_bundle": (_BUNDLE,),
    "first_request_ts_category_bottom_taxonomy": (_TAXONOMY,),
    "last_buy_ts_bundle": (_BUNDLE,),
    "last_buy_ts_category": (_CATEGORY,),
    "last_install_ts_bundle": (_BUNDLE,),
    "last_install_ts_category": (_CATEGORY,),
    "user_actions_bundles_action_last_timestamp": (_BUNDLE,),
    "advertiser_actions_action_last_timestamp": (_BUNDLE,),
}
_SETS = ("bundles_ins", "new_bundles", "user_bundles", "user_bundles_l28d")


def smadex_schema(horizons: Sequence[str] = ("d1", "d7", "d14", "d28"), d1_revenue: str | None = None) -> Schema:
    """Roles, kinds and times of availability of the 84 columns.

    Args:
        horizons: d and a number of days each, shortest first. Their labels are iap_revenue_<h> and buyer_<h>, which the
            data may lack.
        d1_revenue: the column of day-1 amounts where the data has one; the published data has only the flag.

    Returns:
        the schema of these columns.

    Raises:
        ValueError: a horizon has another form; named.
    """
    wrong = [name for name in horizons if not re.fullmatch(r"d[1-9]\d*", name)]
    if wrong:
        raise ValueError(f"horizons: got {wrong}, needs d and a number of days each, e.g. d7")
    listed = [
        Horizon(name, d1_revenue if name == "d1" else f"iap_revenue_{name}", f"buyer_{name}") for name in horizons
    ]
    days = {label: int(h.name[1:]) for h in listed for label in (h.revenue, h.buyer) if label}
    columns = [Column("row_id", role="id"), Column("datetime", role="time")]
    columns += [
        Column(name, role="label", kind="number", available_at=timedelta(days=days))
        for name, days in (days | _LABEL_DAYS).items()
    ]
    columns += [Column(name, kind="category") for name in _CATEGORIES]
    columns += [Column("release_date", kind="year_month")]
    columns += [Column(name, kind="number") for name in _NUMBERS]
    columns += [Column(name, kind="unix_seconds") for name in _TIMES]
    columns += [Column(name, kind="nested", lookup=keys) for name, keys in _NESTED.items()]
    columns += [Column(name, kind="nested_time", lookup=keys) for name, keys in _NESTED_TIMES.items()]
    columns += [Column(name, kind="set", lookup=(_BUNDLE,)) for name in _SETS]
    return Schema(columns, listed, "datetime", "row_id", ("country", "dev_os", "advertiser_category"))


def smadex_features() -> dict[str, Any]:
    """The feature groups for `smadex_schema`, in the shape of a `features.yaml`."""
    interactions = [
        ("whale_sessions", "product", "whale_users_bundle_total_revenue__sum", "avg_daily_sessions__sum"),
        ("purchase_recency", "product", "num_buys_bundle__sum", "last_buy__decay"),
        ("install_velocity", "ratio", "new_bundles__count", "weeks_since_first_seen"),
        ("average_purchase", "ratio", "iap_revenue_usd_bundle__sum", "num_buys_bundle__sum"),
        ("device_price_spend", "ratio", "iap_revenue_usd_bundle__sum", "release_msrp"),
        ("whale_spend", "product", "whale_users_bundle_revenue_prank__max", "iap_revenue_usd_bundle__max"),
    ]
    behavioural = [
        ("engagement", "product", "avg_daily_sessions__sum", "avg_duration__mean"),
        ("session_consistency", "ratio", "avg_daily_sessions__mean", "avg_daily_sessions__std"),
        ("wifi_engagement", "product", "wifi_ratio", "avg_daily_sessions__sum"),
        ("active_share", "ratio", "avg_act_days", "weeks_since_first_seen"),
    ]
    return {
        "missing_indicators": {"enabled": True},
        "nested": {
            "enabled": True,
            "statistics": ["count", "sum", "mean", "std", "min", "max", "top1_share", "top3_share", "entropy"],
            "lookups": True,
        },
        "recency": {"enabled": True, "half_life_days": 30},
        "categorical": {"enabled": True, "min_count": 20, "max_size": 254, "frequency": True},
        "temporal": {"enabled": True},
        "interactions": {"enabled": True, "terms": [_term(*one) for one in interactions]},
        "behavioural": {"enabled": True, "terms": [_term(*one) for one in behavioural]},
        "local_distribution": {
            "enabled": True,
            "by": ["country", "dev_os", "advertiser_category"],
            "features": ["release_msrp", "iap_revenue_usd_bundle__sum", "avg_daily_sessions__sum", "avg_act_days"],
            "min_rows": 200,
        },
        "exclude": [],
    }


def _term(name: str, op: str, left: str, right: str) -> dict[str, str]:
    return {"name": name, "op": op, "left": left, "right": right}
