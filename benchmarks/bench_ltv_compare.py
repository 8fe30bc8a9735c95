"""Which model predicts revenue best on a later window: one boosted model, the stack, ZILN, the two stages, BG/NBD?

    python benchmarks/bench_ltv_compare.py generated --rows 240000   the generated 84-column log
    python benchmarks/bench_ltv_compare.py cdnow                      CDNOW (FOOTFALL_DATA)
    python benchmarks/bench_ltv_compare.py online_retail              Online Retail (FOOTFALL_DATA)

All models see the same train rows and are scored on the same later rows. Fits on few rows depend on their seed, so the
shop sets are fitted with three and errors averaged. Online Retail has few buyers in any one window, so the intervals of
the default are counted once more over seven windows, each with a model of the months before it. Tables go to
benchmarks/results/ltv_compare_<set>.md and .json; benchmarks/results/ltv_compare.md tells what they say.
"""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from record import header, provenance, write

from ltv.cli import main
from ltv.compare import BTYD, COLUMNS
from runkit.compare import markdown_table, mean
from runkit.run import Run

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("FOOTFALL_DATA") or Path(__file__).parents[2] / "shared" / "data")
MODELS = ["log1p", "two_stage", "tweedie", "document", "document_sampled", "stack", "ziln", "odmn", "optdist"]
FOLDERS = {"cdnow": "cdnow", "online_retail": "online-retail"}
DEFAULT = "log1p"
# First days of the months before which the models of the rolling windows are trained; a window is the month after the
# 28 days that the labels need.
ORIGINS = [datetime(2011, month, 1) for month in range(4, 11)]
LAST = datetime(2011, 11, 11)


def run(*words: object) -> None:
    """Run one `ltv` command; stop where it fails."""
    line = [str(word) for word in words]
    if main(line):
        raise SystemExit(f"failed: ltv {shlex.join(line)}")


def fit(name: str, work: Path, rows: int, train_frac: float, seeds: list[int]) -> dict[str, list[Run]]:
    """Make the rows, fit and score every model with every seed; BG/NBD knows no seed and is fitted once."""
    data = work / f"data_{name}"
    found: dict[str, list[Run]] = {}
    for seed in seeds:
        if name == "generated":
            if not data.exists():
                run("generate", "--data-dir", data, "--rows", rows, "--test-rows", 1000, "--seed", 1)
            words: list[Any] = ["--config", "config/config.yaml"]
            words += ["--training.sampling.train_frac", train_frac]
            variants = MODELS
        else:
            if not data.exists():
                run("import", "--source", name, "--path", DATA / FOLDERS[name], "--data-dir", data)
            # A handful of customers buys on the first day: too few for the models that need converting.
            words = shop_words(name)
            variants = [*MODELS, *(BTYD if seed == seeds[0] else [])]
        place = work / name / str(seed)
        words += ["--data.root", data, "--run-dir", place, "--models.threads", 1, "--seed", seed]
        run("compare", *words, "--variants", *variants, "--resume")
        for variant in variants:
            found.setdefault(variant, []).append(Run(place / variant))
    return found


def shop_words(name: str) -> list[str]:
    """Settings of a shop set."""
    # A handful of customers buys on the first day: too few for the models that need converting.
    return ["--config", f"config/config_{name}.yaml", "--data.horizons", "[d7,d14,d28]"]


def roll(name: str, work: Path, seeds: list[int]) -> pd.DataFrame:
    """Count the default's intervals over all rolling windows and seeds: one line for horizon and kind of rows."""
    tallies: dict[tuple[str, str], list[list[int]]] = {}
    for origin in ORIGINS:
        begin = origin + timedelta(days=28)
        window = [origin, begin, min(begin + timedelta(days=31), LAST)]
        for seed in seeds:
            place = work / f"{name}_rolling" / f"{origin:%Y-%m}_{seed}"
            words = [*shop_words(name), "--models.model", DEFAULT, "--models.threads", 1, "--seed", seed]
            for key, moment in zip(("train_end", "val_start", "val_end"), window, strict=True):
                words += [f"--data.{key}", f"{moment:%Y-%m-%d-%H-%M}"]
            run("train", *words, "--data.root", work / f"data_{name}", "--run-dir", place, "--resume")
            table = _table(Run(place))
            for h in _horizons(Run(place)):
                amounts = table[f"true_{h}"]
                for kind, prefix in (("rows with more than [0, 0]", ""), ("rows that buy", "buyer_")):
                    if f"revenue_{h}_{prefix}lo" not in table:
                        continue
                    low, high = table[f"revenue_{h}_{prefix}lo"], table[f"revenue_{h}_{prefix}hi"]
                    asked = amounts > 0 if prefix else high > 0
                    missed = [int((asked & beyond).sum()) for beyond in (amounts < low, amounts > high)]
                    tallies.setdefault((h, kind), []).append([int(asked.sum()), *missed])
    lines = []
    for (h, kind), counts in tallies.items():
        rows, below, above = np.sum(counts, axis=0) / len(seeds)
        lines.append(
            {
                "horizon": h,
                "of": kind,
                "rows": round(float(rows)),
                "held": 1 - (below + above) / rows,
                "95 % interval": _wilson(1 - (below + above) / rows, rows),
                "below": below / rows,
                "above": above / rows,
            }
        )
    return pd.DataFrame(lines)


