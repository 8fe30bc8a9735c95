"""The command line ``ltv``: a command is a few lines here and a module of its own behind them."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from ltv.config import Comparison, Config, ImportConfig, Slice, Submission
from synthlogs.settings import AdsConfig

HELP = """\
Predict what a user will spend: in 1, 7, 14 and 28 days, in order, with intervals.

  ltv generate --data-dir data/raw                                  a log in the published 84-column layout
  ltv train --config config/config_test.yaml --data.root data/raw   fit, save, score the validation window
  ltv predict --config config/config_test.yaml --data.root data/raw stream the test window, write submission.csv
  ltv dashboard --runs runs                                         look at the runs in a browser

config/config.yaml (production) and config/config_test.yaml (minutes) are shipped; a file of your own holds what
differs from the defaults. `ltv <command> --help` lists every setting of a command; any of them can be given on the
command line as --data.root, --models.model, ...
"""
NEEDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "text",
    "<class 'bool'>": "true or false",
    "<class 'list'>": "a list such as [a, b]",
    "<class 'dict'>": "settings such as {key: value}",
    "<class 'NoneType'>": "null",
}
SPLITS = (
    "--split, --start-dt, --end-dt, --sample-frac, --max-partitions, --limit-rows and --chunk-size choose the rows."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after an error that one line explains."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        words = _spelt_out(words)
    except ValueError as error:
        print(f"ltv {words[0]}: error: {error}", file=sys.stderr)
        return 2
    given = parser.parse_args(words)
    try:
        COMMANDS[given.subcommand][1](given[given.subcommand])
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, RuntimeError, ImportError, LookupError, TypeError, _lightgbm())):
            raise
        # The bare text of these two does not say what went wrong.
        kind = f"{type(error).__name__}: " if isinstance(error, (LookupError, TypeError)) else ""
        print(f"ltv {given.subcommand}: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _lightgbm() -> type[Exception]:
    # LightGBM is imported by the commands that need it.
    from lightgbm.basic import LightGBMError

    return LightGBMError


def build_parser() -> ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(prog="ltv", description=HELP, formatter_class=_Help)
    commands = parser.add_subcommands(title="commands")
    for name, (arguments, _, text) in COMMANDS.items():
        command = _Parser(description=text, usage=f"ltv {name} [options]", formatter_class=_Help)
        arguments(command)
        commands.add_subcommand(name, command, help=text.split("\n")[0])
    return parser


class _Parser(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"{parser.prog.replace(' [options]', '')}: error: {_condensed(message)}\n")


def _condensed(message: str) -> str:
    """The setting, what it got and what it needs, from jsonargparse's message; the whole message where it has none."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    kinds = re.findall(r"Expected an? (<class '\w+'>|[\w.]+\[.*?\](?=\.? |\.?\n|\.?$))", message)
    if not (key and value and kinds):
        return " ".join(message.split())
    name = key[1] if "." in key[1] or key[1] in _settings() else f"--{key[1].replace('_', '-')}"
    needs = [NEEDS.get(kind) or f"one of {kind.partition('[')[2][:-1]}" for kind in kinds]
    return f"{name}: got {' '.join(value[1].split())!r}, needs {' or '.join(needs)}"


