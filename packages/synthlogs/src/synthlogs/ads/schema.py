"""The 84 columns of the published advertising log: their types, their share of nulls and which of them are labels.

One file holds one part of one hour; the hour is the folder's name, ``datetime=YYYY-MM-DD-HH-MM``. Column names, kinds
and the share of nulls follow what was published about the log. Where only a group of columns was described ("about
twenty columns at 40-52 %"), the assignment to single columns is ours.
"""

from __future__ import annotations

import pyarrow as pa

HORIZONS = ("d1", "d7", "d14", "d28")
RETENTION = (
    "retention_d1_to_d7",
    "retention_d3_to_d7",
    "retention_d7_to_d14",
    "retention_d1",
    "retention_d3",
    "retentiond7",
)
LABELS = (
    *(f"buyer_{horizon}" for horizon in HORIZONS),
    *(f"buy_{horizon}" for horizon in HORIZONS[1:]),
    *(f"iap_revenue_{horizon}" for horizon in HORIZONS[1:]),
    "registration",
    *RETENTION,
)
STRINGS = (
    "row_id",
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
    "release_date",
    "last_advertiser_action",
)
INTEGERS = ("weekday",)
# Unix seconds, as floats because they may be null.
TIMES = ("first_request_ts", "last_buy", "last_ins")
FLOATS = (
    "release_msrp",
    "avg_act_days",
    "avg_days_ins",
    "weekend_ratio",
    "weeks_since_first_seen",
    "wifi_ratio",
    *TIMES,
)
LEVELS = ("bundle", "category", "category_bottom_taxonomy")
COUNT_MAPS = (
    *(f"num_buys_{level}" for level in LEVELS),
    "bcat",
    "bcat_bottom_taxonomy",
    "bundles_cat",
    "bundles_cat_bottom_taxonomy",
    "city_hist",
    "country_hist",
    "region_hist",
    "dev_language_hist",
    "dev_osv_hist",
)
TIME_MAPS = (
    "first_request_ts_bundle",
    "first_request_ts_category_bottom_taxonomy",
    "last_buy_ts_bundle",
    "last_buy_ts_category",
    "last_install_ts_bundle",
    "last_install_ts_category",
)
WHALE_MAPS = tuple(
    f"whale_users_bundle_{what}" for what in ("num_buys_prank", "revenue_prank", "total_num_buys", "total_revenue")
)
FLOAT_MAPS = (
    "cpm",
    "cpm_pct_rk",
    "ctr",
    "ctr_pct_rk",
    "hour_ratio",
    *(f"iap_revenue_usd_{level}" for level in LEVELS),
    "rev_by_adv",
    "rwd_prank",
    *WHALE_MAPS,
    "avg_daily_sessions",
    "avg_duration",
)
MAPS_OF_MAPS = ("user_actions_bundles_action_count", "user_actions_bundles_action_last_timestamp")
STRUCT_LISTS = ("advertiser_actions_action_count", "advertiser_actions_action_last_timestamp")
LISTS = ("bundles_ins", "new_bundles", "user_bundles", "user_bundles_l28d")

# Share of nulls. Columns that are not named have none.
NULLS: dict[str, float] = {
    **dict.fromkeys(("last_advertiser_action", *STRUCT_LISTS), 0.9879),
    "rev_by_adv": 0.9829,
    **dict.fromkeys(("last_buy_ts_bundle", "last_buy_ts_category"), 0.9817),
    **dict.fromkeys(("num_buys_bundle", "iap_revenue_usd_bundle"), 0.969),
    **dict.fromkeys(("num_buys_category", "iap_revenue_usd_category"), 0.964),
    **dict.fromkeys(("num_buys_category_bottom_taxonomy", "iap_revenue_usd_category_bottom_taxonomy"), 0.957),
    **dict.fromkeys(("last_buy", *WHALE_MAPS), 0.955),
    "rwd_prank": 0.853,
    "ctr": 0.76,
    "ctr_pct_rk": 0.76,
    "cpm": 0.747,
    "cpm_pct_rk": 0.74,
    **dict.fromkeys(MAPS_OF_MAPS, 0.735),
    "last_install_ts_bundle": 0.65,
    "last_install_ts_category": 0.64,
    "last_ins": 0.576,
    "new_bundles": 0.543,
    **dict.fromkeys(("avg_daily_sessions", "avg_duration"), 0.52),
    **dict.fromkeys(("first_request_ts_bundle", "first_request_ts_category_bottom_taxonomy"), 0.50),
    **dict.fromkeys(("bcat", "bcat_bottom_taxonomy", "bundles_cat", "bundles_cat_bottom_taxonomy"), 0.46),
    **dict.fromkeys(("user_bundles", "user_bundles_l28d", "bundles_ins"), 0.45),
    **dict.fromkeys(("avg_act_days", "avg_days_ins", "weekend_ratio", "hour_ratio"), 0.42),
    **dict.fromkeys(("city_hist", "country_hist", "region_hist", "dev_language_hist", "dev_osv_hist"), 0.40),
    **dict.fromkeys(("weeks_since_first_seen", "first_request_ts", "wifi_ratio", "carrier"), 0.10),
    **dict.fromkeys(("release_msrp", "release_date", "region", "dev_osv"), 0.07),
}


def label_types() -> dict[str, pa.DataType]:
    """Return the 17 labels and their types: money in USD as float64, counts as int64, flags as int32."""
    kinds = {"iap": pa.float64(), "buy": pa.int64()}
    return {name: kinds.get(name.split("_")[0], pa.int32()) for name in LABELS}


def feature_types() -> dict[str, pa.DataType]:
    """Return the 67 columns that are known when the prediction is asked for, and their types."""
    text, number, count = pa.string(), pa.float64(), pa.int64()
    types: dict[str, pa.DataType] = dict.fromkeys(STRINGS, text)
    types |= dict.fromkeys(INTEGERS, pa.int32()) | dict.fromkeys(FLOATS, number)
    types |= dict.fromkeys((*COUNT_MAPS, *TIME_MAPS), pa.map_(text, count)) | dict.fromkeys(
        FLOAT_MAPS, pa.map_(text, number)
    )
    types |= dict.fromkeys(MAPS_OF_MAPS, pa.map_(text, pa.map_(text, count)))
    types |= dict.fromkeys(STRUCT_LISTS, pa.list_(pa.struct([("action", text), ("value", count)])))
    return types | dict.fromkeys(LISTS, pa.list_(text))


def labelled_schema() -> pa.Schema:
    """Return the schema of a train file: all 84 columns."""
    return pa.schema({**feature_types(), **label_types()})


def unlabelled_schema() -> pa.Schema:
    """Return the schema of a test file: the 67 columns without the labels."""
    return pa.schema(feature_types())
