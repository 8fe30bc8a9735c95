"""Which model predicts revenue best on a later window: one boosted model, the stack, ZILN, the two stages, BG/NBD?

    python benchmarks/bench_ltv_compare.py generated --rows 240000   the generated 84-column log
    python benchmarks/bench_ltv_compare.py cdnow                      CDNOW (FOOTFALL_DATA)
    python benchmarks/bench_ltv_compare.py online_retail              Online Retail (FOOTFALL_DATA)

All models see the same train rows and are scored on the same later rows. Tables go to
benchmarks/results/ltv_compare_<set>.md; benchmarks/results/ltv_compare.md tells what they say.
"""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from pathlib import Path

from ltv.cli import main

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("FOOTFALL_DATA") or Path(__file__).parents[2] / "shared" / "data")
BOOSTED = ["log1p", "two_stage", "document", "ziln", "stack"]
CLASSICAL = ["tweedie", "document_sampled", "btyd", "btyd_recalibrated"]
FOLDERS = {"cdnow": "cdnow", "online_retail": "online-retail"}


def run(*words: object) -> None:
    """Run one `ltv` command; stop where it fails."""
    line = [str(word) for word in words]
    if main(line):
        raise SystemExit(f"failed: ltv {shlex.join(line)}")


def compare(name: str, work: Path, rows: int) -> None:
    """Make the rows, fit and score every model, and put the table into the results folder."""
    data = work / f"data_{name}"
    if name == "generated":
        if not data.exists():
            run("generate", "--data-dir", data, "--rows", rows, "--test-rows", 1000, "--seed", 1)
        trees = "{n_estimators: 100}"
        small = ["--training.sampling.train_frac", 0.5]
        small += ["--models.buyer_classifier", trees, "--models.revenue_regressor", trees]
        chosen = ["--config", "config/config.yaml", *small, "--variants", *BOOSTED]
    else:
        if not data.exists():
            run("import", "--source", name, "--path", DATA / FOLDERS[name], "--data-dir", data)
        # A handful of customers buys on the first day: too few for the models that need converting.
        chosen = ["--config", f"config/config_{name}.yaml", "--data.horizons", "[d7,d14,d28]"]
        chosen += ["--variants", *BOOSTED, *CLASSICAL]
    words = [*chosen, "--data.root", data, "--run-dir", work / name, "--models.threads", 1, "--resume"]
    run("compare", *words)
    text = (work / name / "compare.md").read_text()
    (RESULTS / f"ltv_compare_{name}.md").write_text(f"# {name}\n\n{text}")


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["generated", *FOLDERS])
    parser.add_argument("--rows", type=int, default=240_000, help="rows of the generated train split")
    parser.add_argument(
        "--work", type=Path, help="folder for data and runs, kept for --resume; default: a temporary one"
    )
    return parser.parse_args()


if __name__ == "__main__":
    given = parsed()
    with tempfile.TemporaryDirectory() as temporary:
        compare(given.set, given.work or Path(temporary), given.rows)
