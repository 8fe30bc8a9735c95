"""The command line: one name for a setting, one form for an error, one exit code for each way to end."""

import logging
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from runkit.cli import App, Command
from runkit.errors import SettingError
from runkit.progress import progress
from runkit.run import Run
from runkit.settings import settings_of


@dataclass
class Split:
    """How rows are held out.

    Args:
        share: share of the rows
        kind: which rows
    """

    share: float = 0.2
    kind: Literal["newest", "random"] = "newest"


@dataclass
class Train:
    """How the model is fitted.

    Args:
        learning_rate: step size
        epochs: passes over the rows
        split: how rows are held out
        trees: parameters of the trees
        name: a name beside that of the log
    """

    learning_rate: float = 0.1
    epochs: int | None = 3
    split: Split = field(default_factory=lambda: Split(share=0.3))
    trees: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if self.name == "post":
            raise ValueError("train.name: got 'post', needs another")


@dataclass
class Log:
    """The log.

    Args:
        files: which files
        columns: which columns
        name: what it is called
        start: first day
    """

    files: str | list[str] = "all"
    columns: list[int] = field(default_factory=list)
    name: str | None = None
    start: str | None = None


@dataclass
class Config:
    """All settings.

    Args:
        run_dir: where results go
        train: how the model is fitted
        log: the log
        seed: of everything
        resume: go on
        progress: show bars
    """

    run_dir: str = "runs/x"
    train: Train = field(default_factory=Train)
    log: Log = field(default_factory=Log)
    seed: int = 1
    resume: bool = False
    progress: bool = True

    def check(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, needs 0 or more")


@dataclass
class Import:
    """What is read.

    Args:
        source: its name
        path: where it lies
    """

    source: Literal["cdnow", "retail"]
    path: Path = Path("data")


class LibraryError(Exception):
    """As a library has them."""


RAISED: dict[str, BaseException] = {
    "value": ValueError("rows:\n got 0, needs 1"),
    "lookup": LookupError("x"),
    "key": KeyError("file: no column 'x'"),
    "type": TypeError("no"),
    "library": LibraryError("broken tree"),
    "setting": SettingError("log.name: got 'setting', needs another"),
    "interrupt": KeyboardInterrupt(),
}


def train(config: Config) -> str | None:
    with Run(config.run_dir).command("train", config) as facts:
        logging.getLogger("tiny.train").info("it goes on")
        logging.getLogger("else").info("noise")
        facts["epochs"] = config.train.epochs
        if config.log.name in RAISED:
            raise RAISED[config.log.name]
        if config.log.name == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
    return f"seed {config.seed}"


@pytest.fixture
def app(tmp_path: Path) -> App:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "small.yaml").write_text("train: {epochs: 1}\nlog: {start: 2024-03-21}")
    commands = {
        "train": Command(train, Config, "fit the model\n\nIt takes a while."),
        "score": Command(lambda config: None, Config, "score it", ("train.split", "seed")),
        "import": Command(lambda config: str(config), Import, "read a log"),
    }
    return App("tiny", "A tiny app.", commands, tmp_path / "presets", "  tiny train --config small\n")


def test_a_setting_has_one_name_everywhere(app: App, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {epochs: 7, learning_rate: 1e-2}\nseed: 4\nlog:\n")
    words = f"--config small --config={tmp_path / 'a.yaml'} --learning-rate=1e-3 --share .5 --train.trees.max-leaves 4"
    config = app.parse("train", [*words.split(), "--train.trees.rate", "0.1", "--resume", "--log.name", "a b"])
    assert config == Config(
        train=Train(1e-3, 7, Split(0.5), {"max-leaves": 4, "rate": 0.1}),
        log=Log(name="a b", start="2024-03-21"),
        seed=4,
        resume=True,
    )
    assert type(config.train.split) is Split and app.parse("train").train.split.share == 0.3


def test_later_files_win_and_options_win_over_files(app: App, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 2\nrun_dir: a")
    (tmp_path / "b.yaml").write_text("seed: 3")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert (app.parse("train", files).seed, app.parse("train", files).run_dir) == (3, "a")
    assert app.parse("train", ["--seed", "9", *files]).seed == 9


@pytest.mark.parametrize("name", ["small", "small.yaml", "config/small.yaml"])
def test_a_preset_is_known_by_its_name(app: App, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert app.parse("train", ["--config", name]).train.epochs == 1


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "train:\nlog: {}\n"])
def test_an_empty_file_overrides_nothing(app: App, tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.yaml").write_text(text)
    assert app.parse("train", ["--config", "small", "--config", str(tmp_path / "empty.yaml")]).train.epochs == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--resume --seed -1e0", None),
        ("--progress false --seed 3", (False, False, 3)),
        ("--no-progress --resume", (True, False, 1)),
        ("--no_progress --resume=true --no-resume", (False, False, 1)),
    ],
)
def test_switches_stand_alone(app: App, words: str, expected: tuple | None) -> None:
    if expected is None:
        with pytest.raises(SettingError, match="seed: got '-1e0', needs a whole number"):
            app.parse("train", words.split())
        return
    config = app.parse("train", words.split())
    assert (config.resume, config.progress, config.seed) == expected


