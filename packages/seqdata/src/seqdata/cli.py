"""seqdata: build event logs into stores and look into them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

import seqdata
from seqdata.append import append, compact
from seqdata.audit import audit
from seqdata.build import build
from seqdata.config import load_config, shipped
from seqdata.exchange import to_parquet, to_recbole
from seqdata.layout import StoreError
from seqdata.store import Store, open_store
from seqdata.times import format_time

# what the caller can mend: arguments, settings, and input that is not as they say
WRONG = (ValueError, KeyError, TypeError, FileExistsError, FileNotFoundError, NotADirectoryError)
EXAMPLE = """
example of a configuration:

  sources:                        # a path, a glob, a list, {sql: query}, or a mapping of tables as here
    buy: log/product_buy.parquet
    search: log/search_query-*.csv
  out: stores/shop
  user: client_id                 # integers or text
  time: timestamp                 # ISO text or timestamps; integers need time_unit: s | ms | us | ns
  fit_before: 2022-10-13          # vocabularies learn from earlier events only
  fields:                         # left out: every other column, its kind inferred
    sku: {kind: categorical, min_count: 2, oov_buckets: 16}
    price: numeric
    query: {kind: vector, width: 16}
  items:
    sku: {source: log/product_properties.parquet, key: sku, fields: {category: categorical, price: numeric}}

