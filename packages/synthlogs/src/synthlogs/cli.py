"""The command line ``synthlogs``: one command a log, its options the fields of the log's settings."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, NoReturn, get_type_hints

from synthlogs import settings

ABOUT = """\
Write a behaviour log in a published layout, of any size, with a law planted in it and its truth beside it.
The same options give the same bytes. The folder appears when it is complete; one that holds anything
this command did not write is left alone."""
EXAMPLES = """\
examples:
{commands}
  synthlogs COMMAND --help       what is written, and every option

exit codes: 0, 1 the work failed, 2 the command line or an option is wrong, 130 interrupted"""


@dataclass(frozen=True)
class Log:
    """One kind of log: its settings, and what its help says."""

    settings: type[Any]
    summary: str
    written: str
    example: str


LOGS = {
    "shop": Log(
        settings.ShopConfig,
        "clients of a shop: visits, searches, carts, purchases (RecSys Challenge 2025 layout)",
        "Five event tables, product_properties.parquet, input/ and target/ as the challenge has them. Planted are\n"
        "activity, taste, missions in order, launches and mood: `python -c 'import synthlogs.shop; "
        "help(synthlogs.shop)'`.",
        "--clients 50000",
    ),
    "ads": Log(
        settings.AdsConfig,
        "requests for ads with 67 features and 17 labels of later purchases (84 columns, hourly partitions)",
        "train/train and test/test hold partitions datetime=YYYY-MM-DD-HH-MM; truth/ holds every row's labels and\n"
        "the best predictions anyone could make. The law: `python -c 'import synthlogs.ads.population as p; help(p)'`.",
        "--rows 100000 --drift 0.5",
    ),
    "purchases": Log(
        settings.PurchasesConfig,
        "views, carts and rare purchases in a shop of many categories (REES46 layout)",
        "One file a month in time order, e.g. 2019-Nov.parquet; truth/ has every row's propensity and what was drawn\n"
        "for users and products. The law: `python -c 'import synthlogs.purchases as p; help(p)'`.",
        "--rows 1000000 --ratio 4000",
    ),
    "baskets": Log(
        settings.BasketsConfig,
        "a grocer's shopping baskets over fiscal weeks, with prices that move (dunnhumby LGSR layout)",
        "transactions.parquet (22 columns) and time.csv; truth.parquet has every product's base price, elasticities,\n"
        "complement and substitute; truth/ has weekly prices, missions, customers, stores and every basket's mission.\n"
        "The law: `python -c 'import synthlogs.baskets as b; help(b)'`.",
        "--customers 1000 --products 1000",
    ),
    "friends": Log(
        settings.FriendsConfig,
        "a social network: requests, accepts, messages, likes and comments between users in communities",
        "events.parquet (actor, action, target, time) and nodes.parquet (what users say of themselves); truth/ has\n"
        "communities, positions and every friendship with its reason.\n"
        "The law: `python -c 'import synthlogs.friends as f; help(f)'`.",
        "--users 1000000",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code, after one line on stderr where it is not 0."""
    given = vars(build_parser().parse_args(argv))
    name, out, bar = given.pop("command"), given.pop("out"), given.pop("progress")
    try:
        config = LOGS[name].settings(**given)
        config.check()
    except ValueError as error:
        return _failed(name, f"--{error}", 2)
    try:
        result = import_module(f"synthlogs.{name}").generate(out, config, bar=bar)
    except (OSError, ValueError, MemoryError, OverflowError) as error:
        return _failed(name, str(error) or type(error).__name__, 1)
    except KeyboardInterrupt:
        return _failed(name, "interrupted; nothing is left of it", 130)
    for key, value in result.items():
        print(f"{key:20} {value:,.6g}" if isinstance(value, float) else f"{key:20} {value:,}")
    return 0


def entry() -> None:
    """Run the console script."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    commands = "\n".join(f"  synthlogs {name} data/{name} {log.example}" for name, log in LOGS.items())
    parser = _Parser(
        prog="synthlogs", description=ABOUT, epilog=EXAMPLES.format(commands=commands), formatter_class=_Help
    )
    group = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, log in LOGS.items():
        command = group.add_parser(
            name,
            help=log.summary,
            description=f"{log.summary[0].upper()}{log.summary[1:]}.\n\n{log.written}",
            epilog=f"example:\n  synthlogs {name} data/{name} {log.example}",
            formatter_class=_Help,
        )
        command.add_argument("out", metavar="OUT", help="folder to write: new, empty or one this command wrote")
        _add_fields(command, log.settings)
        command.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress bar")
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; `{self.prog} --help` explains\n")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of descriptions and shows defaults."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = bool(action.option_strings) and action.nargs != 0
        return super()._get_help_string(action) if shown else action.help


def _add_fields(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    kinds, about = get_type_hints(config), _about(config)
    for field in fields(config):
        name = field.name.replace("_", "-")
        # A seed is `--seed` in every command, whatever the field is called.
        names = dict.fromkeys((f"--{name}", f"--{field.name}", *(["--seed"] if field.name.endswith("seed") else [])))
        option = parser.add_argument(
            *names,
            dest=field.name,
            type=kinds[field.name],
            default=field.default,
            metavar=kinds[field.name].__name__.upper(),
            help=about[field.name],
        )
        # Help shows one spelling.
        option.option_strings = option.option_strings[:1]


def _about(config: type[Any]) -> dict[str, str]:
    """What the docstring's Args say of each field."""
    lines = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", config.__doc__ or "", re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in lines}


def _failed(name: str, message: str, code: int) -> int:
    print(f"synthlogs {name}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _terminated(number: int, frame: object) -> NoReturn:
    # An exception, so that the unfinished folder is removed on the way out.
    raise SystemExit(128 + number)
