"""The command line of an app: every command takes one dataclass of settings, from files, presets and options.

Words become names and texts here; what a text means, whether it is of the setting's type, the building of the dataclass
and the help are jsonargparse's. Each value is checked alone, so an error knows its setting without asking the message.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from runkit.errors import SettingError
from runkit.files import yaml_text
from runkit.progress import show_progress
from runkit.settings import Setting, build, read, settings_of

HINTS = """\
A setting has one name everywhere: a key of the YAML file, an option here. An option may be shortened to its last part
and written with dashes; a switch may stand alone, --no-SWITCH turns it off; a list takes several words.
--config takes a YAML file{presets}, also several times: later ones win, options win over files.
--print-config shows what comes out, --debug the traceback of an error."""


@dataclass(frozen=True)
class Command:
    """One command of an app.

    Args:
        run: does the work; what it returns is printed
        config: dataclass of the settings that `run` takes
        help: one line on what the command does; more may follow after an empty line
        shows: settings, or groups of them, that ``--help`` lists; all where empty
    """

    run: Callable[[Any], str | None]
    config: type
    help: str
    shows: Sequence[str] = ()


@dataclass(frozen=True)
class App:
    """An app: its commands, one exit code for each way to end, one form for each error.

    Args:
        name: what its script is called; also the package whose version it has and whose log lines are shown
        about: what it is for, in a line or two
        commands: name -> command, in the order of the overview
        presets: folder of YAML files that ``--config`` knows by name
        examples: lines for the help
        loggers: other packages whose log lines are shown, as "ltv_stack"
    """

    name: str
    about: str
    commands: Mapping[str, Command]
    presets: Path | None = None
    examples: str = ""
    loggers: Sequence[str] = ()

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run one command line.

        Returns:
            0; 1 if the work failed; 2 for a wrong command line or setting; 130 after Ctrl-C, 143 after SIGTERM
        """
        words = list(sys.argv[1:] if argv is None else argv)
        if not words or words[0] in ("-h", "--help"):
            print(self._overview())
            return 0
        if words[0] == "--version":
            print(self.name, _version(self.name))
            return 0
        name, rest = words[0], [word for word in words[1:] if word != "--debug"]
        if name not in self.commands:
            needs = f"needs one of {', '.join(self.commands)}"
            print(f"{self.name}: error: command: got {name!r}, {needs}", file=sys.stderr)
            return 2
        if any(word in ("-h", "--help") for word in rest):
            print(self._help(name))
            return 0
        return self._run(name, rest, debug=len(rest) < len(words) - 1)

    def entry(self) -> NoReturn:
        """Run the console script."""
        sys.exit(self.main())

    def parse(self, command: str, argv: Sequence[str] = ()) -> Any:
        """Return the settings of a command as its dataclass, from words as they stand after its name.

        Raises:
            SettingError: for the first setting that is unknown, missing or wrong
        """
        kind = self.commands[command].config
        settings = settings_of(kind)
        config = build(kind, settings, read(argv, settings, self.presets))
        if hasattr(config, "check"):
            try:
                config.check()
            except ValueError as error:
                raise SettingError(str(error)) from error
        return config

    def preset_names(self) -> list[str]:
        """Return the names that ``--config`` knows."""
        return sorted(path.stem for path in self.presets.glob("*.yaml")) if self.presets else []

    def _run(self, name: str, words: list[str], debug: bool) -> int:
        told = f"{self.name} {name}"
        with _terminable() as signals, self._console():
            try:
                show = "--print-config" in words or "--print_config" in words
                words = [word for word in words if word not in ("--print-config", "--print_config")]
                config = self.parse(name, words)
                if show:
                    print(yaml_text(asdict(config)), end="")
                    return 0
                show_progress(getattr(config, "progress", True))
                text = self.commands[name].run(config)
                if text is not None:
                    print(text)
                return 0
            except KeyboardInterrupt:
                again = "; the same command with --resume goes on" if "resume" in _names(self.commands[name]) else ""
                print(f"\n{told}: interrupted{again}", file=sys.stderr)
                return 143 if signals else 130
            except Exception as error:
                if debug:
                    traceback.print_exc()
                log = getattr(error, "runkit_log", None)
                where = f" (traceback in {log})" if log and not isinstance(error, SettingError) else ""
                print(f"{told}: error: {_one_line(error)}{where}", file=sys.stderr)
                return 2 if isinstance(error, SettingError) else 1

    @contextmanager
    def _console(self) -> Iterator[None]:
        """Show the app's log lines, and the warnings of everybody, on stderr."""
        shown = (self.name, "runkit", *self.loggers)
        handler, root = logging.StreamHandler(sys.stderr), logging.getLogger()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        # An error is told once, in the line that ends the command.
        handler.addFilter(lambda record: not (record.name == "runkit" and record.exc_info))
        handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.split(".")[0] in shown)
        level = root.level
        root.addHandler(handler)
        root.setLevel(min(level or logging.INFO, logging.INFO))
        try:
            yield
        finally:
            root.setLevel(level)
            root.removeHandler(handler)

    def _overview(self) -> str:
        width = max(map(len, self.commands))
        lines = [self.about, "", f"usage: {self.name} COMMAND [--config FILE] [--setting value ...]", ""]
        lines += [f"  {self.name} {name:<{width}}  {one.help.splitlines()[0]}" for name, one in self.commands.items()]
        if self.preset_names():
            lines += ["", f"presets: {', '.join(self.preset_names())}"]
        if self.examples:
            lines += ["", "examples:", self.examples.rstrip()]
        return "\n".join([*lines, "", f"`{self.name} COMMAND --help` lists the settings of a command."])

    def _help(self, name: str) -> str:
        command, names = self.commands[name], ", ".join(self.preset_names())
        hints = HINTS.format(presets=f" or the name of a preset ({names})" if names else "")
        parser = ArgumentParser(
            prog=f"{self.name} {name}",
            usage=f"{self.name} {name} [--config FILE] [--setting value ...]",
            description=command.help,
            epilog=f"{hints}\n\nexamples:\n{self.examples}" if self.examples else hints,
            formatter_class=_Help,
        )
        parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of settings")
        groups: dict[str, Any] = {}
        for one in settings_of(command.config).values():
            if command.shows and not any(f"{one.name}.".startswith(f"{shown}.") for shown in command.shows):
                continue
            if one.group not in groups:
                groups[one.group] = parser.add_argument_group(one.group, one.about)
            _add(groups[one.group], one)
        return parser.format_help()


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""


def _add(group: Any, one: Setting) -> None:
    if one.required:
        group.add_argument(f"--{one.name}", type=one.type, required=True, help=one.help)
    else:
        group.add_argument(f"--{one.name}", type=one.type, default=one.default, help=one.help)


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """Let SIGTERM end the block as Ctrl-C does; the list that is given then holds its number."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def end(number: int, _: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) and error.args and " " in str(error.args[0]):
        return " ".join(str(error.args[0]).split())
    # The bare text of these does not say what went wrong.
    plain = isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
    bare = type(error).__module__ == "builtins" and not plain
    return f"{type(error).__name__}: {text}" if bare or not text else text


def _names(command: Command) -> set[str]:
    return {name.rpartition(".")[2] for name in settings_of(command.config)}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
