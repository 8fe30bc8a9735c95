"""The command line: a whole tiny run, a foreign log by YAML, and errors that say what to do."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from runkit.settings import SettingError
from ubt.cli import APP, main
from ubt.config import Config

TINY = """
model: {hidden_size: 16, num_layers: 1, num_heads: 2, max_seq_length: 20, id_size: 4, max_ids: 500, embedding_size: 12}
train: {num_epochs: 1, batch_size: 64, learning_rate: 0.001, cutoffs: 2, threads: 1}
features: {windows_days: [1.0, 7.0], cf_size: 6, cf_values: 500}
score: {sample: 0, width: 16, trees: 3}
progress: false
"""


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return ["--config", str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "run")]


def test_one_command_goes_from_nothing_to_the_table(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data-dir", str(tmp_path / "data"), "--clients", "6000", "--relevant-share", "0.1", "--if-missing"]
    data += ["--generate.target_categories", "5", "--generate.target_skus", "5"]
    assert main(["run", *settings, *data]) == 0
    out = capsys.readouterr().out
    assert "official baseline" in out and "all but hstu" in out and "scorer sampled" in out
    run = tmp_path / "run"
    for name in (
        "config.yaml",
        "metadata.json",
        "metrics.json",
        "checkpoints/best.ckpt",
        "plots/loss.png",
        "plots/roc_churn.png",
        "embeddings/embeddings.npy",
        "embeddings/all/embeddings.npy",
        "scores/all/scores.json",
        "scores/table.txt",
        "prepared/target/train_target.parquet",
    ):
        assert (run / name).exists(), name
    metadata = json.loads((run / "metadata.json").read_text())
    assert set(metadata["commands"]) == {"generate", "prepare", "train", "embed", "score", "run"}
    assert metadata["seed"] == 42 and metadata["versions"]["torch"]
    assert len(metadata["commands"]["prepare"]["data_fingerprint"]) == 64
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["hidden_size"] == 16
    # Again, from the written config alone: nothing is prepared or trained a second time.
    assert main(["run", "--config", str(run / "config.yaml"), "--resume"]) == 0
    again = capsys.readouterr().out
    assert "is there already" in again and "up to date" in again
    assert out.split("method ")[1].split("\n")[:8] == again.split("method ")[1].split("\n")[:8]
    written = ["--config", str(run / "config.yaml")]
    assert main(["update", *written, "--until", "2022-10-20"]) == 0
    assert "have new events before 2022-10-20 00:00:00" in capsys.readouterr().out
    assert main(["score", *written]) == 1
    assert "run `ubt embed` again" in capsys.readouterr().err


def foreign_log(folder: Path, users: int = 400) -> None:
    rng = np.random.default_rng(0)
    rows = users * 12
    frame = pd.DataFrame(
        {
            "who": rng.integers(0, users, rows) + 7_000_000_000,
            "at": pd.Timestamp("2024-03-01") + pd.to_timedelta(np.sort(rng.integers(0, 40 * 86400, rows)), unit="s"),
            "did": rng.choice(["view", "cart", "buy"], rows, p=[0.7, 0.1, 0.2]),
            "thing": rng.integers(0, 50, rows),
            "price": rng.gamma(2.0, 10.0, rows).round(2),
        }
    )
    frame["kind"] = "kind " + (frame["thing"] // 10).astype(str)
    half = rows // 2
    # One file with times and ids as text, one typed, as exports of different months come.
    early = frame[:half].astype({"who": str, "thing": str, "price": str})
    early["at"] = frame[:half]["at"].dt.strftime("%Y-%m-%d %H:%M:%S UTC")
    folder.mkdir()
    early.to_parquet(folder / "a.parquet", index=False)
    frame[half:].to_parquet(folder / "b.parquet", index=False)


FOREIGN = """
log:
  files: ["*.parquet"]
  user: who
  time: at
  event: did
  item: thing
  category: kind
  price: price
  label_events: [buy]
  active_events: [buy]
  target_categories: 3
  train_start: 2024-03-21
  valid_start: 2024-03-31T00:00:00Z