@pytest.mark.parametrize(
    ("words", "files", "columns"),
    [
        (["--files", "a.csv"], "a.csv", []),
        (["--files", "a.csv", "b.csv", "--columns", "3"], ["a.csv", "b.csv"], [3]),
        (["--files", "[a.csv, b.csv]", "--columns", "[1,2]"], ["a.csv", "b.csv"], [1, 2]),
        (["--columns", "1", "2", "--columns+", "3"], "all", [1, 2, 3]),
    ],
)
def test_a_list_takes_words_or_brackets(app: App, words: list[str], files: Any, columns: list[int]) -> None:
    log = app.parse("train", words).log
    assert (log.files, log.columns) == (files, columns)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--seed x", "seed: got 'x', needs a whole number"),
        ("--seed 1.5", "seed: got '1.5', needs a whole number"),
        ("--seed", "seed: got nothing, needs a whole number"),
        ("--seed 1 2", "seed: got 1 2, needs a whole number"),
        ("--epochs soon", "train.epochs: got 'soon', needs a whole number or null"),
        ("--kind oldest", "train.split.kind: got 'oldest', needs one of newest, random"),
        ("--columns a", "log.columns: got 'a', needs a list such as [a, b]"),
        ("--columns 1 b", "log.columns: got ['1', 'b'], needs a list such as [a, b]"),
        ("--trees 3", "train.trees: got '3', needs settings such as {key: value}"),
        ("--resume maybe", "resume: got 'maybe', needs true or false"),
        ("--lerning-rate 3", "--lerning-rate: got a setting that is not known, needs one that --help lists such as"),
        ("--no-seed", "--no-seed: got a setting that is not known"),
        ("--name x", "--name: got the last part of several settings, needs one of train.name, log.name"),
        ("--resume --run-dir a stray", "run_dir: got a stray, needs text"),
        ("--config nowhere.yaml", "config: got nowhere.yaml, needs a YAML file or one of the presets small"),
        ("--config", "config: got nothing, needs a YAML file"),
        ("--seed -1", "seed: got -1, needs 0 or more"),
        ("--train.name post", "train.name: got 'post', needs another"),
    ],
)
def test_a_wrong_setting_is_one_line(
    app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, says: str
) -> None:
    assert app.main(["train", "--run-dir", str(tmp_path / "run"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tiny train: error: {says}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {epochs: 3", ", line "),
        ("seed: 1\na: b: c", ", line 2: got no YAML (mapping values are not allowed"),
        ("- 1", ": got [1], needs settings such as `seed: 1`"),
        ("trian: {epochs: 3}", ": trian: got a setting that is not known, needs one that --help lists such as train"),
        ("train: {epoch: 3}", ": train.epoch: got a setting that is not known, needs one that --help lists such as"),
        ("train: 3", ": train: got 3, needs settings such as {key: value}"),
        ("log: {columns: [a]}", "log.columns: got ['a'], needs a list such as [a, b]"),
        ("run_dir: 3", "run_dir: got 3, needs text"),
    ],
)
def test_a_wrong_file_is_named(
    app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    assert app.main(["train", "--config", str(tmp_path / "wrong.yaml")]) == 2
    error = capsys.readouterr().err
    where = str(tmp_path / "wrong.yaml") if says[0] in ":," else ""
    assert error.startswith(f"tiny train: error: {where}{says}") and error.count("\n") == 1


def test_a_required_setting_is_asked_for(app: App, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["import"]) == 2
    assert capsys.readouterr().err == "tiny import: error: source: got nothing, needs one of cdnow, retail\n"
    assert app.main(["import", "--source", "cdnow", "--path", "/x"]) == 0
    assert capsys.readouterr().out == f"{Import('cdnow', Path('/x'))}\n"


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [
        ("value", 1, "rows: got 0, needs 1"),
        ("lookup", 1, "LookupError: x"),
        ("key", 1, "file: no column 'x'"),
        ("type", 1, "TypeError: no"),
        ("library", 1, "broken tree"),
        ("setting", 2, "log.name: got 'setting', needs another"),
    ],
)
def test_work_that_fails_is_one_line_and_a_traceback_in_the_log(
    app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, code: int, says: str
) -> None:
    words = ["train", "--run-dir", str(tmp_path / "run"), "--log.name", kind]
    log = tmp_path / "run" / "logs" / "train.log"
    assert app.main(words) == code
    lines = capsys.readouterr().err.splitlines()
    where = f" (traceback in {log})" if code == 1 else ""
    assert lines[-1] == f"tiny train: error: {says}{where}" and not [line for line in lines if "Traceback" in line]
    assert "Traceback" in log.read_text()
    assert app.main([*words, "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "code"), [("interrupt", 130), ("terminate", 143)])
def test_an_interrupt_has_its_own_code(
    app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert app.main(["train", "--run-dir", str(tmp_path), "--log.name", kind]) == code
    line = "tiny train: interrupted; the same command with --resume goes on"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert "train interrupted" in (tmp_path / "logs" / "train.log").read_text()
    assert signal.getsignal(signal.SIGTERM) == before and not (tmp_path / ".running.json").exists()


def test_results_go_to_stdout_and_the_apps_own_lines_to_stderr(
    app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = logging.getLogger().handlers[:]
    assert app.main(["train", "--run-dir", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.out == "seed 1\n" and "it goes on" in told.err and "noise" not in told.err
    assert "noise" in (tmp_path / "logs" / "train.log").read_text()
    assert logging.getLogger().handlers == handlers


def test_help_teaches(app: App, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        assert app.main(words) == 0
        text = capsys.readouterr().out
        assert "tiny train   fit the model\n" in text and "presets: small" in text and "A tiny app." in text
    assert app.main(["train", "--seed", "x", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("It takes a while.", "How rows are held out.", "--train.split.share", "default: 0.3", "small"):
        assert part in text
    assert "--train.learning_rate" in text and "examples:\n  tiny train --config small" in text
    assert app.main(["score", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--train.split.kind {newest,random}" in text and "--seed" in text
    assert "--train.learning_rate" not in text and "--log.name" not in text
    assert app.main(["import", "-h"]) == 0 and "(required, type" in capsys.readouterr().out


def test_an_inherited_setting_is_explained_as_where_it_was_declared() -> None:
    @dataclass
    class Wider(Split):
        """More of it.

        Args:
            kind: which rows, differently
        """

        kind: Literal["newest", "random"] = "random"

    found = settings_of(Wider)
    assert [one.help for one in found.values()] == ["share of the rows", "which rows, differently"]
    assert found["share"].about == "More of it."


def test_what_comes_out_is_a_file_that_goes_in(app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "small", "--share", ".7", "--columns", "1", "2"]
    assert app.main(["train", *words, "--print-config"]) == 0
    (tmp_path / "out.yaml").write_text(capsys.readouterr().out)
    assert app.parse("train", ["--config", str(tmp_path / "out.yaml")]) == app.parse("train", words)
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["train"]["split"]["share"] == 0.7


def test_an_unknown_command_and_the_version(app: App, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["train", "stray"]) == 2
    told = "tiny train: error: command line: got 'stray', needs settings such as --name value\n"
    assert capsys.readouterr().err == told
    assert app.main(["frobnicate"]) == 2
    told = "tiny: error: command: got 'frobnicate', needs one of train, score, import\n"
    assert capsys.readouterr().err == told
    assert app.main(["--version"]) == 0 and capsys.readouterr().out.startswith("tiny ")


def test_one_switch_turns_all_bars_off(app: App, tmp_path: Path) -> None:
    bars = []
    watched = App("tiny", "", {"train": Command(lambda _: bars.append(progress(3, "read", "row")), Config, "x")})
    assert watched.main(["train", "--no-progress"]) == watched.main(["train"]) == 0
    assert [bar.disable for bar in bars] == [True, False] and bars[1].total == 3
    bars[1].close()
    assert list(progress([1, 2], "read")) == [1, 2]
