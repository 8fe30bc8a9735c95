"""The command writes what the library writes, teaches, and says in one line what is wrong."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from synthlogs.cli import LOGS, main
from synthlogs.folder import MARK

SMALL = {
    "shop": ["--clients", "100"],
    "ads": ["--rows", "30", "--hours", "2", "--test-rows", "4", "--test-hours", "1"],
    "purchases": ["--rows", "1000", "--products", "100", "--days", "3"],
    "baskets": ["--customers", "30", "--products", "100", "--weeks", "3", "--stores", "3"],
    "friends": ["--users", "300", "--days", "5"],
}


@pytest.mark.parametrize("name", LOGS)
def test_a_command_writes_a_log_and_says_what_it_holds(name, tmp_path, capsys):
    assert main([name, str(tmp_path / "log"), *SMALL[name], "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert (tmp_path / "log" / MARK).exists() and len(captured.out.splitlines()) > 2
    assert captured.err == ""
    before = {path: path.read_bytes() for path in (tmp_path / "log").rglob("*") if path.is_file()}
    assert main([name, str(tmp_path / "log"), *SMALL[name], "--seed=3", "--no-progress"]) == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "log").rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("name", LOGS)
def test_one_log_never_replaces_another(name, tmp_path, capsys):
    other = next(one for one in LOGS if one != name)
    assert main([name, str(tmp_path), *SMALL[name]]) == 0
    capsys.readouterr()
    assert main([other, str(tmp_path), *SMALL[other]]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"synthlogs {other}: error: folder: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", LOGS)
def test_help_names_every_option_with_its_default_and_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "example:" in text
    for field in fields(LOGS[name].settings):
        assert f"--{field.name.replace('_', '-')} " in text and f"(default: {field.default})" in text


def test_the_overview_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"synthlogs {name} " in text for name in LOGS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["shop"], "OUT"),
        (["shop", "OUT", "--clients", "3k"], "--clients: invalid int value: '3k'"),
        (["shop", "OUT", "--clients", "3"], "--clients: got 3, needs at least 100"),
        (["ads", "OUT", "--drift", "nan"], "--drift: got nan, needs a number in [0, 1]"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(words, message, tmp_path, capsys):
    try:
        code = main([str(tmp_path / "log") if word == "OUT" else word for word in words])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1 and error.startswith("synthlogs")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_one_line_and_exit_1(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["shop", str(tmp_path / "file" / "log"), *SMALL["shop"]]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing(sent, code, tmp_path: Path):
    source = "from synthlogs.cli import entry; entry()"
    words = [sys.executable, "-c", source, "shop", str(tmp_path / "log"), "--clients", "3000000"]
    # The shell that runs the tests may have told its children to ignore Ctrl-C.
    process = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for _ in range(600):
        if list(tmp_path.glob(".log.*/*.parquet")):
            break
        time.sleep(0.05)
    os.kill(process.pid, sent)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code and list(tmp_path.iterdir()) == []
    assert error.count("\n") <= 1 and "Traceback" not in error
