"""Ten defects of the published code of this method; each test fails where the defect is present."""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ltv_stack import (
    Column,
    FeatureBuilder,
    Horizon,
    LTVConfig,
    LTVPipeline,
    Schema,
    from_table,
    histos,
    histos_weights,
    histus,
    open_partitions,
    predict_table,
)
from ltv_stack.cache import FeatureCache, build_cache
from ltv_stack.labels import Labels
from ltv_stack.stages import CLASSIFIER, parameters
from ltv_stack.training import Trainer

Config = Callable[..., LTVConfig]


def test_1_map_columns_are_read_not_zeroed() -> None:
    """Maps arrive from Arrow as lists of pairs; a parser that looks for dicts counts none of their entries."""
    rows = [[("a", 1.0), ("b", 3.0)], None, [("c", 5.0)]] * 50
    for kind in (pa.map_(pa.string(), pa.float64()), pa.list_(pa.struct([("k", pa.string()), ("v", pa.float64())]))):
        entries = rows if pa.types.is_map(kind) else [r and [{"k": k, "v": v} for k, v in r] for r in rows]
        table = pa.table({"m": pa.array(entries, kind)})
        builder = FeatureBuilder(Schema([Column("m")], [Horizon("d7", "y")], time=None, id=None)).fit(from_table(table))
        matrix = builder.transform(table.to_batches()[0])
        found = dict(zip(builder.names, np.nansum(matrix, axis=0), strict=True))
        assert found["m__count"] == 150 and found["m__sum"] == 9 * 50 and found["m__entropy"] > 0


def test_2_unix_seconds_are_seconds_and_recency_is_the_row_s_own() -> None:
    """Seconds read as nanoseconds put everyone 20,368 days ago; a fixed reference date shifts train against test."""
    hours = [datetime(2025, 10, 1), datetime(2025, 10, 8)]
    seconds = [(hour - datetime(1970, 1, 1)).total_seconds() - 3 * 86400 for hour in hours]
    table = pa.table({"datetime": pa.array(hours, pa.timestamp("us")), "last_buy": seconds})
    schema = Schema([Column("last_buy", kind="unix_seconds")], [Horizon("d7", "y")], id=None)
    builder = FeatureBuilder(schema, {"recency": {"half_life_days": 3}}).fit(from_table(table))
    found = builder.transform(table.to_batches()[0])
    np.testing.assert_array_equal(found[:, builder.names.index("last_buy__days_ago")], [3, 3])
    # After one half-life a half is left, not 1/e.
    np.testing.assert_allclose(found[:, builder.names.index("last_buy__decay")], [0.5, 0.5])


