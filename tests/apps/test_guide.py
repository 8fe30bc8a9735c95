"""The app of CONTRIBUTING.md works as it stands on the page, and does what the page says."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.apps.guide import PAGE, write_app


def write_log(path: Path, users: int = 300) -> None:
    """Customers of three rates; most of the slow ones stop at some day."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(users):
        ends = rng.uniform(20, 200) if user % 3 else 160.0
        days = np.cumsum(rng.exponential((3.0, 8.0, 20.0)[user % 3], 200))
        rows += [(f"u{user}", day) for day in days[days < min(ends, 160.0)]]
    frame = pd.DataFrame(rows, columns=["user", "time"])
    frame["time"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(frame["time"], unit="D")
    frame.to_csv(path, index=False)


@pytest.fixture(scope="module")
def churn(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("guide")
    write_app(folder / "src")
    write_log(folder / "events.csv")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "src"), *sys.path])}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "churn", *words]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    run.folder = folder  # type: ignore[attr-defined]
    return run


def test_the_app_trains_resumes_and_compares(churn) -> None:
    first = churn("train", "--window-days", "14")
    assert first.returncode == 0 and "did not come back" in first.stdout, first.stderr
    folder = churn.folder / "runs" / "churn"
    made = (folder / "model" / "model.npz").stat().st_mtime_ns
    again = churn("train", "--window-days=14", "--resume")
    assert again.stdout == "the model is of these settings and this log: kept\n"
    assert (folder / "model" / "model.npz").stat().st_mtime_ns == made
    scored = churn("score", "--window_days", "14")
    assert scored.returncode == 0, scored.stderr
    assert "minus last visit" in scored.stdout and any(word in scored.stdout for word in ("win", "tie", "LOSE"))
    table = (folder / "compare.md").read_text()
    assert table.startswith("| method | score | minus last visit | verdict |\n")
    areas = json.loads((folder / "metrics.json").read_text())["auroc"]
    assert areas["model"] > areas["last visit"] > 0.5
    assert (folder / "plots" / "calibration.png").stat().st_size > 1000
    record = json.loads((folder / "metadata.json").read_text())
    assert record["commands"]["score"]["wall_seconds"] > 0 and set(record["commands"]) == {"train", "score"}
    other = churn("score", "--window-days", "15")
    assert (
        other.returncode == 1 and "needs `churn train` again (traceback in runs/churn/logs/score.log)" in other.stderr
    )


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("train --window-days soon", 2, "window_days: got 'soon', needs a number"),
        ("train --window-days 0", 2, "window_days: got 0.0, needs a number of days above 0"),
        ("train --history-days 7 -1", 2, "model.history_days: got [7.0, -1.0], needs numbers of days above 0"),
        ("train --user who --run-dir runs/a", 2, "log: got the columns user, time, needs who too"),
        ("score --run-dir runs/b", 1, "run_dir: got runs/b, needs a model; run `churn train` first (traceback in"),
    ],
)
def test_what_is_wrong_is_one_line(churn, words: str, code: int, says: str) -> None:
    done = churn(*words.split())
    lines = done.stderr.splitlines()
    assert done.returncode == code and lines[-1].startswith(f"churn {words.split()[0]}: error: {says}"), done.stderr


def test_help_teaches(churn) -> None:
    assert "churn score  compare it with the last visit alone" in churn("--help").stdout
    text = churn("train", "--help").stdout
    for part in (
        "--model.history_days",
        "who has no event in so many days does not come back",
        "default: 28.0",
        "The model.",
    ):
        assert part in text


def test_features_do_not_know_what_comes_after_the_cutoff(churn, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import numpy as np, pandas as pd
from churn.config import Config
from churn.model import examples
frame = pd.read_csv("events.csv")
time = pd.to_datetime(frame["time"])
late = time >= time.max() - pd.Timedelta(days=28)
keep = ~late | (time == time.max()) | (np.arange(len(frame)) % 2 == 0)
frame[keep].to_csv("changed.csv", index=False)
(a, x), (b, y) = (examples(Config(log=name), 1) for name in ("events.csv", "changed.csv"))
assert np.array_equal(a, b) and not np.array_equal(x, y)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(churn.folder / "src"), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=churn.folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_page_names_what_runkit_has() -> None:
    """Every `room.name` of the page's table is in runkit."""
    source = Path(__file__).parents[2] / "packages" / "runkit" / "src" / "runkit"
    table = PAGE.read_text().split("| wanted | in runkit |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        module = ""
        for name in (part for i, part in enumerate(line.split("|")[2].split("`")) if i % 2):
            if name == "training":
                break
            first, _, rest = name.partition(".")
            module, name = (first, rest) if rest else (module, name)
            if name == "plots" or not name:
                break
            tree = ast.parse((source / f"{module}.py").read_text())
            defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            assert set(name.split(".")) <= defined, f"{module}.{name}"
