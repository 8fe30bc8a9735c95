"""seqdata: build event logs into stores and look into them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqdata.build import build
from seqdata.config import load_config, shipped
from seqdata.store import Store, open_store
from seqdata.times import format_time

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
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        print(f"seqdata {options.command}: {text}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="seqdata", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    make = commands.add_parser(
        "build",
        help="build a store from logs described in a YAML file",
        description="Builds a store: reads the logs once, fits the vocabularies, sorts every user's events by time.",
        epilog=EXAMPLE + ", ".join(shipped()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument(
        "--config", required=True, help="YAML file with the arguments of seqdata.build, or a shipped name"
    )
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
    return parser


def _build(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    for key in ("out", "fit_before", "memory_limit", "shards"):
        if getattr(options, key) is not None:
            config[key] = getattr(options, key)
    for key in ("overwrite", "resume"):
        config[key] = getattr(options, key) or config.get(key, False)
    if options.no_progress:
        config["progress"] = False
    for key in ("sources", "out", "user", "time"):
        if key not in config:
            raise ValueError(f"{options.config}: lacks {key!r}")
    begin = time.monotonic()
    store = build(config.pop("sources"), config.pop("out"), **config)
    print(
        f"built {store.path} in {time.monotonic() - begin:.1f} s: {store.num_users:,} users, {store.num_events:,}"
        " events"
    )
    return 0


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
    return f"numeric {entry['dtype']}"


if __name__ == "__main__":
    sys.exit(main())