def test_3_oversampling_looks_at_the_amount_and_is_not_a_no_op(
    world: Path, schema: Schema, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the 0/1 flag all percentile edges collapse into one bin and nothing is resampled."""
    amount = open_partitions(world).read(["revenue_d7"])["revenue_d7"].to_numpy()
    assert len(histos(amount)) > len(amount)
    weights = histos_weights(amount)
    assert weights[amount > 20].mean() > 1.5 * weights[amount == 0].mean()
    given: list[np.ndarray] = []
    monkeypatch.setattr("ltv_stack.training.histos", lambda y, seed: given.append(y) or histos(y, seed=seed))
    pipe = LTVPipeline(schema, config(sampling="histos")).fit(open_partitions(world))
    assert len(np.unique(given[0])) > 100
    assert pipe.models.class_weights[0] > 1.2 * pipe.models.class_weights[1]


def test_4_undersampling_keeps_the_largest_payer_and_thins_the_common() -> None:
    """Half-open bins drop every row equal to max(y), and percentile bins trim almost nothing else."""
    amounts = np.concatenate([np.full(600, 1.0), np.random.default_rng(0).lognormal(1, 1, 45), [5000.0]])
    for seed in range(20):
        kept = amounts[histus(amounts, seed=seed)]
        assert kept.max() == 5000.0
        assert len(kept) < 0.6 * len(amounts)


def test_5_the_stack_learns_from_out_of_fold_predictions_only(world: Path, schema: Schema, config: Config) -> None:
    """A row's own label must not move its own meta-features; in-sample predictions of stages 1 and 2 do move."""
    data = open_partitions(world, max_partitions=6)
    table = data.read()
    pipe = LTVPipeline(schema, config(model="two_stage")).fit(from_table(table))
    other = table.set_column(
        table.column_names.index("buyer_d7"), "buyer_d7", pa.array(_flip(table["buyer_d7"].to_numpy(), slice(0, 1500)))
    )

    def out_of_fold(source: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        columns = ["revenue_d1", "revenue_d7", "revenue_d14", "buyer_d7"]
        cache = build_cache(pipe.builder, from_table(source), folder / "features", label_columns=columns)
        settings, _ = parameters(CLASSIFIER, dict(pipe.config.buyer_classifier), 0, 1)
        rows = np.arange(cache.rows)
        labels = Labels.of(cache, schema.horizons, {})
        trainer = Trainer(pipe.config, cache, labels, pipe.horizons, pipe.main, pipe.builder.category_sizes)
        features, fold = trainer.out_of_fold(pipe.models, cache.dataset(rows, settings), rows, rows, settings)
        return features[:, 0], fold

    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (before, fold), (after, _) = out_of_fold(table), out_of_fold(other)
    # Labels changed in rows 0..1500 only, all of fold 0: its predictions stay, those of the other folds move.
    assert fold[:1500].max() == 0
    np.testing.assert_array_equal(before[fold == 0], after[fold == 0])
    assert np.abs(before[fold != 0] - after[fold != 0]).mean() > 0.01


def _flip(flag: np.ndarray, rows: slice) -> np.ndarray:
    flag = flag.copy()
    flag[rows] = 1 - flag[rows]
    return flag


def test_5_calibration_is_not_learnt_on_the_rows_that_are_reported(
    world: Path, schema: Schema, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds and calibration come from rows held out of the training window; evaluation rows are never fitted."""
    train = open_partitions(world, end="2025-10-01-08-00")
    fitted: list[np.ndarray] = []
    calibrated: list[np.ndarray] = []

    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, rows, *rest: fitted.append(rows) or fit(self, rows, *rest))

    class Watched(LTVPipeline):
        def _calibrate(self, cache: FeatureCache, labels: Labels, rows: np.ndarray, scores: dict, rates: dict) -> None:
            calibrated.append(rows)
            np.testing.assert_array_equal(scores["p"], self.models.scores_of(cache, rows)["p"])
            super()._calibrate(cache, labels, rows, scores, rates)

    pipe = Watched(schema, config(calibration="isotonic")).fit(train)
    assert not set(fitted[0]) & set(calibrated[0]) and len(calibrated[0]) > 1000
    state = pipe.outputs.to_json()
    predict_table(pipe, open_partitions(world, start="2025-10-01-09-00"))
    assert pipe.outputs.to_json() == state
    assert pipe.report_["training_rows"] + pipe.report_["held_out_rows"] == train.num_rows


def test_6_rows_are_held_out_by_time_with_an_embargo_and_probabilities_are_probabilities(
    world: Path, schema: Schema, config: Config
) -> None:
    """A random split looks across time; scores of a reweighted classifier are not probabilities."""
    data = open_partitions(world, end="2025-10-01-09-00")
    pipe = LTVPipeline(schema, config(embargo="1h", buyer_classifier={"n_estimators": 40, "scale_pos_weight": 8})).fit(
        data
    )
    assert pipe.report_["rows_in_embargo"] == 1000 and pipe.report_["training_rows"] == 7000
    later = open_partitions(world, start="2025-10-01-10-00")
    said = predict_table(pipe, later)["buyer_probability"].to_numpy().mean()
    true = later.read(["buyer_d7"])["buyer_d7"].to_numpy().mean()
    assert said == pytest.approx(true, rel=0.15)


def test_7_indicators_and_everything_else_are_frozen_at_fit_time(world: Path, schema: Schema, config: Config) -> None:
    """Indicators decided again on each chunk at inference make a prediction depend on its neighbours."""
    pipe = LTVPipeline(schema, config()).fit(open_partitions(world, end="2025-10-01-08-00"))
    batch = next(iter(open_partitions(world, start="2025-10-01-09-00")))
    # Chunks in which a column is never null, always null, or a single row.
    null = np.asarray(batch.column("spend").is_null())
    whole = pipe.predict_batch(batch)["revenue_d7"].to_numpy()
    for rows in (np.flatnonzero(null), np.flatnonzero(~null), np.array([5])):
        part = pipe.predict_batch(batch.take(pa.array(rows)))["revenue_d7"].to_numpy()
        assert part.tobytes() == whole[rows].tobytes()


def test_8_leaks_are_found_by_role_and_value_and_no_feature_sees_a_label(
    world: Path, schema: Schema, config: Config
) -> None:
    """A list of name patterns misses any other name; group statistics of the target are the target."""
    table = open_partitions(world, max_partitions=4).read()
    builder = FeatureBuilder(schema, config().features).fit(from_table(table))
    changed = table
    for name in schema.label_columns:
        at = table.column_names.index(name)
        changed = changed.set_column(at, name, pa.array(np.random.default_rng(0).permutation(table[name].to_numpy())))
    again = FeatureBuilder(schema, config().features).fit(from_table(changed))
    assert again.to_json() == builder.to_json()
    assert not set(builder.source.values()) & set(schema.label_columns)
    with pytest.raises(ValueError, match=r"local_distribution\.features: \['revenue_d7'\] are not features"):
        features = {"local_distribution": {"by": ["country"], "features": ["revenue_d7"]}}
        FeatureBuilder(schema, features).fit(from_table(table))
    named = schema.with_columns(Column("weekly_total", available_at=timedelta(days=7)))
    with pytest.raises(ValueError, match="weekly_total: declared_future"):
        LTVPipeline(named, config()).fit(from_table(table.append_column("weekly_total", table["revenue_d7"])))


@pytest.mark.parametrize("model", ["stack", "document", "log1p"])
def test_9_what_is_put_out_is_ordered_at_every_horizon(model: str, world: Path, schema: Schema, config: Config) -> None:
    """Order enforced inside stage 2 only is lost in the stacker, which puts out one horizon without the others."""
    settings = config(model=model, stacking_bases=["elastic_net", "random_forest"])
    pipe = LTVPipeline(schema, settings).fit(open_partitions(world, end="2025-10-01-08-00"))
    found = predict_table(pipe, open_partitions(world, start="2025-10-01-09-00"))
    amounts = np.column_stack([found[f"revenue_{h}"].to_numpy() for h in ("d1", "d7", "d14")])
    assert (np.diff(amounts, axis=1) >= 0).all()


def test_10_unknown_is_not_zero_and_text_is_not_dropped(world: Path, schema: Schema, config: Config) -> None:
    """NaN filled with 0 before the trees, and text columns left out, throw information away."""
    data = open_partitions(world, max_partitions=2)
    builder = FeatureBuilder(schema, config().features).fit(data)
    batch = next(iter(data))
    matrix = builder.transform(batch)
    null = np.asarray(batch.column("last_buy").is_null())
    days = matrix[:, builder.names.index("last_buy__days_ago")]
    assert np.isnan(days[null]).all() and np.isfinite(days[~null]).all()
    codes = matrix[:, builder.names.index("country__code")]
    assert len(np.unique(codes)) == 4 and "bundle__code" in builder.categorical
    pipe = LTVPipeline(schema, config()).fit(open_partitions(world))
    gain = pipe.importance().query("model == 'buyer'").set_index("feature")["gain"]
    assert gain["country__code"] > 0