"""


def test_a_foreign_log_needs_a_yaml_only(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_log(tmp_path / "log")
    (tmp_path / "foreign.yaml").write_text(FOREIGN)
    command = ["run", "--config", str(tmp_path / "foreign.yaml"), *settings, "--data-dir", str(tmp_path / "log")]
    assert main(command) == 0, capsys.readouterr().err
    assert "churn" in capsys.readouterr().out
    ids = np.load(tmp_path / "run" / "embeddings" / "client_ids.npy")
    frame = pd.concat(
        [pd.read_parquet(tmp_path / "log" / name).astype({"who": int}) for name in ("a.parquet", "b.parquet")]
    )
    assert ids.dtype == np.int64 and set(ids) == set(frame["who"])
    target = pd.read_parquet(tmp_path / "run" / "prepared" / "target" / "train_target.parquet")
    at = pd.to_datetime(frame["at"], utc=True, format="mixed").dt.tz_localize(None)
    inside = frame[(frame["did"] == "buy") & (at >= "2024-03-21") & (at < "2024-03-31")]
    assert len(target) == len(inside) and set(target["client_id"]) == set(inside["who"])
    assert target["price"].between(0, 99).all() and target["price"].nunique() > 50
    history = frame[at < "2024-03-21"]["price"].astype(float)
    borders = history.quantile(np.arange(1, 100) / 100).to_numpy()
    expected = np.searchsorted(borders, inside["price"].astype(float), side="right")
    np.testing.assert_array_equal(np.sort(target["price"]), np.sort(expected))


def test_a_foreign_log_grows(tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    foreign_log(tmp_path / "log")
    (tmp_path / "foreign.yaml").write_text(FOREIGN)
    command = ["--config", str(tmp_path / "foreign.yaml"), *settings, "--data-dir", str(tmp_path / "log")]
    for step in ("prepare", "train", "embed"):
        assert main([step, *command]) == 0, capsys.readouterr().err
    days = pd.read_parquet(tmp_path / "log" / "b.parquet")[:100]
    (tmp_path / "new").mkdir()
    days.assign(at=days["at"] + pd.Timedelta(days=60)).to_parquet(tmp_path / "new" / "c.parquet", index=False)
    before = np.load(tmp_path / "run" / "embeddings" / "embeddings.npy")
    update = ["update", *command, "--new-data", str(tmp_path / "new")]
    assert main([*update, "--until", "2024-06-30"]) == 0, capsys.readouterr().err
    assert " users have new events before 2024-06-30 00:00:00" in capsys.readouterr().out
    after = np.load(tmp_path / "run" / "embeddings" / "embeddings.npy")
    ids = np.load(tmp_path / "run" / "embeddings" / "client_ids.npy")
    assert (before != after).any(1)[np.isin(ids, days["who"])].all()
    assert main([*update, "--until", "2024-06-30"]) == 0
    assert "update: 0 users" in capsys.readouterr().out
    assert main([*update, "--new-data", str(tmp_path)]) == 1
    assert "no file in" in capsys.readouterr().err


def test_a_split_directory_is_read_as_it_is(
    raw_log: Path, tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from synthlogs.shop import TABLES

    split = tmp_path / "split"
    shutil.copytree(raw_log / "input", split / "input")
    shutil.copytree(raw_log / "target", split / "target")
    shutil.copy(raw_log / "product_properties.parquet", split)
    items = pd.read_parquet(raw_log / "product_properties.parquet")
    for table in TABLES:
        frame = pd.read_parquet(raw_log / f"{table}.parquet")
        frame["timestamp"] = pd.to_datetime(frame["timestamp"])
        frame[frame["timestamp"] < "2022-10-13"].to_parquet(split / "input" / f"{table}.parquet", index=False)
        if table == "product_buy":
            frame = frame.merge(items, on="sku")
            train = frame["timestamp"].between("2022-10-13", "2022-10-27", inclusive="left")
            frame[train].to_parquet(split / "target" / "train_target.parquet", index=False)
            scored = frame["timestamp"] >= "2022-10-27"
            frame[scored].to_parquet(split / "target" / "validation_target.parquet", index=False)
    for name, data in (("raw", raw_log), ("split", split)):
        assert main(["prepare", *settings, "--data-dir", str(data), "--run-dir", str(tmp_path / name)]) == 0
    from ubt.features import aggregates
    from ubt.labels import window_labels
    from ubt.prepare import open_prepared

    one, other = (open_prepared(tmp_path / name / "prepared") for name in ("raw", "split"))
    assert (one.train_start, one.valid_start, one.end) == (other.train_start, other.valid_start, other.end)
    for window in ("train", "validation"):
        a, b = (window_labels(log, window) for log in (one, other))
        np.testing.assert_array_equal(a.churn, b.churn)
        np.testing.assert_array_equal(a.category.toarray(), b.category.toarray())
    for a, b in zip(*(aggregates(log, log.train_start, [1.0, 30.0]) for log in (one, other)), strict=True):
        np.testing.assert_array_equal(a.values, b.values)


def test_settings_have_one_name_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {batch_size: 7}\nmodel: {num_layers: 5}")
    config = APP.parse(
        "train", ["--config", str(tmp_path / "a.yaml"), "--learning-rate=1e-2", "--train.num_epochs", "9", "--resume"]
    )
    assert (config.train.batch_size, config.model.num_layers) == (7, 5)
    assert (config.train.learning_rate, config.train.num_epochs, config.resume) == (1e-2, 9, True)
    defaults = Config()
    assert (defaults.model.hidden_size, defaults.model.num_layers, defaults.model.max_seq_length) == (256, 3, 300)
    assert (defaults.train.learning_rate, defaults.train.gradient_clip) == (5e-5, 1.0)


def test_switches_can_be_turned_off() -> None:
    assert APP.parse("train", ["--no-progress", "--seed", "3"]).progress is False
    config = APP.parse("train", ["--hold-out-newest", "--no-hold_out_newest"])
    assert config.progress and not config.train.hold_out_newest
    with pytest.raises(SettingError, match="no-seed"):
        APP.parse("train", ["--no-seed"])


def test_files_of_a_log_may_be_one_pattern(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("log: {files: '*.csv'}")
    assert APP.parse("prepare", ["--config", str(tmp_path / "a.yaml")]).log.files == ["*.csv"]
    assert APP.parse("prepare", ["--files", "a.parquet"]).log.files == ["a.parquet"]
    assert APP.parse("prepare", ["--files", "[a.parquet, b.parquet]"]).log.files == ["a.parquet", "b.parquet"]


def test_a_popularity_without_targets_is_named(
    raw_copy: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (raw_copy / "target" / "propensity_sku.npy").unlink()
    assert main(["prepare", *settings, "--data-dir", str(raw_copy)]) == 1
    error = capsys.readouterr().err
    assert "target/propensity_sku.npy: missing beside target/popularity_propensity_sku.npy" in error


def test_training_without_ranked_tasks_says_no_auroc(
    raw_log: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *settings, "--data-dir", str(raw_log)]) == 0
    assert main(["train", *settings, "--task-weights", "price:1"]) == 0
    assert "AUROC" not in capsys.readouterr().out


def test_two_commands_do_not_share_a_run_directory(
    raw_log: Path, tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    hold = "import sys; from runkit.run import Run\nwith Run(sys.argv[1]).command('train'): print(); input()"
    command = [sys.executable, "-uc", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        assert main(["prepare", *settings, "--data-dir", str(raw_log)]) == 1
        assert f"in use by `train`, process {other.pid}" in capsys.readouterr().err
        other.kill()
    assert main(["prepare", *settings, "--data-dir", str(raw_log)]) == 0


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_an_empty_file_overrides_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.yaml").write_text(text)
    (tmp_path / "seed.yaml").write_text("seed: 5")
    files = ["--config", str(tmp_path / "seed.yaml"), f"--config={tmp_path / 'empty.yaml'}"]
    assert APP.parse("train", files).seed == 5


@pytest.mark.parametrize("text", ["train: {num_epochs: 3", "a: b: c", "- 1", "soon"])
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "wrong.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ubt train: error: {tmp_path / 'wrong.yaml'}") and error.count("\n") == 1


def test_torchrun_says_how_many_processes_train(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    monkeypatch.setattr("ubt.pipeline._train", lambda config, facts: found.append(config.train.processes))
    for variable, value in (("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(variable, value)
    assert main(["train", *settings]) == main(["train", *settings, "--processes", "2"]) == 0
    assert found == [2, 2]
    assert main(["train", *settings, "--processes", "3"]) == 2
    assert "train.processes: got 3, needs 2, the processes that were started" in capsys.readouterr().err


@pytest.mark.parametrize("preset", APP.preset_names())
def test_presets_are_configs(preset: str) -> None:
    assert isinstance(APP.parse("run", ["--config", preset]), Config)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert "ubt prepare" in overview and "demo" in overview
    assert main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "number of clients in the log" in text and "writes the log itself" in text
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--train.learning_rate" in text and "--generate.clients" not in text and "examples:" in text


def broken(raw: Path, table: str, change: str) -> None:
    path = raw / f"{table}.parquet"
    frame = pd.read_parquet(path)
    if change == "gone":
        path.unlink()
        return
    if change == "column":
        frame = frame.drop(columns=frame.columns[2])
    else:
        frame.loc[3, "timestamp"] = "yesterday"
    frame.to_parquet(path, index=False)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("add_to_cart", "gone", "add_to_cart.parquet: not found"),
        ("page_visit", "column", "page_visit.parquet: no column 'url'; there is: client_id, timestamp"),
        ("search_query", "time", "yesterday"),
    ],
)
def test_a_broken_log_is_named(
    raw_copy: Path,
    settings: list[str],
    capsys: pytest.CaptureFixture[str],
    table: str,
    change: str,
    message: str,
) -> None:
    broken(raw_copy, table, change)
    assert main(["prepare", *settings, "--data-dir", str(raw_copy)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ubt prepare: error: ") and message in captured.err
    assert "Traceback" not in captured.err
    assert main(["train", *settings]) == 1
    assert "run `ubt prepare`" in capsys.readouterr().err


def test_duplicate_clients_are_named(raw_copy: Path, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    users = np.load(raw_copy / "input" / "relevant_clients.npy")
    np.save(raw_copy / "input" / "relevant_clients.npy", np.r_[users, users[:2]])
    assert main(["prepare", *settings, "--data-dir", str(raw_copy)]) == 1
    assert "2 duplicates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "got 'frobnicate', needs one of generate, prepare"),
        (["prepare", "--data-dir", "/nowhere"], "/nowhere is not a folder"),
        (["prepare", "--data-dir", "$FOOTFALL_NOT_SET/x"], "names an environment variable that is not set"),
        (["embed"], "run `ubt prepare`"),
    ],
)
def test_wrong_commands_say_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    extra = [] if len(arguments) == 1 and arguments[0] == "frobnicate" else ["--run-dir", str(tmp_path / "run")]
    assert main([*arguments, *extra]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--processes 0", "train.processes: got '0', needs a whole number above 0"),
        ("--processes -1", "train.processes: got '-1'"),
        ("--threads -1", "train.threads: got '-1', needs a whole number, 0 or more"),
        ("--focal_gamma -1", "train.focal_gamma: got '-1'"),
        ("--focal_gamma .nan", "train.focal_gamma: got '.nan'"),
        ("--balance 1.0", "train.balance: got '1.0', needs a share from 0 to below 1"),
        ("--id_size 0", "model.id_size: got '0'"),
        ("--time_buckets 0", "model.time_buckets: got '0'"),
        ("--dropout 1.5", "model.dropout: got '1.5', needs a share from 0 to below 1"),
        ("--id_dropout -0.1", "model.id_dropout: got '-0.1'"),
        ("--weighting best", "train.weighting: got 'best', needs one of static, uncertainty, dwa, gradnorm"),
        ("--windows_days []", "features.windows_days: got none"),
        ("--windows_days [0]", "features.windows_days: got '[0]'"),
        ("--clients 3", "generate.clients: got 3, needs at least 100"),
        ("--blocks hstu,hstu", "blocks: got 'hstu,hstu', needs some of"),
        ("--seed -1", "seed: got '-1', needs a whole number from 0"),
        ("--score.width 0", "score.width: got '0'"),
    ],
)
def test_a_setting_without_sense_is_named_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert main(["train", *option.split(), "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"ubt train: error: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {num_epochs: 3}", "trian"),
        ("train: {epochs: 3}", "epochs"),
        ("train: {num_epochs: many}", "num_epochs"),
    ],
)
def test_a_wrong_yaml_key_or_value_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "wrong.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": "when"}, "log.time: no column 'when'"),
        ({"train_start": None}, "log.train_start: missing"),
        ({"valid_start": "2024-03-01"}, "needs train_start < valid_start <= end"),
        ({"files": ["*.csv"]}, "nothing in"),
        ({"train_start": "soon"}, "got 'soon'"),
    ],
)
def test_a_wrong_description_of_a_log_is_named(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    foreign_log(tmp_path / "log")
    described = yaml.safe_load(FOREIGN)
    described["log"] |= change
    described["log"] = {key: str(v) if "start" in key and v else v for key, v in described["log"].items()}
    (tmp_path / "foreign.yaml").write_text(yaml.safe_dump(described))
    command = ["prepare", "--config", str(tmp_path / "foreign.yaml"), *settings, "--data-dir", str(tmp_path / "log")]
    assert main(command) == 1
    assert message in capsys.readouterr().err
