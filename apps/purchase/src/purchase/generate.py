"""Write a generated log, and beside it the table of its items."""

import logging
from pathlib import Path

import duckdb

from purchase.config import Config
from runkit.files import atomic_file
from synthlogs import purchases

log = logging.getLogger("purchase")


def generate(config: Config) -> str:
    """Write ``<log.folder>/log/*.parquet`` and ``<log.folder>/items.parquet``.

    The items are those that are launched before the target window ends, whether anybody has looked at them or not. A
    brand is what the log says of the item; an item without an event in the whole log has none.
    """
    folder = Path(config.log.folder)
    folder.mkdir(parents=True, exist_ok=True)
    result = purchases.generate(folder / "log", config.generate, bar=config.progress)
    end = (config.split.test_start + config.split.horizon) // 1000
    with atomic_file(folder / "items.parquet") as path, duckdb.connect() as database:
        database.execute(
            f"""COPY (
                SELECT p.product_id, p.category_id, l.brand
                FROM read_parquet('{_quoted(folder / "log" / "truth" / "products.parquet")}') p
                LEFT JOIN (
                    SELECT product_id, max(brand) AS brand
                    FROM read_parquet('{_quoted(folder / "log")}/????-???.parquet') GROUP BY ALL
                ) l USING (product_id)
                WHERE epoch_ms(p.launch) < {end} ORDER BY p.product_id
            ) TO '{_quoted(path)}' (FORMAT parquet)"""
        )
    counts = ", ".join(f"{name} {number:,}" for name, number in result.items())
    return f"{folder}: {counts}"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