${NAME} and ${NAME:-default} are taken from the environment. Configurations that ship: """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted; the store was not touched", file=sys.stderr)
        return 130
    except WRONG as error:
        return _say(options, error, 1 if isinstance(error, StoreError) else 2)
    except (OSError, ImportError, MemoryError, RuntimeError, duckdb.Error) as error:
        return _say(options, error, 1)


def _say(options: argparse.Namespace, error: Exception, code: int) -> int:
    text = error.args[0] if isinstance(error, KeyError) else error
    print(f"seqdata {options.command}: {' '.join(str(text).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="seqdata",
        description=__doc__,
        epilog="Ends with 0, with 1 if the work failed, 2 if the command line, a setting or the input is wrong, 130 if"
        " interrupted. `seqdata COMMAND --help` says more.",
    )
    parser.add_argument("--version", action="version", version=f"seqdata {seqdata.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    make = commands.add_parser(
        "build",
        help="build a store from logs",
        description="Builds a store: reads the logs once, fits the vocabularies, sorts every user's events by time.\n\n"
        "  seqdata build log.parquet --user client_id --time timestamp --out stores/shop\n"
        "  seqdata build --config shop.yaml",
        epilog=EXAMPLE + ", ".join(shipped()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument("sources", nargs="*", help="Parquet or CSV files, folders or globs; the configuration's if none")
    make.add_argument("--config", help="YAML file with the arguments of seqdata.build, or a shipped name")
    make.add_argument("--user", help="column of the user ids")
    make.add_argument("--time", help="column of the event times")
    make.add_argument("--time-unit", choices=["s", "ms", "us", "ns"], help="what integer times count")
    make.add_argument("--time-format", help="strptime format of text times, or of integers such as 20060410")
    make.add_argument(
        "--field",
        action="append",
        metavar="NAME=KIND",
        help="a field and its kind: categorical, numeric or vector; may be repeated; all other columns, kinds"
        " inferred, if none is named",
    )
    make.add_argument("--null-user", choices=["error", "drop"], help="what becomes of rows without a user")
    make.add_argument("--dedup", action="store_true", help="leave out events that repeat an earlier one in every field")
    make.add_argument("--out", help="folder of the store, instead of the configuration's")
    make.add_argument("--fit-before", help="time before which vocabularies are fitted")
    make.add_argument("--memory-limit", help="what the build's buffers stay within, such as 512MB")
    make.add_argument("--shards", type=int, help="number of shards that users are dealt to by hash")
    make.add_argument("--overwrite", action="store_true", help="replace an existing store once the new one is complete")
    make.add_argument("--resume", action="store_true", help="keep finished steps on failure and continue from them")
    make.add_argument("--no-progress", action="store_true", help="draw no progress bar")
    make.set_defaults(run=_build)
    show = commands.add_parser("info", help="say what a store holds", description="Says what a store holds.")
    show.add_argument("store", type=Path)
    show.set_defaults(run=_info)
    look = commands.add_parser(
        "audit",
        help="look for leaks and rot in a store",
        description=(
            "Looks for leaks across a cutoff and for rot in the data. Ends with 1 if it finds what --fail-on names."
        ),
    )
    look.add_argument("store", type=Path)
    look.add_argument("--cutoff", help="time that training must not look past; the store's fit cutoff if left out")
    look.add_argument("--labels", nargs=2, metavar=("START", "END"), help="window that the labels come from")
    look.add_argument("--inputs-before", help="time up to which the inputs reach; left out, they are the whole store")
    look.add_argument(
        "--statistic",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "TIME"),
        help="something else that was fitted, and up to when",
    )
    look.add_argument("--html", type=Path, help="write the report with plots to this file")
    look.add_argument("--fail-on", choices=["warning", "error", "never"], default="error")
    look.set_defaults(run=_audit)
    more = commands.add_parser(
        "append",
        help="add new events to a store",
        description=(
            "Adds the sources of a YAML file to a store; columns and options are those the store was built with."
        ),
    )
    more.add_argument("store", type=Path)
    more.add_argument("sources", nargs="*", help="Parquet or CSV files, folders or globs; the configuration's if none")
    more.add_argument("--config", help="YAML file with sources, and items and fit_before if wanted")
    more.add_argument(
        "--taken",
        choices=["refuse", "skip", "again"],
        default="refuse",
        help="what becomes of files whose events are in the store already",
    )
    more.add_argument("--fit-before", help="values seen before this time join the vocabularies")
    more.add_argument("--memory-limit", help="what the build's buffers stay within, such as 512MB")
    more.add_argument("--no-progress", action="store_true", help="draw no progress bar")
    more.set_defaults(run=_append)
    one = commands.add_parser(
        "compact", help="rewrite a store of many shards as one", description="Rewrites a store as one shard."
    )
    one.add_argument("store", type=Path)
    one.set_defaults(run=_compact)
    check = commands.add_parser(
        "verify",
        help="compare every file of a store with its checksum",
        description="Reads every file of a store; ends with 1 and names those that are not as they were written.",
    )
    check.add_argument("store", type=Path)
    check.set_defaults(run=_verify)
    give = commands.add_parser(
        "export",
        help="write a store, or what it holds before a cutoff, for other tools",
        description=(
            "Writes sequences for other tools: Parquet with one row of lists per user, or RecBole's .inter and .item."
        ),
    )
    give.add_argument("store", type=Path)
    give.add_argument(
        "out", type=Path, help="a .parquet file, or the folder of a RecBole data set, named as the data set"
    )
    give.add_argument("--format", choices=["parquet", "recbole"], default="parquet")
    give.add_argument("--before", help="only events before this time")
    give.add_argument(
        "--fields", nargs="*", help="fields to write, item properties as field.column; all fields if left out"
    )
    give.add_argument("--ids", action="store_true", help="write ids instead of values")
    give.set_defaults(run=_export)
    return parser


def _audit(options: argparse.Namespace) -> int:
    report = audit(
        open_store(options.store),
        cutoff=options.cutoff,
        labels=options.labels,
        inputs_before=options.inputs_before,
        statistics=dict(options.statistic),
    )
    print(report.to_text())
    if options.html is not None:
        report.to_html(options.html)
        print(f"\nreport with plots: {options.html}")
    failing = {"never": (), "error": ("error",), "warning": ("warning", "error")}[options.fail_on]
    return int(report.worst in failing)


def _append(options: argparse.Namespace) -> int:
    config = load_config(options.config) if options.config else {}
    store = open_store(options.store)
    before = store.num_events
    store = append(
        store,
        _sources(options, config),
        items=config.get("items"),
        fit_before=options.fit_before or config.get("fit_before"),
        taken=options.taken,
        memory_limit=options.memory_limit,
        progress=not options.no_progress,
    )
    print(
        f"added {store.num_events - before:,} events to {store.path}: {store.num_users:,} users, {store.num_events:,}"
        " events"
    )
    return 0


def _compact(options: argparse.Namespace) -> int:
    store = compact(open_store(options.store))
    print(f"{store.path} is one shard: {store.num_users:,} users, {store.num_events:,} events")
    return 0


def _verify(options: argparse.Namespace) -> int:
    damage = open_store(options.store).verify()
    print("\n".join(damage) if damage else f"{options.store}: every file is as it was written")
    return int(bool(damage))


def _export(options: argparse.Namespace) -> int:
    store = open_store(options.store)
    view = store.all() if options.before is None else store.as_of(options.before)
    write = to_parquet if options.format == "parquet" else to_recbole
    rows = write(view, options.out, fields=options.fields, ids=options.ids)
    print(f"wrote {rows:,} rows to {options.out}")
    return 0


def _build(options: argparse.Namespace) -> int:
    config = load_config(options.config) if options.config else {}
    for key in ("out", "user", "time", "time_unit", "time_format", "null_user", "fit_before", "memory_limit", "shards"):
        if getattr(options, key) is not None:
            config[key] = getattr(options, key)
    for key in ("overwrite", "resume", "dedup"):
        config[key] = getattr(options, key) or config.get(key, False)
    if options.no_progress:
        config["progress"] = False
    if options.field:
        config["fields"] = dict(_named(field) for field in options.field)
    sources = _sources(options, config)
    config.pop("sources", None)
    for key in ("out", "user", "time"):
        if key not in config:
            raise ValueError(f"{options.config}: lacks {key!r}" if options.config else f"needs --{key} (or --config)")
    begin = time.monotonic()
    store = build(sources, config.pop("out"), **config)
    print(
        f"built {store.path} in {time.monotonic() - begin:.1f} s: {store.num_users:,} users, {store.num_events:,}"
        " events"
    )
    return 0


def _sources(options: argparse.Namespace, config: dict[str, Any]) -> Any:
    if options.sources:
        return options.sources
    if "sources" not in config:
        raise ValueError(f"{options.config}: lacks 'sources'" if options.config else "needs sources, or --config")
    return config["sources"]


def _named(field: str) -> tuple[str, str]:
    name, equals, kind = field.rpartition("=")
    if not equals:
        raise ValueError(f"--field {field!r}: needs NAME=KIND, such as sku=categorical")
    return name, kind


def _info(options: argparse.Namespace) -> int:
    print("\n".join(describe(open_store(options.store))))
    return 0


def describe(store: Store) -> list[str]:
    """Lines of text that say what a store holds."""
    schema = store.schema
    rows = schema["rows"]
    low, high = min(s["time_min"] for s in schema["shards"]), max(s["time_max"] for s in schema["shards"])
    size = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    lengths = store.all().lengths()
    lines = [
        f"{store.path}",
        f"  users        {store.num_users:,} ({schema['user']['column']}, {schema['user']['dtype']})",
        f"  events       {store.num_events:,} in {len(schema['shards'])} shard(s), {size / 1e6:,.1f} MB",
        f"  per user     mean {lengths.mean():.1f}, longest {int(lengths.max()):,}",
        f"  time         {format_time(low)} .. {format_time(high)} ({schema['time']['column']})",
        f"  fit before   {schema['fit_before_text'] or 'no cutoff: vocabularies saw every event'}",
        f"  rows         {rows['in']:,} read, {rows['out']:,} kept, dropped {_dropped(rows)}",
    ]
    for name, entry in schema["fields"].items():
        lines.append(f"  field        {name}: {_field(entry)}")
    for name in store.item_columns:
        lines.append(f"  item column  {name}: {_field(store.entry(name))}")
    for name, table in schema["tables"].items():
        parts = len(table["parts"])
        lines.append(f"  table        {name}: {table['rows_in']:,} rows from {parts} part(s)")
    return lines


def _dropped(rows: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} ({reason})" for reason, count in rows["dropped"].items() if count) or "none"


def _field(entry: dict[str, Any]) -> str:
    if entry["kind"] in ("categorical", "hashed"):
        return f"{entry['kind']} {entry['values']}, {entry['size']:,} ids"
    if entry["kind"] == "vector":
        return f"vector of {entry['width']} {entry.get('vector_dtype', entry['dtype'])}"
    if entry["kind"] == "quantiles":
        return f"quantiles, {entry['n']:,} buckets"
    return f"numeric {entry['dtype']}"


if __name__ == "__main__":
    sys.exit(main())
