"""A run directory: one command at a time, and the record of what it did."""

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from runkit.run import BusyError, Run, is_helper, machine, peak_memory

HOLD = """
import sys, time
from runkit.run import Run
with Run(sys.argv[1]).command("train"):
    print("held", flush=True)
    time.sleep(60)
"""


@dataclass
class Config:
    """Settings.

    Args:
        seed: of everything
    """

    seed: int = 3


def test_a_command_leaves_its_settings_log_and_record(tmp_path: Path) -> None:
    run = Run(tmp_path / "deep" / "run")
    for _ in range(2):
        with run.command("train", Config(), ("numpy", "no-such-package")) as facts:
            logging.getLogger("some.library").info("epoch 1")
            facts["rows"] = 5
    run.add_metrics("val", {"auc": float("nan")})
    run.add_metrics("test", {"auc": 0.5})
    metadata = run.metadata()
    assert metadata["format"] == 1 and metadata["seed"] == 3 and metadata["machine"] == machine()
    assert metadata["versions"]["numpy"] and metadata["versions"]["no-such-package"] is None
    train = metadata["commands"]["train"]
    assert train["rows"] == 5 and train["wall_seconds"] >= 0 and train["peak_memory_mb"] > 5 and train["finished"]
    assert run.metrics() == {"val": {"auc": None}, "test": {"auc": 0.5}}
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == {"seed": 3}
    text = (run.logs / "train.log").read_text()
    assert text.count("INFO some.library: epoch 1") == text.count("train begins") == 2
    assert not (run.folder / ".running.json").exists()


def test_a_failure_is_logged_and_raised(tmp_path: Path) -> None:
    run, level = Run(tmp_path), logging.getLogger().level
    with pytest.raises(ZeroDivisionError) as caught, run.command("train"):
        _ = 1 / 0
    assert caught.value.runkit_log == str(run.logs / "train.log")  # type: ignore[attr-defined]
    assert "Traceback" in (run.logs / "train.log").read_text() and "train" not in run.metadata().get("commands", {})
    assert logging.getLogger().level == level
    with run.command("train"):
        pass


def test_a_second_command_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with (
            pytest.raises(BusyError, match=f"in use by `train`, process {first.pid}, since"),
            Run(tmp_path).command("x"),
        ):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    with Run(tmp_path).command("embed"):
        pass
    assert set(Run(tmp_path).metadata()["commands"]) == {"embed"}


def test_a_command_may_stand_inside_another(tmp_path: Path) -> None:
    with Run(tmp_path).command("run"):
        with Run(tmp_path).command("train"), Run(tmp_path / "variant").command("train"):
            pass
        held = json.loads((tmp_path / ".running.json").read_text())
        assert held["command"] == "run" and held["process"] == os.getpid()
    assert set(Run(tmp_path).metadata()["commands"]) == {"run", "train"}


def test_a_helper_process_locks_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert is_helper()
    with Run(tmp_path / "run").command("train", Config()) as facts:
        facts["x"] = 1
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    assert not is_helper()


def test_a_folder_that_cannot_be_and_a_damaged_record_are_named_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"run_dir: got .*file/run, needs a folder that can be written"):
        Run(tmp_path / "file" / "run").command("train").__enter__()
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match=r"metadata\.json: damaged"):
        Run(tmp_path).command("train").__enter__()


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_that_of_the_apps_own_repository(
    tmp_path: Path, tracked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = tmp_path / "repo" / "anapp"
    app.mkdir(parents=True)
    (app / "__init__.py").write_text("")
    (tmp_path / "repo" / "readme").write_text("")
    git(tmp_path / "repo", "init", "-q")
    git(tmp_path / "repo", "add", "." if tracked else "readme")
    git(tmp_path / "repo", "commit", "-q", "-m", "one")
    monkeypatch.syspath_prepend(tmp_path / "repo")
    with Run(tmp_path / "repo" / "runs").command("train", packages=("anapp",)):
        pass
    commit = git(tmp_path / "repo", "rev-parse", "HEAD").strip()
    assert Run(tmp_path / "repo" / "runs").metadata()["commit"] == (commit if tracked else None)


def test_memory_is_counted_in_megabytes() -> None:
    peak = peak_memory()
    assert peak is not None and 10 < peak < 100_000