def tables(found: dict[str, list[Run]]) -> dict[str, pd.DataFrame]:
    """Errors with their paired differences, the intervals of the default, and all metrics; means over the seeds."""
    errors = {name: np.mean([_squared(run) for run in runs], axis=0) for name, runs in found.items()}
    horizons = _horizons(found[DEFAULT][0])
    order = sorted(errors, key=lambda name: errors[name].sum(axis=1).mean())
    ranking = []
    for name in order:
        line: dict[str, Any] = {"model": name, "fits": len(found[name])}
        line |= {f"MSLE {h}": value for h, value in zip(horizons, errors[name].mean(axis=0), strict=True)}
        sums = [float(_squared(run).sum(axis=1).mean()) for run in found[name]]
        line |= {"sum": np.mean(sums), "lowest and highest seed": f"{min(sums):.5g} .. {max(sums):.5g}"}
        if name != DEFAULT:
            gap = mean((errors[name] - errors[DEFAULT]).sum(axis=1))
            line["above the default"] = f"{gap.value:.3g} ± {1.96 * gap.error:.2g}"
        ranking.append(line)
    covered, metrics = [], []
    for h in horizons:
        values = [run.metrics()["val"]["coverage"] for run in found[DEFAULT]]
        line = {"horizon": h}
        table = _table(found[DEFAULT][0])
        informative = float(np.mean([one[h]["informative_share"] for one in values]))
        buyers = int((table[f"true_{h}"] > 0).sum())
        for title, key, share, rows in (
            ("all rows", h, "overall", len(table)),
            ("rows with more than [0, 0]", h, "informative", informative * len(table)),
            ("rows that buy", f"{h}:buyer", "overall", buyers),
        ):
            line[title] = float(np.mean([one[key][share] for one in values])) if key in values[0] else np.nan
            if title != "all rows":
                line[f"{title}: 95 % interval"] = _wilson(line[title], rows)
        covered.append(line | {"share of rows with more than [0, 0]": informative, "buyers": buyers})
    for name in order:
        for h in horizons:
            all_of = [run.metrics()["val"] for run in found[name]]
            line = {"model": name, "horizon": h}
            line |= {title: float(np.mean([one[h][key] for one in all_of])) for key, title in COLUMNS.items()}
            line["AUC"] = float(np.mean([one.get("buyer", {}).get("auc", np.nan) for one in all_of]))
            metrics.append(line)
    return {"ranking": pd.DataFrame(ranking), "coverage": pd.DataFrame(covered), "metrics": pd.DataFrame(metrics)}


def report(name: str, seeds: list[int], found: dict[str, list[Run]], rolled: pd.DataFrame | None) -> None:
    """Write the tables."""
    parts = tables(found) | ({} if rolled is None else {"rolling": rolled})
    rows = len(_table(found[DEFAULT][0]))
    facts = provenance(0, "lightgbm", "pyarrow") | {"seed": ", ".join(map(str, seeds))}
    text = f"# {name}\n\n{header(facts)}\n\n"
    text += (
        f"{rows:,} validation rows. Ordered by the sum of MSLE over the horizons; `{DEFAULT}` is the default. Squared "
    )
    text += "errors are averaged over the seeds; ± is the 95 % interval of the mean paired difference between rows.\n\n"
    text += (
        markdown_table(parts["ranking"].to_dict("records"))
        + f"\nShare of rows in the 90 % intervals of `{DEFAULT}`:\n\n"
    )
    text += markdown_table(parts["coverage"].to_dict("records")) + "\n"
    if rolled is not None:
        text += (
            f"The same over {len(ORIGINS)} windows of a month, each after a model of all months before it; means over "
        )
        text += "the seeds:\n\n"
        text += markdown_table(rolled.to_dict("records")) + "\n"
    text += markdown_table(parts["metrics"].to_dict("records"))
    plain = {key: table.astype(object).where(table.notna(), None).to_dict("records") for key, table in parts.items()}
    write(RESULTS / f"ltv_compare_{name}", {"facts": facts, "rows": rows, **plain}, text)


def _wilson(share: float, rows: float) -> str:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * (share * (1 - share) / rows + z * z / (4 * rows * rows)) ** 0.5
    return f"{middle - half:.3f} .. {middle + half:.3f}"


def _table(run: Run) -> pd.DataFrame:
    return pd.read_parquet(run.folder / "evaluation" / "val" / "predictions.parquet")


def _horizons(run: Run) -> list[str]:
    return [c.removeprefix("true_") for c in _table(run) if c.startswith("true_") and c != "true_buyer"]


def _squared(run: Run) -> np.ndarray:
    """Squared log errors [N, H]."""
    table = _table(run)
    gaps = [np.log1p(table[f"revenue_{h}"]) - np.log1p(table[f"true_{h}"]) for h in _horizons(run)]
    return np.stack(gaps, axis=1) ** 2


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["generated", *FOLDERS])
    parser.add_argument("--rows", type=int, default=240_000, help="rows of the generated train split")
    parser.add_argument("--train-frac", type=float, default=1.0, help="share of the generated train rows that is used")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 1 2 3 for the shop sets, 1 for the generated")
    parser.add_argument(
        "--work", type=Path, help="folder for data and runs, kept for --resume; default: a temporary one"
    )
    return parser.parse_args()


if __name__ == "__main__":
    given = parsed()
    chosen = given.seeds or ([1] if given.set == "generated" else [1, 2, 3])
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        found = fit(given.set, work, given.rows, given.train_frac, chosen)
        rolled = roll(given.set, work, chosen) if given.set == "online_retail" else None
        report(given.set, chosen, found, rolled)
