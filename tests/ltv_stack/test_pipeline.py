"""The pipeline: streams, the same result for every chunk size, ordered outputs, honest errors."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltv_stack import (
    Column,
    Dataset,
    Horizon,
    LTVConfig,
    LTVPipeline,
    Schema,
    evaluate,
    from_table,
    open_partitions,
    predict_table,
    project_order,
)

Config = Callable[..., LTVConfig]


@pytest.fixture(scope="module")
def train(world: Path) -> Dataset:
    return open_partitions(world, end="2025-10-01-08-00", chunk_size=700)


@pytest.fixture(scope="module")
def later(world: Path) -> Dataset:
    return open_partitions(world, start="2025-10-01-09-00")


@pytest.fixture(scope="module")
def fitted(train: Dataset, schema: Schema, config: Config) -> LTVPipeline:
    return LTVPipeline(schema, config(quantiles=[0.5, 0.9])).fit(train)


def values(table: pa.Table, pattern: str, horizons: tuple[str, ...] = ("d1", "d7", "d14")) -> np.ndarray:
    return np.column_stack([table[pattern.format(h)].to_numpy() for h in horizons])


MODELS = ["log1p", "tweedie", "two_stage", "document", "stack"]


@pytest.mark.parametrize("model", MODELS)
def test_every_output_is_ordered_and_bit_equal_for_every_chunk_size_after_a_round_trip(
    model: str, train: Dataset, later: Dataset, schema: Schema, config: Config, tmp_path: Path
) -> None:
    pytest.importorskip("xgboost") if model == "stack" else None
    settings = config(model=model, quantiles=[0.5, 0.9], calibration="bucket", calibrate_by="country")
    pipe = LTVPipeline(schema, settings).fit(train)
    whole = predict_table(pipe, later.with_options(chunk_size=None))
    for pattern in (
        "revenue_{}",
        "revenue_{}_lo",
        "revenue_{}_hi",
        "revenue_{}_buyer_hi",
        "revenue_{}_q50",
        "revenue_{}_q90",
    ):
        found = values(whole, pattern)
        assert np.isfinite(found).all() and (found >= 0).all()
        assert (np.diff(found, axis=1) >= 0).all(), pattern
    assert (values(whole, "revenue_{}_q50") <= values(whole, "revenue_{}_q90")).all()
    assert (values(whole, "revenue_{}_lo") <= values(whole, "revenue_{}_hi")).all()
    loaded = LTVPipeline.load(pipe.save(tmp_path / "model"))
    for chunk in (1000, 50_000, 333):
        batches = list(loaded.predict(later.with_options(chunk_size=chunk)))
        again = pa.Table.from_batches(batches)
        assert again.equals(whole.cast(again.schema))
        for name in pipe.output_columns:
            assert again[name].to_numpy().tobytes() == whole[name].to_numpy().tobytes(), (chunk, name)
    one = next(iter(later.with_options(chunk_size=1)))
    assert loaded.predict_batch(one).column("revenue_d7")[0] == whole["revenue_d7"][0]


def test_the_fit_does_not_depend_on_the_chunk_size(
    world: Path, fitted: LTVPipeline, schema: Schema, later: Dataset
) -> None:
    data = open_partitions(world, end="2025-10-01-08-00", chunk_size=None)
    again = LTVPipeline(schema, fitted.config).fit(data)
    assert predict_table(again, later).equals(predict_table(fitted, later))


def test_predictions_are_better_than_chance_and_the_constant(fitted: LTVPipeline, later: Dataset) -> None:
    found = evaluate(fitted, later)
    assert found.metrics["buyer"]["auc"] > 0.72
    for horizon in fitted.horizons:
        truth = found.predictions[f"true_{horizon}"].to_numpy()
        constant = np.var(np.log1p(truth))
        assert found.metrics[horizon]["msle"] < 0.95 * constant
        assert 0.86 <= found.coverage[horizon]["informative"] <= 0.94
        assert found.coverage[f"{horizon}:buyer"]["overall"] > 0.85


def test_projection_does_not_raise_the_summed_error_of_the_raw_model(fitted: LTVPipeline, later: Dataset) -> None:
    batch = later.read().combine_chunks().to_batches()[0]
    scores = fitted.models.scores(fitted.builder.transform(batch))
    raw = np.column_stack([np.expm1(scores[f"s_{h}"]) for h in fitted.horizons])
    truth = np.column_stack([batch.column(f"revenue_{h}").to_numpy() for h in fitted.horizons])
    error = [((np.log1p(x) - np.log1p(truth)) ** 2).sum(axis=1) for x in (raw, project_order(raw))]
    assert (np.diff(raw, axis=1) < 0).any()
    assert (error[1] <= error[0] + 1e-12).all()


@pytest.mark.parametrize("model", ["log1p", "tweedie", "two_stage", "stack"])
def test_the_mean_estimand_adds_up_and_the_log_estimand_does_not(
    model: str, train: Dataset, later: Dataset, schema: Schema, config: Config
) -> None:
    bases = ["elastic_net", "random_forest"]
    mean = evaluate(LTVPipeline(schema, config(model=model, estimand="mean", stacking_bases=bases)).fit(train), later)
    log = evaluate(LTVPipeline(schema, config(model=model, estimand="log1p", stacking_bases=bases)).fit(train), later)
    for horizon in ("d7", "d14"):
        assert 0.8 < mean.metrics[horizon]["bias_ratio"] < 1.25
        assert log.metrics[horizon]["bias_ratio"] < 0.6
        assert log.metrics[horizon]["msle"] < mean.metrics[horizon]["msle"]


def test_median_and_quantile_estimands(train: Dataset, later: Dataset, schema: Schema, config: Config) -> None:
    for estimand, level in (("median", 0.5), ("quantile:0.95", 0.95)):
        found = predict_table(LTVPipeline(schema, config(estimand=estimand)).fit(train), later)
        truth = later.read(["revenue_d7"])["revenue_d7"].to_numpy()
        below = (truth <= found["revenue_d7"].to_numpy()).mean()
        assert below >= level - 0.02
        assert estimand == "median" or below <= 0.98


def test_a_horizon_without_amounts_is_skipped_with_a_log_line(
    train: Dataset, schema: Schema, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    first, *rest = schema.horizons
    flags = [Horizon("d0", None, "buyer_d7"), first, Horizon("d3", "revenue_d3"), *rest]
    wider = Schema(schema.columns, flags, schema.time, schema.id)
    with caplog.at_level(logging.INFO):
        pipe = LTVPipeline(wider, config()).fit(train)
    assert pipe.horizons == ["d1", "d7", "d14"]
    assert pipe.skipped_horizons == {
        "d0": "no column of amounts is declared",
        "d3": "the data has no column revenue_d3",
    }
    assert "horizon d0 skipped" in caplog.text and "horizon d3 skipped" in caplog.text


def test_horizons_out_of_order_are_refused(schema: Schema) -> None:
    with pytest.raises(ValueError, match="got d14, d7, d1, needs the shortest first"):
        Schema(schema.columns, schema.horizons[::-1], schema.time, schema.id)


def test_histus_is_undone_in_the_amounts(train: Dataset, later: Dataset, schema: Schema, config: Config) -> None:
    plain, drawn = (
        LTVPipeline(schema, config(model="two_stage", sampling=sampling)).fit(train) for sampling in ("none", "histus")
    )
    truth = np.log1p(later.read(["revenue_d7"])["revenue_d7"].to_numpy()).mean()
    means = [np.log1p(predict_table(one, later)["revenue_d7"].to_numpy()).mean() for one in (plain, drawn)]
    assert means[1] == pytest.approx(means[0], rel=0.1) and means[1] == pytest.approx(truth, rel=0.2)


def test_intervals_that_cannot_promise_their_level_are_left_out(
    train: Dataset, later: Dataset, schema: Schema, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    found = predict_table(LTVPipeline(schema, config(intervals=0.9999)).fit(train), later)
    assert "promise no level of 0.9999" in caplog.text
    assert not [name for name in found.column_names if name.endswith("_hi")]


def test_a_segment_that_a_partition_lacks_is_unknown_there(
    world: Path, schema: Schema, config: Config, tmp_path: Path
) -> None:
    shutil.copytree(world, tmp_path / "world")
    for file in sorted((tmp_path / "world").rglob("*.parquet"))[:3]:
        pq.write_table(pq.ParquetFile(file).read().drop_columns(["country"]), file)
    data = open_partitions(tmp_path / "world")
    with pytest.raises(ValueError, match="calibrate_by: the data has no column 'shoe_size'"):
        LTVPipeline(schema, config(calibration="isotonic", calibrate_by="shoe_size")).fit(data)
    pipe = LTVPipeline(schema, config(calibration="isotonic", calibrate_by="country")).fit(data)
    assert pipe.horizons == ["d1", "d7", "d14"]
    found = predict_table(pipe, data, keep=["country"])
    assert found.num_rows == data.num_rows and found["country"].slice(0, 1617).null_count == 1617
    assert evaluate(pipe, data).rows == data.num_rows
    nowhere = open_partitions(tmp_path / "world", max_partitions=1)
    for predict in (evaluate, predict_table):
        with pytest.raises(ValueError, match="calibrate_by: the data has no column 'country'"):
            predict(pipe, nowhere)


def test_a_type_that_does_not_fit_is_an_error_that_names_column_and_file(
    world: Path, fitted: LTVPipeline, schema: Schema, config: Config, tmp_path: Path
) -> None:
    def spoilt(column: str, values: list[object]) -> Dataset:
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(world, tmp_path)
        file = sorted(tmp_path.rglob("*.parquet"))[3]
        table = pq.ParquetFile(file).read()
        at = table.column_names.index(column)
        pq.write_table(table.set_column(at, column, pa.array(values * table.num_rows)), file)
        return open_partitions(tmp_path)

    file = r"datetime=2025-10-01-01-00/part-1\.parquet"
    for guard in ("strict", "off"):
        with pytest.raises(ValueError, match=rf"column spend in .*{file}: got Arrow type string, needs a map"):
            LTVPipeline(schema, config(guard=guard)).fit(spoilt("spend", ["x"]))
    with pytest.raises(ValueError, match=rf"column age: Arrow type string in .*{file}, but double in .*part-0"):
        LTVPipeline(schema, config()).fit(spoilt("age", ["young"]))
    for predict in (evaluate, predict_table):
        with pytest.raises(ValueError, match=rf"column country in .*{file}: got Arrow type list.*needs one value"):
            predict(fitted, spoilt("country", [["DE"]]))


def test_a_window_without_buyers_is_a_clear_error_and_predicts_without_one(
    world: Path, fitted: LTVPipeline, schema: Schema, config: Config
) -> None:
    table = open_partitions(world, max_partitions=3).read()
    for name in ("revenue_d1", "revenue_d7", "revenue_d14", "buyer_d7"):
        zeros = pa.array(np.zeros(table.num_rows))
        table = table.set_column(table.column_names.index(name), name, zeros)
    with pytest.raises(ValueError, match=r"no horizon can be trained .*d7: 0 of 2000 training rows have an amount"):
        LTVPipeline(schema, config()).fit(from_table(table))
    found = evaluate(fitted, from_table(table))
    assert np.isnan(found.metrics["buyer"]["auc"]) and np.isnan(found.metrics["d7"]["gini"])
    assert found.metrics["d7"]["msle"] > 0


def test_null_labels_are_left_out_and_counted(world: Path, schema: Schema, config: Config, fitted: LTVPipeline) -> None:
    table = open_partitions(world).read()
    hole = np.random.default_rng(0).random(table.num_rows) < 0.3
    column = pa.array(table["revenue_d14"].to_numpy(), mask=hole)
    table = table.set_column(table.column_names.index("revenue_d14"), "revenue_d14", column)
    found = evaluate(LTVPipeline(schema, config()).fit(from_table(table)), from_table(table))
    assert found.metrics["d14"]["rows"] == (~hole).sum()
    assert found.metrics["d7"]["rows"] == len(hole)
    assert found.metrics["d14"]["bias_ratio"] > 0.2


def test_unseen_categories_all_null_columns_and_missing_labels_predict(fitted: LTVPipeline, later: Dataset) -> None:
    table = later.read().drop_columns(["revenue_d1", "revenue_d7", "revenue_d14", "buyer_d7"])
    normal = predict_table(fitted, from_table(table))
    for name in ("spend", "last_buy", "noise", "country"):
        nulls = pa.nulls(table.num_rows, table[name].type)
        table = table.set_column(table.column_names.index(name), name, nulls)
    strange = pa.array(["never seen"] * table.num_rows)
    found = predict_table(fitted, from_table(table.set_column(table.column_names.index("bundle"), "bundle", strange)))
    assert found.num_rows == normal.num_rows
    assert np.isfinite(found["revenue_d7"].to_numpy()).all()
    with pytest.raises(ValueError, match="column 'noise' is missing"):
        predict_table(fitted, from_table(table.drop_columns(["noise"])))


def test_the_largest_payer_reaches_every_stage(
    world: Path, schema: Schema, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ltv_stack import stages

    table = open_partitions(world, max_partitions=6).read()
    y = table["revenue_d14"].to_numpy().copy()
    y[17] = 1e6
    table = table.set_column(table.column_names.index("revenue_d14"), "revenue_d14", pa.array(y))
    seen: list[float] = []
    train_in_memory = stages.train_in_memory

    def spy(matrix: np.ndarray, label: np.ndarray, *rest: object, **more: object) -> object:
        seen.append(float(label.max()))
        return train_in_memory(matrix, label, *rest, **more)

    monkeypatch.setattr(stages, "train_in_memory", spy)
    for sampling in ("none", "histus", "histus_weights", "histos+histus"):
        seen.clear()
        LTVPipeline(schema, config(sampling=sampling)).fit(from_table(table))
        assert max(seen) == pytest.approx(np.log1p(1e6)), sampling


@pytest.mark.parametrize("sampling", ["histos", "histos_weights", "histus", "histus_weights", "histos+histus"])
def test_sampling_is_undone_by_calibration(
    sampling: str, train: Dataset, later: Dataset, schema: Schema, config: Config
) -> None:
    found = evaluate(LTVPipeline(schema, config(sampling=sampling)).fit(train), later)
    buyer = found.metrics["buyer"]
    said = found.predictions["buyer_probability"].to_numpy().mean()
    assert said == pytest.approx(buyer["base_rate"], rel=0.12)
    assert buyer["auc"] > 0.72


def test_settings_of_the_samplers_reach_them(train: Dataset, schema: Schema, config: Config) -> None:
    plain = LTVPipeline(schema, config(sampling="histos_weights")).fit(train)
    strong = LTVPipeline(schema, config(sampling="histos_weights", histos={"max_over": 100, "alpha": 1.0})).fit(train)
    flat = LTVPipeline(schema, config(sampling="histos_weights", histos={"bins": 1})).fit(train)
    assert strong.models.class_weights[0] > 1.2 * plain.models.class_weights[0]
    # In a single bin all rows are equally common.
    assert flat.models.class_weights[0] == pytest.approx(flat.models.class_weights[1])
    weak, steep = (
        LTVPipeline(schema, config(model="two_stage", sampling="histus", histus={"beta": beta})).fit(train)
        for beta in (0.01, 3.0)
    )
    assert weak.models.amounts.boosters["d7"].model_to_string() != steep.models.amounts.boosters["d7"].model_to_string()
    with pytest.raises(ValueError, match="histus setting: got 'alpha', needs one of"):
        config(sampling="histus", histus={"alpha": 1.1})
    with pytest.raises(ValueError, match=r"alpha: got 0\.5, needs 1 or more"):
        config(sampling="histos", histos={"alpha": 0.5})
    with pytest.raises(ValueError, match=r"histos: got .* but sampling is 'none'"):
        config(histos={"alpha": 1.1})


def _term(left: str, right: str) -> dict:
    return {"interactions": {"terms": [{"name": "t", "op": "sum", "left": left, "right": right}]}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"buyer_classifier": {"n_leafs": 3}},
            "buyer_classifier: got 'n_leafs', which is no parameter of LightGBM; did you mean",
        ),
        ({"order_weights": {"d7": 0}}, "order_weights: got 0 for d7, needs a number above 0"),
        ({"order_weights": {"d7": float("nan")}}, "order_weights: got nan for d7"),
        ({"order_weights": {"d8": 2}}, r"order_weights: got \['d8'\], needs names out of \['d1', 'd7', 'd14'"),
        ({"quantiles": 0.5}, r"quantiles: got 0\.5, needs a list"),
        ({"features": {"nested": {"statistics": "sum"}}}, "statistics: got 'sum', needs a list"),
        ({"features": _term("spend__sum", "revenue_d7")}, "term t: 'revenue_d7' is no feature"),
        ({"features": _term("spendd__sum", "age")}, "term t: 'spendd__sum' is no feature"),
    ],
)
def test_settings_that_mean_nothing_are_named(
    train: Dataset, schema: Schema, config: Config, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LTVPipeline(schema, config(**settings)).fit(train)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda y: [None if v == 0 else f"{v * 1000:,.2f}" for v in y], r"e\.g\. .*,.* \(Arrow type string\)"),
        (lambda y: np.where(y == y.max(), np.inf, y), r"1 of \d+ values are no finite numbers, e\.g\. inf"),
        (lambda y: [[v] for v in y], r"Arrow type list<"),
    ],
    ids=["text", "infinite", "list"],
)
def test_labels_that_are_no_numbers_are_an_error(
    world: Path, schema: Schema, config: Config, values: Callable, message: str
) -> None:
    table = open_partitions(world, max_partitions=6).read()
    place, honest = table.column_names.index("revenue_d7"), from_table(table)
    odd = table.set_column(place, "revenue_d7", pa.array(values(table["revenue_d7"].to_numpy())))
    with pytest.raises(ValueError, match="label revenue_d7: .*" + message):
        LTVPipeline(schema, config(guard="off")).fit(from_table(odd))
    with pytest.raises(ValueError, match="label revenue_d7: .*" + message):
        evaluate(LTVPipeline(schema, config(guard="off")).fit(honest), from_table(odd))


def test_unknown_labels_are_counted(world: Path, schema: Schema, config: Config) -> None:
    table = open_partitions(world, max_partitions=6).read()
    amounts = table["revenue_d7"].to_numpy().copy()
    amounts[:7] = np.nan
    table = table.set_column(table.column_names.index("revenue_d7"), "revenue_d7", pa.array(amounts))
    pipe = LTVPipeline(schema, config(guard="off")).fit(from_table(table))
    assert pipe.report_["unknown_revenue_d7"] == 7 and pipe.report_["unknown_revenue_d14"] == 0


def test_rows_drawn_at_random_hold_the_share_of_buyers_by_the_main_horizon(
    train: Dataset, schema: Schema, config: Config
) -> None:
    pipe = LTVPipeline(schema, config(split="stratified_random", main_horizon="d1")).fit(train)
    buyers = (train.read(["revenue_d1"])["revenue_d1"].to_numpy() > 0).sum()
    assert pipe.report_["buyers"] == buyers - round(buyers * 0.2)


def test_split_embargo_and_row_cap(
    train: Dataset, schema: Schema, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = LTVPipeline(schema, config(embargo="2h", max_rows=3000)).fit(train)
    facts = pipe.report_
    assert facts["held_out_rows"] == 2000 and facts["rows_in_embargo"] == 2000
    assert facts["training_rows"] == 3000 and facts["rows_over_the_cap"] == 2000
    assert "max_rows: 3000 of 5000 training rows are used" in caplog.text
    drawn = LTVPipeline(schema, config(split="stratified_random")).fit(train)
    assert drawn.report_["held_out_rows"] == pytest.approx(1800, abs=2)
    assert "held-out rows are drawn at random" in caplog.text


def test_the_cache_goes_and_stays_as_asked(train: Dataset, schema: Schema, config: Config, tmp_path: Path) -> None:
    LTVPipeline(schema, config(cache_dir=str(tmp_path / "a"))).fit(train)
    assert not list((tmp_path / "a").rglob("*.parquet"))
    LTVPipeline(schema, config(cache_dir=str(tmp_path / "b"), keep_cache=True)).fit(train)
    assert len(list((tmp_path / "b").rglob("*.parquet"))) == 9


def test_stages_may_differ_in_leaves_and_bins(train: Dataset, schema: Schema, config: Config) -> None:
    trees = {"n_estimators": 10, "learning_rate": 0.1}
    settings = config(buyer_classifier={**trees, "min_data_in_leaf": 200}, revenue_regressor={**trees, "max_bin": 31})
    assert LTVPipeline(schema, settings).fit(train).horizons == ["d1", "d7", "d14"]


def test_chances_of_a_thin_horizon_follow_its_own_rate_of_buyers(world: Path, schema: Schema, config: Config) -> None:
    table = open_partitions(world, max_partitions=6).read()
    thin = table["revenue_d1"].to_numpy().copy()
    thin[np.random.default_rng(0).random(len(thin)) < 0.9] = 0.0
    table = table.set_column(table.column_names.index("revenue_d1"), "revenue_d1", pa.array(thin))
    pipe = LTVPipeline(schema, config(model="two_stage", guard="off")).fit(from_table(table))
    assert "d1" not in pipe.outputs.chances
    scores = pipe.models.scores(pipe.builder.transform(table.combine_chunks().to_batches()[0]))
    assert pipe.outputs._chance("d1", scores["p"]).mean() == pytest.approx((thin > 0).mean(), rel=0.4)


def test_boosting_stops_when_held_out_rows_gain_no_more(
    train: Dataset, later: Dataset, schema: Schema, config: Config, tmp_path: Path
) -> None:
    trees = {"n_estimators": 150, "learning_rate": 0.3, "num_leaves": 31, "min_data_in_leaf": 5}
    scores = {}
    for patience in (10, None):
        pipe = LTVPipeline(
            schema, config(buyer_classifier=trees, revenue_regressor=trees, early_stopping=patience)
        ).fit(train)
        scores[patience] = evaluate(pipe, later).metrics["d7"]["msle"]
        grown = pipe.models.points.boosters["d7"].num_trees()
        assert grown == 150 if patience is None else grown < 100
        loaded = LTVPipeline.load(pipe.save(tmp_path / "model"))
        assert predict_table(loaded, later).equals(predict_table(pipe, later))
    assert scores[10] < scores[None]


@pytest.mark.parametrize("model", ["tweedie", "stack"])
def test_a_horizon_too_thin_to_convert_is_skipped_and_the_others_are_fitted(
    model: str, world: Path, schema: Schema, config: Config
) -> None:
    table = open_partitions(world, max_partitions=6).read()
    thin = table["revenue_d1"].to_numpy().copy()
    thin[4000:] = 0.0
    table = table.set_column(table.column_names.index("revenue_d1"), "revenue_d1", pa.array(thin))
    settings = config(model=model, stacking_bases=["elastic_net"], guard="off")
    pipe = LTVPipeline(schema, settings).fit(from_table(table))
    assert pipe.horizons == ["d7", "d14"]
    assert "0 of 2000 held-out rows have an amount" in pipe.skipped_horizons["d1"]
    assert predict_table(pipe, from_table(table)).num_rows == 6000


def test_explanations_sum_to_the_score(fitted: LTVPipeline, later: Dataset) -> None:
    batch = next(iter(later.with_options(chunk_size=20)))
    names, parts = fitted.explain(batch, "d7")
    score = fitted.models.scores(fitted.builder.transform(batch))["s_d7"]
    np.testing.assert_allclose(np.maximum(parts.sum(axis=1), 0), score, atol=1e-6)
    assert names == [*fitted.builder.names, "(base)"] and parts.shape == (20, len(names))
    table = fitted.importance(later, rows=200)
    assert set(table["model"]) == {"buyer", "d1", "d7", "d14"} and (table["shap"] >= 0).all()
    assert table.query("model == 'd7'").iloc[0]["feature"] != "noise"


def test_drift_names_the_feature_that_moved(fitted: LTVPipeline, later: Dataset) -> None:
    table = later.read()
    moved = pa.array(table["noise"].to_numpy() + 3)
    table = table.set_column(table.column_names.index("noise"), "noise", moved)
    found = fitted.drift(from_table(table)).set_index("feature")
    assert found.loc["noise", "psi"] > 1 and found.loc["noise", "ks"] > 0.8
    assert found.loc["age", "psi"] < 0.1 and found.loc["spend__sum", "psi"] < 0.1


def test_keep_passes_columns_on_and_refuses_names_of_outputs(fitted: LTVPipeline, later: Dataset) -> None:
    found = predict_table(fitted, later, keep=["country", "spend"])
    assert found.column_names[:3] == ["row_id", "buyer_probability", "revenue_d1"]
    assert found["country"].to_pylist() == later.read()["country"].to_pylist()
    with pytest.raises(ValueError, match="keep: \\['revenue_d7'\\] are names of predicted columns"):
        predict_table(fitted, later, keep=["revenue_d7"])
    with pytest.raises(ValueError, match="keep: the data has no columns \\['nothing'\\]"):
        predict_table(fitted, later, keep=["nothing"])


def test_flat_data_without_time_or_id(config: Config) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=4000)
    y = np.where(rng.random(4000) < 1 / (1 + np.exp(-x)), np.exp(x + rng.normal(0, 0.3, 4000)), 0.0)
    table = pa.table({"x": x, "y": y})
    schema = Schema([Column("x")], [Horizon("year", "y")], time=None, id=None)
    pipe = LTVPipeline(schema, config(features={})).fit(from_table(table))
    found = predict_table(pipe, from_table(table))
    assert found.column_names[0] == "buyer_probability"
    assert np.corrcoef(found["revenue_year"].to_numpy(), x)[0, 1] > 0.5


def test_a_saved_model_of_another_format_or_with_a_damaged_file_says_which_and_what_to_do(
    fitted: LTVPipeline, tmp_path: Path
) -> None:
    def saved(name: str, change: Callable[[dict], object]) -> Path:
        folder = fitted.save(tmp_path / "model")
        state = json.loads((folder / name).read_text())
        change(state)
        (folder / name).write_text(json.dumps(state))
        return folder

    old = saved("pipeline.json", lambda state: state.update(format=1, version="0.9"))
    with pytest.raises(ValueError, match=r"pipeline\.json has format 1, written by ltv-stack 0\.9; .* fit and save"):
        LTVPipeline.load(old)
    with pytest.raises(ValueError, match=r"calibration\.json has no entry 'rates', which format 3 needs; fit"):
        LTVPipeline.load(saved("calibration.json", lambda state: state.pop("rates")))
    (fitted.save(tmp_path / "model") / "features.json").write_text('{"kinds": ')
    with pytest.raises(ValueError, match=r"features\.json is damaged"):
        LTVPipeline.load(tmp_path / "model")
    for name in ("buyer_classifier.txt", "reference.json"):
        (fitted.save(tmp_path / "model") / name).unlink()
        with pytest.raises(ValueError, match=f"not complete .*{name}"):
            LTVPipeline.load(tmp_path / "model")


def test_errors_name_the_setting(fitted: LTVPipeline, schema: Schema, tmp_path: Path, train: Dataset) -> None:
    with pytest.raises(ValueError, match="model: got 'magic'"):
        LTVConfig(model="magic")
    with pytest.raises(ValueError, match="estimand: got 'mode'"):
        LTVConfig(estimand="mode")
    with pytest.raises(ValueError, match="sampling: got 'smote'"):
        LTVConfig(sampling="histos+smote")
    with pytest.raises(ValueError, match="embargo: got 'soon'"):
        LTVConfig(embargo="soon")
    with pytest.raises(ValueError, match="config: got \\['lerning_rate'\\]"):
        LTVConfig.from_dict({"lerning_rate": 1})
    with pytest.raises(ValueError, match="calibrate_by: needs calibration"):
        LTVConfig(calibrate_by="country")
    with pytest.raises(ValueError, match="not fitted"):
        next(LTVPipeline(schema).predict(train))
    with pytest.raises(ValueError, match=r"holds no pipeline\.json"):
        LTVPipeline.load(tmp_path)
    with pytest.raises(ValueError, match="main_horizon: got 'd9'"):
        LTVPipeline(schema, LTVConfig(main_horizon="d9", threads=1)).fit(train)


def test_models_saved_under_the_names_of_1_0_0_load(fitted: LTVPipeline, later: Dataset, tmp_path: Path) -> None:
    fitted.save(tmp_path / "old")
    file = tmp_path / "old" / "pipeline.json"
    state = json.loads(file.read_text())
    old = {"stacking_bases": "stack_bases", "buyer_classifier": "classifier", "revenue_regressor": "regressor"}
    old |= {"stacking_meta": "meta", "threads": "num_threads"}
    assert set(old) < set(state["config"])
    state["config"] = {old.get(name, name): value for name, value in state["config"].items()}
    file.write_text(json.dumps(state))
    again = LTVPipeline.load(tmp_path / "old")
    assert again.config == fitted.config
    assert predict_table(again, later).equals(predict_table(fitted, later))