class _Help(DefaultHelpFormatter):
    """Keeps the line breaks of descriptions."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())


def _generate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=str, default="data/raw", help="folder to write; only a log written here before is replaced"
    )
    _add_fields(parser, AdsConfig)


def _generate(given: Namespace) -> None:
    from synthlogs.ads import generate

    result = generate(given.data_dir, _built(AdsConfig, given))
    for key, value in result.items():
        print(f"{key:20} {value:.6g}")


def _import_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--source", type=str, required=True, help="cdnow or online_retail")
    parser.add_argument("--path", type=str, required=True, help="the published file, or the folder that holds it")
    parser.add_argument("--data-dir", type=str, required=True, help="folder to write; must be empty or missing")
    _add_fields(parser, ImportConfig)


def _import(given: Namespace) -> None:
    from ltv.transactions import import_transactions

    config = _built(ImportConfig, given)
    for key, value in import_transactions(given.source, given.path, given.data_dir, config).items():
        print(f"{key:30} {value}")


def _run_arguments(split: str, resume: bool) -> Callable[[ArgumentParser], None]:
    def add(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--config", action="config", help="YAML file; config/config.yaml and _test.yaml are shipped"
        )
        _add_fields(parser, Slice)
        parser.set_defaults(split=split)
        if resume:
            parser.add_argument("--resume", action="store_true", help="keep what an interrupted run finished")
        parser.add_class_arguments(Config, as_group=False)

    return add


def _train(given: Namespace) -> None:
    from ltv.train import train

    train(_built(Config, given), _built(Slice, given), given.resume)


def _predict(given: Namespace) -> None:
    from ltv.predict import predict

    print(predict(_built(Config, given), _built(Slice, given), given.resume))


def _evaluate(given: Namespace) -> None:
    from ltv.evaluate import evaluate_split

    evaluate_split(_built(Config, given), _built(Slice, given))


def _validate(given: Namespace) -> None:
    from ltv.evaluate import validate

    name = Path(given.config[0].absolute).stem if given.config and given.config[0] else "default"
    validate(_built(Config, given), _built(Slice, given), name)


def _compare_arguments(parser: ArgumentParser) -> None:
    _run_arguments("val", resume=True)(parser)
    _add_fields(parser, Comparison)


def _compare(given: Namespace) -> None:
    from ltv.compare import compare

    print(compare(_built(Config, given), _built(Slice, given), _built(Comparison, given), given.resume))


def _submit_arguments(parser: ArgumentParser) -> None:
    _run_arguments("test", resume=False)(parser)
    _add_fields(parser, Submission)


def _submit(given: Namespace) -> None:
    from ltv.submit import submit

    print(submit(_built(Config, given), _built(Submission, given), _built(Slice, given)))


def _dashboard_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--runs", type=str, default="runs", help="folder of run directories, or one run directory")
    parser.add_argument("--port", type=int, default=8501, help="port on localhost")


def _dashboard(given: Namespace) -> None:
    from ltv.dashboard import serve

    serve(given.runs, given.port)


COMMANDS: dict[str, tuple[Callable[[ArgumentParser], None], Callable[[Namespace], None], str]] = {
    "generate": (
        _generate_arguments,
        _generate,
        "Write a log in the published 84-column layout, with planted truth.\n\n"
        "train/train and test/test hold hourly partitions datetime=YYYY-MM-DD-HH-MM; truth/ holds every row's labels\n"
        "and the best predictions anyone could make. 2 million rows take minutes and little memory.",
    ),
    "import": (
        _import_arguments,
        _import,
        "Turn CDNOW or Online Retail into daily partitions for `data.layout: transactions`.\n\n"
        "One row per customer: features of the first days, ordered labels of the horizons after them.",
    ),
    "train": (
        _run_arguments("train", resume=True),
        _train,
        "Fit the pipeline on the train window, save it, score the validation window.\n\n"
        f"Models go below <run_dir>/models. {SPLITS}",
    ),
    "predict": (
        _run_arguments("test", resume=True),
        _predict,
        f"Stream a slice through the saved pipeline; write predictions per partition and submission.csv.\n\n{SPLITS}",
    ),
    "evaluate": (
        _run_arguments("val", resume=False),
        _evaluate,
        f"Score a slice with known outcome: metrics, report.html, plots, predictions.\n\n{SPLITS}",
    ),
    "validate": (
        _run_arguments("val", resume=False),
        _validate,
        f"Check the data for leaks and every stage on train and validation rows.\n\n{SPLITS}",
    ),
    "compare": (
        _compare_arguments,
        _compare,
        "Fit several models on the same rows, or line up finished runs; write compare.md.\n\n"
        "--variants log1p ziln two_stage ... fits each below <run_dir>/<variant>; --runs A B only reads their metrics.",
    ),
    "submit": (
        _submit_arguments,
        _submit,
        "Check submission.csv against the ids that are asked for and hand it in with the kaggle command.",
    ),
    "dashboard": (_dashboard_arguments, _dashboard, "Look at runs in a browser (needs the extra `dashboard`)."),
}


def _add_fields(parser: ArgumentParser, kind: type) -> None:
    """Add one flag per field of a dataclass, spelt with hyphens, explained by the class's docstring."""
    texts = {one.arg_name: one.description for one in parse(kind.__doc__ or "").params}
    hints = get_type_hints(kind)
    for field in fields(kind):
        flag, text = f"--{field.name.replace('_', '-')}", texts[field.name]
        default = getattr(kind(), field.name)
        if hints[field.name] is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif get_origin(hints[field.name]) is list:
            element = get_args(hints[field.name])[0]
            parser.add_argument(flag, nargs="+", type=element, default=default, help=text)
        else:
            parser.add_argument(flag, type=hints[field.name], default=default, help=text)


def _built(kind: Any, given: Namespace) -> Any:
    """Return the dataclass `kind` with its values, and those of the dataclasses in it, taken from the command line."""
    hints = get_type_hints(kind)
    values = {field.name: given[field.name] for field in fields(kind)}
    return kind(**{name: _built(hints[name], v) if is_dataclass(hints[name]) else v for name, v in values.items()})


def _spelt_out(argv: list[str]) -> list[str]:
    """Let --run-dir stand for --run_dir, and ``--config config/config_test.yaml`` name a shipped file.

    A file of that name that lies here goes first.
    """
    settings = _settings()
    words: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and ("." in name or name in settings):
            flag = f"--{name}"
        if flag == "--config" and equals:
            value = _shipped(value)
        elif words and words[-1] == "--config":
            flag = _shipped(flag)
        words.append(flag + equals + value)
    return words


def _settings() -> set[str]:
    return {field.name for field in fields(Config)}


def _shipped(config: str) -> str:
    """The settings file that is meant, or "{}" for an empty one.

    Raises:
        ValueError: if it is no YAML file of settings; names file and line.
    """
    shipped = files("ltv") / "config" / Path(config).name
    path = Path(config) if Path(config).exists() or not shipped.is_file() else Path(str(shipped))
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"--config: {path}, line {line} is not YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config: got {config}, needs a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise ValueError(f"--config: {path} holds a {type(content).__name__}, needs settings such as `seed: 1`")
    return str(path) if content else "{}"


if __name__ == "__main__":
    sys.exit(main())
