"""The commands on a small log: what they leave behind, that it repeats, and what they say when something is wrong."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from ltv.cli import APP, main
from ltv.compare import metrics_table, summary_table
from ltv.config import Config, DataConfig, SamplingConfig, Slice, TrainingConfig
from ltv.evaluate import _explained
from ltv.slices import slice_name
from ltv_stack import from_table, open_partitions
from runkit.compare import markdown_table
from runkit.settings import settings_of

HORIZONS = ("d7", "d14", "d28")


def run(*words):
    return main([str(word) for word in words])


def predictions(folder):
    return ds.dataset(sorted(folder.glob("*.parquet"))).to_table()


def test_train_leaves_the_documented_files(trained):
    for name in (
        "config.yaml",
        "metadata.json",
        "metrics.json",
        "models/buyer_classifier.txt",
        *(f"models/revenue_{h}.txt" for h in HORIZONS),
        "models/pipeline.json",
        "logs/train.log",
        "logs/evaluate.log",
        "logs/predict.log",
        "evaluation/val/report.html",
        "evaluation/val/predictions.parquet",
        "evaluation/val/rows.parquet",
        "evaluation/val/importance.csv",
        "submissions/submission.csv",
    ):
        assert (trained / name).stat().st_size > 0, name
    assert sorted(trained.glob("processed/**/*.parquet"))
    assert len(sorted(trained.glob("evaluation/val/*.png"))) >= 3
    assert not [p for p in trained.rglob("*") if p.name.endswith(".tmp") or p.suffix == ".pkl"]


def test_metadata_says_what_was_run(trained):
    metadata = json.loads((trained / "metadata.json").read_text())
    assert metadata["seed"] == 42 and metadata["versions"]["python"] and metadata["machine"]
    train, predict = metadata["commands"]["train"], metadata["commands"]["predict"]
    assert train["wall_seconds"] > 0 and train["peak_memory_mb"] > 50 and train["data_fingerprint"]
    assert train["rows"] + metadata["commands"]["evaluate"]["rows"] == 6000
    assert predict["rows"] == 700 and predict["ms_per_row"] > 0
    log = (trained / "logs" / "predict.log").read_text()
    assert "ms per row" in log and "peak memory" in log
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    assert settings["models"]["buyer_classifier"]["n_estimators"] == 12 and settings["data"]["layout"] == "advertising"


def test_metrics_cover_every_fitted_horizon_and_d1_is_skipped_aloud(trained):
    metrics = json.loads((trained / "metrics.json").read_text())["val"]
    assert all(0 < metrics[h]["msle"] < 2 and metrics[h]["rows"] > 1000 for h in HORIZONS)
    assert "d1" not in metrics and metrics["buyer"]["auc"] > 0.6
    assert "horizon d1 skipped" in (trained / "logs" / "train.log").read_text()


def test_predictions_are_ordered_complete_and_the_submission_follows_them(trained, advertising_log):
    table = predictions(trained / "predictions" / "test")
    asked = ds.dataset(sorted((advertising_log / "test" / "test").rglob("*.parquet"))).to_table(columns=["row_id"])
    assert table["row_id"].to_pylist() == asked["row_id"].to_pylist()
    for end in ("", "_lo", "_hi"):
        for before, after in pairwise(table[f"revenue_{h}{end}"].to_numpy() for h in HORIZONS):
            assert (before <= after).all()
    submission = pa_csv.read_csv(trained / "submissions" / "submission.csv")
    assert submission.column_names == ["row_id", "iap_revenue_d7"] and submission.num_rows == 700
    assert submission["row_id"].to_pylist() == asked["row_id"].to_pylist()
    assert np.allclose(submission["iap_revenue_d7"].to_numpy(), table["revenue_d7"].to_numpy(), rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 97, 100_000])
def test_predictions_do_not_depend_on_the_chunk_size(trained, settings, tmp_path, chunk):
    shutil.copytree(trained / "models", tmp_path / "models")
    limit = ("--limit-rows", 60) if chunk == 1 else ()
    assert run("predict", "--config", settings, "--run-dir", tmp_path, "--chunk-size", chunk, *limit) == 0
    once, again = predictions(trained / "predictions" / "test"), predictions(tmp_path / "predictions" / "test")
    assert again.num_rows == (60 if limit else 700)
    for name in once.column_names:
        assert once[name].slice(0, again.num_rows).to_pylist() == again[name].to_pylist(), name


def test_slices_choose_rows(trained, settings, tmp_path):
    def rows(*words):
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(trained / "models", tmp_path / "models")
        assert run("predict", "--config", settings, "--run-dir", tmp_path, *words) == 0
        folder = next((tmp_path / "predictions").iterdir())
        return [pq.read_metadata(p).num_rows for p in sorted(folder.glob("*.parquet"))], folder.name

    whole, name = rows()
    assert len(whole) == 3 and name == "test"
    assert rows("--max-partitions", 2)[0] == whole[:2]
    assert rows("--start-dt", "2025-10-02-03-00", "--end-dt", "2025-10-02-03-00")[0] == whole[1:2]
    half = sum(rows("--sample-frac", 0.5)[0])
    assert 280 < half < 420
    assert sum(rows("--split", "val", "--limit-rows", 123)[0]) == 123


def test_an_interrupted_predict_resumes_to_the_same_files(trained, settings, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    folder = tmp_path / "run" / "predictions" / "test"
    before = predictions(folder)
    parts = sorted(folder.glob("*.parquet"))
    kept = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    parts[2].unlink()
    (tmp_path / "run" / "submissions" / "submission.csv").unlink()
    assert run("predict", "--config", settings, "--run-dir", tmp_path / "run", "--resume") == 0
    assert parts[0].stat().st_mtime_ns == kept
    assert predictions(folder).equals(before)
    metadata = json.loads((tmp_path / "run" / "metadata.json").read_text())["commands"]["predict"]
    assert metadata["kept_partitions"] == 1 and metadata["submission_rows"] == 700
    assert metadata["rows"] == 700 and 0 < metadata["predicted_rows"] < 700 and metadata["ms_per_row"] > 0
    # Where nothing is left to predict, the time of the command that predicted stays.
    assert run("predict", "--config", settings, "--run-dir", tmp_path / "run", "--resume") == 0
    again = json.loads((tmp_path / "run" / "metadata.json").read_text())["commands"]["predict"]
    assert again["rows"] == 700 and again["predicted_rows"] == 0
    assert [again[k] for k in ("seconds", "ms_per_row")] == [metadata[k] for k in ("seconds", "ms_per_row")]
    # Another slice is another request: nothing is kept.
    assert run("predict", "--config", settings, "--run-dir", tmp_path / "run", "--resume", "--max-partitions", 1) == 0
    assert len(list(folder.glob("*.parquet"))) == 1


def test_train_resumes_from_the_same_models_only(trained, settings, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    model = tmp_path / "run" / "models" / "buyer_classifier.txt"
    text = model.read_text()
    assert run("train", "--config", settings, "--run-dir", tmp_path / "run", "--resume") == 0
    log = (tmp_path / "run" / "logs" / "train.log").read_text()
    assert "kept" in log and model.read_text() == text
    assert "kept" in (tmp_path / "run" / "logs" / "evaluate.log").read_text()
    words = (
        "--config",
        settings,
        "--run-dir",
        tmp_path / "run",
        "--resume",
        "--models.buyer_classifier.n_estimators",
        5,
    )
    assert run("train", *words) == 0
    assert model.read_text() != text
    # Trained again from nothing, the first settings give the first models.
    assert run("train", "--config", settings, "--run-dir", tmp_path / "again") == 0
    assert (tmp_path / "again" / "models" / "buyer_classifier.txt").read_text() == text


def test_train_resumes_only_on_the_same_features_and_data(trained, settings, advertising_log, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    model = tmp_path / "run" / "models" / "buyer_classifier.txt"
    text = model.read_text()
    features = tmp_path / "features.yaml"
    features.write_text("exclude: [wifi_ratio]\n")
    words = ("--config", settings, "--run-dir", tmp_path / "run", "--resume", "--features", features)
    assert run("train", *words) == 0
    assert "wifi_ratio" in text and "wifi_ratio" not in model.read_text()
    # The same file with another content is another catalogue; predictions of other models are not kept.
    before = predictions(tmp_path / "run" / "predictions" / "test")
    features.write_text("exclude: [avg_days_ins]\n")
    assert run("train", *words) == 0
    assert "wifi_ratio" in model.read_text() and "avg_days_ins" not in model.read_text()
    assert run("predict", *words[:5], "--features", features) == 0
    assert not predictions(tmp_path / "run" / "predictions" / "test").equals(before)
    shutil.copytree(advertising_log, tmp_path / "raw")
    file = sorted((tmp_path / "raw" / "train" / "train").rglob("*.parquet"))[0]
    table = pq.ParquetFile(file).read()
    pq.write_table(table.take(np.arange(table.num_rows) // 2), file)
    text = model.read_text()
    assert run("train", *words, "--data.root", tmp_path / "raw") == 0
    assert model.read_text() != text


@pytest.mark.parametrize(
    "words", [("--data.train_end", "null"), ("--training.split.strategy", "stratified_random")], ids=["open", "joint"]
)
def test_the_validation_window_is_never_fitted_on(trained, settings, tmp_path, words):
    assert run("train", "--config", settings, "--run-dir", tmp_path, *words) == 0
    log = (tmp_path / "logs" / "train.log").read_text()
    assert "6 partitions of the validation window are not trained on" in log
    commands = json.loads((tmp_path / "metadata.json").read_text())["commands"]
    assert commands["train"]["partitions"] == 18 and commands["evaluate"]["partitions"] == 6
    assert "labels that end after the time of the validation rows" in log


def test_another_split_leaves_the_submission_alone(trained, settings, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    submission = tmp_path / "run" / "submissions" / "submission.csv"
    text = submission.read_text()
    assert run("predict", "--config", settings, "--run-dir", tmp_path / "run", "--split", "val") == 0
    assert submission.read_text() == text
    assert len(submission.with_name("submission_val.csv").read_text().splitlines()) > 1000


def test_amounts_of_day_one_are_used_where_the_data_has_them(advertising_log, settings, tmp_path):
    shutil.copytree(advertising_log, tmp_path / "raw")
    for file in (tmp_path / "raw" / "train" / "train").rglob("*.parquet"):
        table = pq.ParquetFile(file).read()
        early = np.asarray(table["iap_revenue_d7"]) * (np.arange(table.num_rows) % 2)
        pq.write_table(table.append_column("iap_revenue_d1", pa.array(early)), file)
    words = ("--config", settings, "--run-dir", tmp_path / "run", "--data.root", tmp_path / "raw")
    assert run("train", *words, "--data.horizons", "[d1,d3,d7]") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["val"]
    assert metrics["d1"]["rows"] > 1000 and "d3" not in metrics
    assert (
        "horizon d3 skipped: the data has no column iap_revenue_d3"
        in (tmp_path / "run" / "logs" / "train.log").read_text()
    )


def test_evaluate_and_validate_report_what_they_read(trained, settings, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    words = ("--config", settings, "--run-dir", tmp_path / "run")
    assert run("evaluate", *words, "--split", "train", "--limit-rows", 1500) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["train_part"]["d7"]["rows"] == 1500 and metrics["val"]["d7"]["rows"] > 1000
    assert run("validate", *words, "--limit-rows", 1500) == 0
    report = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert set(report["splits"]) == {"train", "val"}
    stages = report["splits"]["val"]
    assert 0 <= stages["buyer"]["precision"] <= 1 and stages["buyer"]["roc_auc"] > 0.5
    assert stages["buyers_d7"]["rows"] == stages["data"]["buyers"] < stages["data"]["rows"] == 1500
    assert "audit:" in (tmp_path / "run" / "logs" / "validation_small.log").read_text()


def test_a_part_of_a_split_leaves_the_score_of_the_whole_alone(trained, settings, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    words = ("--config", settings, "--run-dir", tmp_path / "run")
    whole = json.loads((trained / "metrics.json").read_text())["val"]
    files = {path.name: path.read_bytes() for path in (trained / "evaluation" / "val").iterdir()}
    assert run("evaluate", *words, "--limit-rows", 300) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val"] == whole and metrics["val_part"]["d7"]["rows"] == 300
    assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "evaluation" / "val").iterdir()} == files
    assert "a part of val" in (tmp_path / "run" / "logs" / "evaluate.log").read_text()
    assert run("compare", *words, "--runs", tmp_path / "run", "--limit-rows", 300) == 0
    assert " 300 |" in (tmp_path / "run" / "compare.md").read_text()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "val"),
        ({"chunk_size": 7}, "val"),
        ({"start_dt": "2025-10-01-18-00", "sample_frac": 0.5, "max_partitions": 3}, "val"),
        ({"start_dt": "2025-10-01-19-00"}, "val_part"),
        ({"end_dt": "2025-10-01-19-00"}, "val_part"),
        ({"sample_frac": 0.4}, "val_part"),
        ({"max_partitions": 2}, "val_part"),
        ({"limit_rows": 10}, "val_part"),
    ],
)
def test_only_other_rows_than_those_of_the_config_are_a_part(flags, name):
    sampling = SamplingConfig(val_frac=0.5, max_val_partitions=3)
    config = Config(data=DataConfig(val_start="2025-10-01-18-00"), training=TrainingConfig(sampling=sampling))
    assert slice_name(config, Slice("val", **flags)) == name


def test_rows_to_explain_come_from_partitions_whose_types_differ(tmp_path):
    for hour, kind in enumerate((pa.int64(), pa.float64(), None)):
        folder = tmp_path / f"datetime=2025-10-01-0{hour}-00"
        folder.mkdir()
        column = pa.nulls(2) if kind is None else pa.array([[("a", 1)], None], pa.map_(pa.string(), kind))
        pq.write_table(pa.table({"row_id": ["x", "y"], "spend": column}), folder / "part-0.parquet")
    table = _explained(open_partitions(tmp_path))
    assert table["spend"].to_pylist() == [[("a", 1.0)], None] * 2 + [None, None]


def test_compare_orders_models_by_the_summed_error(settings, tmp_path):
    words = ("--config", settings, "--run-dir", tmp_path, "--data.train_start", "2025-10-01-12-00")
    assert run("compare", *words, "--variants", "log1p", "document", "btyd") == 0
    text = (tmp_path / "compare.md").read_text()
    assert "| log1p | d7 |" in text and "| document | d7 |" in text and "seed 42" in text
    assert "Not fitted: btyd:" in text and "ltv import" in text
    found = json.loads((tmp_path / "compare.json").read_text())["models"]
    sums = {name: sum(found[name][h]["msle"] for h in HORIZONS) for name in found}
    places = {name: text.index(f"| {name} |") for name in found}
    assert min(sums, key=sums.get) == min(places, key=places.get)
    assert run("compare", *words, "--runs", tmp_path / "log1p", tmp_path / "document") == 0
    assert run("compare", *words) == 2
    assert run("compare", *words, "--variants", "log1p", "nonsense") == 2


def test_summed_errors_and_their_differences_are_those_of_the_rows():
    truth = np.array([0.0, 0.0, 3.0, 10.0])
    tables = {
        name: pd.DataFrame({"true_d7": truth, "revenue_d7": said, "true_d14": truth, "revenue_d14": said})
        for name, said in (("zero", np.zeros(4)), ("right", truth), ("two", np.full(4, 2.0)))
    }
    table = summary_table(tables).set_index("model")
    assert table.index[0] == "right" and table.loc["right", "sum"] == 0
    gaps = 2 * (np.log1p(0.0) - np.log1p(truth)) ** 2
    assert table.loc["zero", "sum"] == pytest.approx(gaps.mean()) == pytest.approx(2 * table.loc["zero", "MSLE d7"])
    assert table.loc["zero", "above the best"] == f"{gaps.mean():.4g} ± {1.96 * gaps.std(ddof=1) / 2:.2g}"


def scored(truth, said, **more):
    return pd.DataFrame({f"true_{h}": t for h, t in truth.items()} | {f"revenue_{h}": said for h in truth} | more)


def test_models_scored_on_different_rows_are_not_compared():
    truth, said = {"d7": np.array([0.0, np.nan, 3.0])}, np.ones(3)
    ids = {"row_id": ["a", "b", "c"]}
    same = {"A": scored(truth, said), "B": scored(truth, said, **ids), "C": scored(truth, 2 * said, **ids)}
    assert summary_table(same)["rows"].tolist() == [3, 3, 3]
    others = (
        scored(truth, said, row_id=["a", "c", "b"]),
        scored({"d7": np.array([0.0, np.nan, 4.0])}, said),
        scored({"d7": np.array([0.0, 1.0, 3.0])}, said),
        scored(truth, said, **ids)[:2],
    )
    for other in others:
        with pytest.raises(ValueError, match=rf"B \(3 rows\) and D \({len(other)} rows\) were scored on different"):
            summary_table(same | {"D": other})


def test_the_sum_is_over_the_horizons_all_models_have():
    truth = np.array([0.0, 2.0])
    tables = {
        "short": scored({"d1": truth, "d7": truth}, np.ones(2)),
        "long": scored({"d7": truth, "d14": truth, "d28": np.full(2, np.nan)}, truth + 1),
    }
    table = summary_table(tables).set_index("model")
    assert list(table.columns) == ["rows", "MSLE d7", "sum", "above the best"]
    assert table["sum"].tolist() == table["MSLE d7"].tolist()
    with pytest.raises(ValueError, match=r"no horizon is common to all: d7 \(A\); d14 \(B\)"):
        summary_table({"A": tables["short"].drop(columns="true_d1"), "B": tables["long"].drop(columns="true_d7")})


def test_runs_are_compared_on_the_same_rows_and_horizons_only(trained, settings, tmp_path, capsys):
    words = ("--config", settings, "--run-dir", tmp_path)
    shutil.copytree(trained, tmp_path / "other")
    place = tmp_path / "other" / "evaluation" / "val" / "predictions.parquet"
    table = pq.read_table(place)
    pq.write_table(table.drop_columns(["true_d28"]), place)
    assert run("compare", *words, "--runs", trained, tmp_path / "other") == 0
    text = (tmp_path / "compare.md").read_text()
    assert f"Summed over d7, d14, which all have; left out: d28 ({trained})." in text
    pq.write_table(table.slice(1), place)
    capsys.readouterr()
    assert run("compare", *words, "--runs", trained, tmp_path / "other") == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ltv ")]
    rows = f"{trained} ({table.num_rows} rows) and {tmp_path / 'other'} ({table.num_rows - 1} rows)"
    assert len(error) == 1 and f"{rows} were scored on different rows; run `ltv evaluate`" in error[0]


def test_submit_checks_and_aligns(trained, settings, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    words = ("--config", settings, "--run-dir", tmp_path / "run", "--dry-run")
    file = tmp_path / "run" / "submissions" / "submission.csv"
    assert run("submit", *words) == 0
    lines = file.read_text().splitlines()
    sample = tmp_path / "sample.csv"
    sample.write_text("\n".join([lines[0], *(line.split(",")[0] + ",0" for line in reversed(lines[1:]))]) + "\n")
    assert run("submit", *words, "--sample-submission", sample, "--align-order") == 0
    aligned = file.read_text().splitlines()
    assert [row.split(",")[0] for row in aligned[1:]] == [row.split(",")[0] for row in reversed(lines[1:])]
    assert sorted(aligned[1:]) == sorted(lines[1:])
    bad = {
        "missing": lines[:-1],
        "repeated": [*lines, lines[1]],
        "not asked for": [*lines, "someone,1.0"],
        "without an amount": [*lines[:-1], lines[-1].split(",")[0] + ",-1.0"],
    }
    for reason, content in bad.items():
        file.write_text("\n".join(content) + "\n")
        assert run("submit", *words) == 1
        assert reason in capsys.readouterr().err
    file.write_text("\n".join(lines) + "\n")
    assert run("submit", *words[:-1]) == (1 if shutil.which("kaggle") is None else 0)


def test_a_truncated_file_is_named_or_skipped_but_never_passed_over_in_silence(trained, settings, tmp_path, capsys):
    shutil.copytree(trained / "models", tmp_path / "run" / "models")
    source = yaml.safe_load(settings.read_text())["data"]["root"]
    shutil.copytree(f"{source}/test", tmp_path / "raw" / "test")
    broken = sorted((tmp_path / "raw" / "test").rglob("*.parquet"))[1]
    broken.write_bytes(broken.read_bytes()[:-100])
    words = ("--config", settings, "--run-dir", tmp_path / "run", "--data.root", tmp_path / "raw")
    assert run("predict", *words) == 1
    assert str(broken) in capsys.readouterr().err
    assert run("predict", *words, "--data.on_error", "skip") == 0
    assert str(broken) in (tmp_path / "run" / "logs" / "predict.log").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "--data.root", "/nowhere"), "ltv generate"),
        (("predict", "--run-dir", "/nowhere/run"), "ltv train"),
        (("submit", "--run-dir", "/nowhere/run"), "ltv predict"),
        (("evaluate", "--data.val_start", "last tuesday"), "YYYY-MM-DD-HH-MM"),
        (("train", "--start-dt", "2031-01-01-00-00"), "2025-10-01"),
        (("train", "--models.estimand", "mode"), "quantile:0.9"),
        (("train", "--training.n_folds", "1"), "folds: got 1, needs at least 2"),
        (("train", "--split", "val"), "models are fitted on the train window"),
        (("train", "--split", "test"), "models are fitted on the train window"),
        (("train", "--start-dt", "2025-10-01-18-00", "--end-dt", "2025-10-01-20-00"), "lie in the validation window"),
        (("evaluate", "--start-dt", "2025-10-01-16-00"), "were fitted on 2 of its 8 partitions"),
        (("validate", "--data.val_start", "2025-10-01-17-00"), "were fitted on 1 of its 7 partitions"),
        (("train", "--data.horizons", "[d28,d7]"), "data.horizons: got d28, d7, needs the shortest first"),
        (("train", "--data.horizons", "[d7,week2]"), "data.horizons: got ['week2'], needs d and a number of days"),
        (("train", "--data.horizons", "[d7,week2]", "--data.layout", "transactions"), "got ['week2']"),
        (("train", "--data.horizons", "[]"), "data.horizons: got none"),
        (("train", "--limit-rows", "0"), "limit_rows: got 0"),
        (("train", "--max-partitions", "0"), "max_partitions: got 0"),
        (("train", "--chunk-size", "0"), "chunk_size: got 0"),
        (("predict", "--sample-frac", "0.00001"), "none of the 700 rows"),
        (("dashboard", "--runs", "/nowhere"), "ltv train"),
        (
            ("import", "--source", "kdd98", "--path", ".", "--data-dir", "/nowhere/x"),
            "needs one of cdnow, online_retail",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_what_to_do(trained, settings, tmp_path, capsys, words, says):
    assert stopped(trained, settings, tmp_path, words) == 2
    assert says in only_error(capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "--models.model", "ziln", "--models.deep", "{nonsense: 1}"), "TypeError: "),
        (("train", "--models.buyer_classifier", "{objective: nonsense}"), "nonsense"),
    ],
)
def test_work_that_fails_is_one_line_and_a_traceback_in_the_log(trained, settings, tmp_path, capsys, words, says):
    assert stopped(trained, settings, tmp_path, words) == 1
    error = only_error(capsys)
    assert says in error and f"traceback in {tmp_path / 'logs' / 'train.log'}" in error
    assert "Traceback" in (tmp_path / "logs" / "train.log").read_text()
    assert not (tmp_path / "models").exists()


def stopped(trained, settings, tmp_path, words):
    config = () if words[0] in ("dashboard", "import") else ("--config", settings)
    if words[0] in ("evaluate", "validate") or "--sample-frac" in words:
        shutil.copytree(trained / "models", tmp_path / "models")
    place = () if words[0] in ("dashboard", "import") else ("--run-dir", tmp_path)
    return run(words[0], *config, *place, *words[1:])


def only_error(capsys):
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ltv ")]
    assert len(error) == 1
    return error[0]


def test_a_run_directory_is_one_commands_at_a_time(trained, settings, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    hold = "import sys; from runkit.run import Run\nwith Run(sys.argv[1]).command('train'): print(flush=True); input()"
    words = [sys.executable, "-c", hold, str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        holder.stdout.readline()
        for command in ("train", "predict", "evaluate"):
            assert run(command, "--config", settings, "--run-dir", tmp_path / "run", "--seed", 1) == 1
            assert f"in use by `train`, process {holder.pid}" in only_error(capsys)
        changed = [path for path, content in files.items() if path.read_bytes() != content]
        holder.communicate(b"\n")
    assert not [path for path in changed if path.name not in ("train.log", "predict.log", "evaluate.log")]


def test_predictions_are_a_folder_that_others_read(trained):
    folder = trained / "predictions" / "test"
    table = pd.read_parquet(folder)
    assert len(table) == 700 and table["row_id"].tolist() == predictions(folder)["row_id"].to_pylist()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--sample-frac", "abc"), "sample_frac: got 'abc', needs a number or null"),
        (("--limit-rows", "1.5"), "limit_rows: got '1.5', needs a whole number or null"),
        (("--split", "foo"), "split: got 'foo', needs one of train, val, test"),
        (("--engine.name", "foo"), "engine.name: got 'foo', needs one of local, dask"),
        (("--seed", "x"), "seed: got 'x', needs a whole number"),
        (("--nonsense", "3"), "--nonsense: got a setting that is not known, needs one that --help lists such as seed"),
    ],
)
def test_an_argument_that_means_nothing_is_one_line(capsys, words, says):
    assert run("train", *words) == 2
    assert capsys.readouterr().err == f"ltv train: error: {says}\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("data:\n  root: [a\nmodels: 3\n", ", line 3: got no YAML (did not find expected ',' or ']')"),
        ("- a\n", ": got ['a'], needs settings such as `seed: 1`"),
    ],
)
def test_a_wrong_settings_file_is_one_line_that_names_it(tmp_path, capsys, content, says):
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    assert run("train", "--config", file) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ltv train: error: {file}{says}") and error.count("\n") == 1


def test_an_empty_settings_file_overrides_nothing(tmp_path, capsys):
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert run("train", "--config", file, "--run-dir", tmp_path / "run", "--data.root", "/nowhere") == 2
    assert "data.root: /nowhere is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- wifi_ratio\n", "holds a list, needs groups"),
        ("exclude: [wifi_ratio\n", "is not YAML"),
        ("exclude: wifi_ratio\n", "features.exclude: got 'wifi_ratio', needs a list of columns"),
        ("interactions: {terms: [{name: x}]}\n", "needs name, op, left and right"),
    ],
)
def test_a_wrong_features_file_is_one_line(settings, tmp_path, capsys, content, says):
    features = tmp_path / "features.yaml"
    features.write_text(content)
    assert run("train", "--config", settings, "--run-dir", tmp_path / "run", "--features", features) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ltv ")]
    assert len(error) == 1 and says in error[0]
    assert "Traceback" in (tmp_path / "run" / "logs" / "train.log").read_text()


def test_a_missing_package_is_one_line_that_names_the_extra(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert run("train", "--config", settings, "--run-dir", tmp_path, "--engine.name", "dask") == 1
    assert "ltv train: error: engine 'dask' needs the extra: pip install 'ltv-stack[dask]'" in capsys.readouterr().err


def test_a_column_that_comes_twice_is_named_with_its_file(trained, settings, tmp_path, capsys):
    shutil.copytree(trained / "models", tmp_path / "run" / "models")
    source = yaml.safe_load(settings.read_text())["data"]["root"]
    shutil.copytree(f"{source}/test", tmp_path / "raw" / "test")
    file = sorted((tmp_path / "raw" / "test").rglob("*.parquet"))[1]
    table = pq.ParquetFile(file).read()
    doubled = table.append_column("country", table["country"])
    with pytest.raises(ValueError, match="got the column 'country' more than once"):
        from_table(doubled)
    pq.write_table(doubled, file)
    assert run("predict", "--config", settings, "--run-dir", tmp_path / "run", "--data.root", tmp_path / "raw") == 1
    assert f"{file} has the column 'country' more than once" in capsys.readouterr().err


def test_rows_without_ids_are_predicted_but_not_submitted(trained, settings, tmp_path):
    shutil.copytree(trained / "models", tmp_path / "run" / "models")
    source = yaml.safe_load(settings.read_text())["data"]["root"]
    shutil.copytree(f"{source}/test", tmp_path / "raw" / "test")
    for file in (tmp_path / "raw").rglob("*.parquet"):
        pq.write_table(pq.ParquetFile(file).read().drop_columns(["row_id"]), file)
    words = ("--config", settings, "--run-dir", tmp_path / "run", "--data.root", tmp_path / "raw")
    assert run("predict", *words) == 0
    assert "no submission: the data has no column row_id" in (tmp_path / "run" / "logs" / "predict.log").read_text()
    assert not (tmp_path / "run" / "submissions").exists()


def test_a_window_without_buyers_is_an_error_that_counts_them(advertising_log, settings, tmp_path, capsys):
    root = tmp_path / "raw" / "train" / "train"
    for folder in sorted((advertising_log / "train" / "train").iterdir())[:2]:
        table = pq.ParquetFile(next(folder.glob("*.parquet"))).read()
        (root / folder.name).mkdir(parents=True)
        pq.write_table(table.filter(np.asarray(table["buyer_d28"]) == 0), root / folder.name / "part-0.parquet")
    words = ("--config", settings, "--run-dir", tmp_path / "run", "--data.root", tmp_path / "raw")
    assert run("train", *words) == 1
    assert "training rows have an amount" in capsys.readouterr().err


def test_a_window_without_buyers_is_evaluated_to_strict_json(trained, settings, advertising_log, tmp_path):
    shutil.copytree(trained / "models", tmp_path / "run" / "models")
    last = sorted((advertising_log / "train" / "train").iterdir())[-1]
    table = pq.ParquetFile(next(last.glob("*.parquet"))).read()
    (tmp_path / "raw" / "train" / "train" / last.name).mkdir(parents=True)
    table = table.filter(np.asarray(table["buyer_d28"]) == 0)
    pq.write_table(table, tmp_path / "raw" / "train" / "train" / last.name / "part-0.parquet")
    words = ("--config", settings, "--run-dir", tmp_path / "run", "--data.root", tmp_path / "raw")
    assert run("evaluate", *words) == 0

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "run" / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=refuse)["val"]
    assert metrics["buyer"]["auc"] is None and metrics["d7"]["msle"] > 0
    table = markdown_table(metrics_table({"run": metrics}, ["run"]).to_dict("records"))
    assert "| run |" in table and "None" not in table


def test_a_leaking_column_is_refused_by_name(advertising_log, settings, tmp_path, capsys):
    root = tmp_path / "raw" / "train" / "train"
    for folder in sorted((advertising_log / "train" / "train").iterdir())[:8]:
        table = pq.ParquetFile(next(folder.glob("*.parquet"))).read()
        place = table.schema.get_field_index("release_msrp")
        table = table.set_column(place, "release_msrp", table["iap_revenue_d7"])
        (root / folder.name).mkdir(parents=True)
        pq.write_table(table, root / folder.name / "part-0.parquet")
    words = ("--config", settings, "--run-dir", tmp_path / "run", "--data.root", tmp_path / "raw")
    assert run("train", *words, "--models.guard", "strict") == 1
    assert "release_msrp" in capsys.readouterr().err


def test_shipped_configs_are_found_by_name_and_share_one_schema(capsys):
    found = {}
    for name in ("config/config.yaml", "config/config_test.yaml"):
        assert main(["train", "--config", name, "--print_config"]) == 0
        found[name] = yaml.safe_load(capsys.readouterr().out)
    first, second = found.values()

    def keys(node, path=()):
        inside = isinstance(node, dict) and path[-1:] not in (("buyer_classifier",), ("revenue_regressor",))
        return {k for key, value in node.items() for k in keys(value, (*path, key))} if inside else {path}

    assert keys(first) == keys(second) and first != second


@pytest.mark.parametrize("command", ["", "train"])
def test_help_teaches(command):
    words = [sys.executable, "-m", "ltv.cli", *([command] if command else []), "--help"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert len(text.splitlines()) > 8 and ("--limit-rows" in text) == (command == "train")


@pytest.mark.parametrize("command", APP.commands)
def test_every_setting_of_every_command_is_explained(command):
    settings = settings_of(APP.commands[command].config)
    assert not [one.name for one in settings.values() if not one.help]
    choose = {"split", "start_dt", "end_dt", "sample_frac", "max_partitions", "limit_rows", "chunk_size"}
    assert (choose <= set(settings)) == (command not in ("generate", "import", "dashboard"))
