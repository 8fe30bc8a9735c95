"""The console script: one subcommand a step, and `ubt run` for all of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import duckdb
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from ubt.config import Config
from ubt.pipeline import STEPS, run

PRESETS = Path(str(files("ubt") / "configs"))
HELP = {
    "generate": "write a log in the RecSys Challenge 2025 layout, with signal planted in it, to data_dir",
    "prepare": "read the raw log and write store, targets and users to <run_dir>/prepared",
    "train": "train the network on what `ubt prepare` wrote; checkpoints go to <run_dir>/checkpoints",
    "embed": "write embeddings.npy and client_ids.npy with the best checkpoint, and the other blocks beside them",
    "score": "score blocks, alone and together, as the challenge does, on the window after the one of training",
    "update": "embed the users with new events, from what `ubt embed` kept of their old ones; other rows stay",
    "run": "all of it: generate (where the config says so), prepare, train, embed, score",
}
GROUPS = {
    "generate": ("generate",),
    "prepare": ("log", "prepare"),
    "train": ("model", "train"),
    "embed": ("embed", "features"),
    "score": ("features", "score", "train.threads"),
    "update": ("update", "embed", "log"),
    "run": ("generate", "log", "prepare", "model", "train", "embed", "features", "score"),
}
SECTIONS = ("generate", "log", "prepare", "model", "train", "embed", "update", "features", "score")
EPILOG = """\
A setting has one name everywhere: a key of the YAML file, an option here. An option may be shortened to its last part
and written with dashes: --train.learning_rate 1e-3, --learning_rate 1e-3 and --learning-rate 1e-3 are the same.
A switch may stand alone: --resume; --no-progress turns one off.
--config takes a file or the name of a preset ({presets}), also several times; later ones win.

examples:
  ubt run --config demo
  ubt run --config rees46 --data-dir ~/data/rees46 --run-dir runs/rees46
  ubt score --config demo --scorer official --blocks hstu,cf
  ubt train --config demo --num-epochs 5 --task-weights churn:1.0,category_propensity:0.5 --resume
  ubt update --config demo --new-data new_days --until "2022-10-20"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 for bad input, 2 for a bad command line, 130 for an interrupt."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_overview())
        return 0
    if command not in HELP:
        print(f"ubt: error: unknown command {command!r}, needs one of {', '.join(HELP)}", file=sys.stderr)
        return 2
    try:
        return run(STEPS if command == "run" else (command,), read_config(command, arguments[1:]))
    except (ValueError, KeyError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"ubt {command}: error: {message}", file=sys.stderr)
        return 1
    except duckdb.Error as error:
        print(f"ubt {command}: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\nubt {command}: interrupted; the same command with --resume goes on from the last epoch", file=sys.stderr
        )
        return 130


def entry() -> None:
    """Run the console script."""
    sys.exit(main())


def read_config(command: str, arguments: Sequence[str]) -> Config:
    """Return the config that files, presets and options give; help and errors exit as in argparse."""
    parser = _parser(command)
    settings = {action.dest: getattr(action, "default", None) for action in parser._actions}
    given = parser.parse_args(_spelled_out(arguments, settings)).as_dict()
    default = Config()
    groups = {name: type(getattr(default, name))(**given[name]) for name in SECTIONS}
    return Config(**{one.name: given[one.name] for one in fields(Config)} | groups)


def presets() -> list[str]:
    """Return the names of the packaged configs."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _parser(command: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"ubt {command}",
        usage=f"ubt {command} [--config FILE or PRESET] [--option value ...]",
        description=f"{HELP[command]}.",
        epilog=EPILOG.format(presets=", ".join(presets())),
        formatter_class=_Help,
    )
    parser.add_argument("--config", action="config", help="YAML file, or name of a preset")
    parser.add_class_arguments(Config)
    # Every command reads the same file; its help shows only what it uses.
    for action in parser._actions:
        group = action.dest.split(".")[0]
        if group in SECTIONS and group not in GROUPS[command] and action.dest not in GROUPS[command]:
            action.help = argparse.SUPPRESS
    return parser


class _Help(DefaultHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # argparse would flow the examples into one paragraph.
        return "\n".join(indent + line for line in text.splitlines())


def _spelled_out(arguments: Sequence[str], settings: Mapping[str, object]) -> list[str]:
    """Give every option its full name, a bare switch its value, and a preset its path."""
    result: list[str] = []
    for i, argument in enumerate(arguments):
        if result and result[-1] == "--config":
            result.append(_config(argument))
        elif argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = _full_name(name.replace("-", "_"), settings)
            follows = i + 1 < len(arguments) and not arguments[i + 1].startswith("--")
            if isinstance(settings.get(name), bool) and not equals and not follows:
                equals, value = "=", "true"
            switch = _full_name(name.removeprefix("no_"), settings)
            if name not in settings and not equals and isinstance(settings.get(switch), bool):
                name, equals, value = switch, "=", "false"
            if name == "config" and equals:
                value = _config(value)
            result.append(f"--{name}{equals}{value}")
        else:
            result.append(argument)
    return result


def _full_name(name: str, settings: Mapping[str, object]) -> str:
    found = [full for full in settings if full.rpartition(".")[2] == name]
    return found[0] if name not in settings and len(found) == 1 else name


def _config(value: str) -> str:
    """Return the path of a file or preset of settings; a file without any overrides nothing."""
    packaged = PRESETS / f"{value}.yaml"
    path = packaged if packaged.exists() and not Path(value).exists() else Path(value)
    if not path.is_file():
        return value
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML, {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path}: holds {content!r}, needs settings such as `seed: 1`")
    return str(path) if content else "{}"


def _overview() -> str:
    lines = ["usage: ubt COMMAND [--config FILE or PRESET] [--option value ...]", ""]
    lines += [f"  ubt {command:<10}{text}" for command, text in HELP.items()]
    lines += ["", f"presets: {', '.join(presets())}", "`ubt COMMAND --help` lists the settings of a command."]
    return "\n".join(lines)
