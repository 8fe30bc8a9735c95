"""One form for every error and one exit code for each way to end, in every app that stands on runkit.

The apps are found by themselves: those below apps/ whose command line is runkit's, and the one of CONTRIBUTING.md.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runkit.run import Run
from tests.apps.guide import write_app

ROOT = Path(__file__).parents[2]
APPS = sorted(path.parent.name for path in ROOT.glob("apps/*/src/*/cli.py") if "runkit.cli" in path.read_text())
# What every command of an app says to the same wrong words, in one process: [command, code, stdout, stderr].
EVERY_COMMAND = """
import contextlib, importlib, io, json, sys
from runkit.cli import App
name, *words = sys.argv[1:]
app = next(one for one in vars(importlib.import_module(name + ".cli")).values() if isinstance(one, App))
found = []
for command in app.commands:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = app.main([command, *words])
    found.append([command, code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""
# A signal comes as soon as the command holds its run directory.
SIGNALLED = """
import contextlib, os, runpy, signal, sys, time
from runkit.run import Run
name, number = sys.argv[1], int(sys.argv[2])
command = Run.command
@contextlib.contextmanager
def interrupted(*arguments, **options):
    with command(*arguments, **options) as facts:
        os.kill(os.getpid(), number)
        time.sleep(30)
        yield facts
Run.command = interrupted
sys.argv = [name, *sys.argv[3:]]
runpy.run_module(name, run_name="__main__")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    guide = write_app(tmp_path_factory.mktemp("guide"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(guide), *sys.path])}

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, cwd=guide, capture_output=True, text=True, timeout=120)

    return run


every_app = pytest.mark.parametrize("app", [*APPS, "churn"])


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1] if done.stderr else ""


@every_app
def test_every_command_refuses_what_is_no_setting(app: str, python, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("seed: 1\na: b: c\n")
    (tmp_path / "unknown.yaml").write_text("nonsense: 3\n")
    for words, says in (
        (["--nonsense", "3"], "--nonsense: got a setting that is not known, needs "),
        (["--config", str(tmp_path / "broken.yaml")], f"{tmp_path / 'broken.yaml'}, line 2: got no YAML"),
        (["--config", str(tmp_path / "unknown.yaml")], f"{tmp_path / 'unknown.yaml'}: nonsense: got a setting that"),
        (["--config", str(tmp_path / "none.yaml")], f"config: got {tmp_path / 'none.yaml'}, needs a YAML file"),
    ):
        done = python("-c", EVERY_COMMAND, app, *words)
        assert done.returncode == 0, done.stderr
        for command, code, out, error in json.loads(done.stdout):
            assert (code, out, error.count("\n")) == (2, "", 1), (command, error)
            assert error.startswith(f"{app} {command}: error: {says}")


@every_app
def test_every_command_teaches(app: str, python) -> None:
    done = python("-c", EVERY_COMMAND, app, "--help")
    for command, code, out, error in json.loads(done.stdout):
        assert code == 0 and not error and f"usage: {app} {command} [--config FILE]" in out, command
        assert out.count("(type: ") + out.count("(required, type: ") + out.count("default: ") > 2, command
    overview = python("-m", app)
    assert overview.returncode == 0 and f"usage: {app} COMMAND" in overview.stdout
    wrong = python("-m", app, "frobnicate")
    assert wrong.returncode == 2 and last_line(wrong).startswith(f"{app}: error: command: got 'frobnicate', needs one")


@every_app
def test_a_run_folder_that_cannot_be_written_is_named(app: str, python, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = python("-m", app, "train", "--run-dir", tmp_path / "file" / "run")
    says = f"{app} train: error: run_dir: got {tmp_path / 'file' / 'run'}, needs a folder that can be written"
    assert done.returncode == 1 and last_line(done).startswith(says), done.stderr
    assert (tmp_path / "file").read_text() == "mine" and "Traceback" not in done.stderr


@every_app
def test_two_commands_do_not_share_a_run_folder(app: str, python, tmp_path: Path) -> None:
    with Run(tmp_path).command("other"):
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        done = python("-m", app, "train", "--run-dir", tmp_path)
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    says = f"{app} train: error: run_dir: got {tmp_path}, in use by `other`, process {os.getpid()}, since "
    assert done.returncode == 1 and last_line(done).startswith(says), done.stderr


@every_app
@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_a_command_with_its_own_code(app: str, number: int, code: int, python, tmp_path: Path) -> None:
    done = python("-c", SIGNALLED, app, number, "train", "--run-dir", tmp_path)
    assert done.returncode == code, done.stderr
    assert last_line(done).startswith(f"{app} train: interrupted") and "Traceback" not in done.stderr
    assert "train interrupted" in (tmp_path / "logs" / "train.log").read_text()
    with Run(tmp_path).command("next"):
        pass
