"""Do the user embeddings beat simple features on the challenge's six tasks? The score tables of whole `ubt run`s.

    python benchmarks/bench_ubt_score.py demo        800,000 generated clients, 60,000 embedded, 30,000 scored
    python benchmarks/bench_ubt_score.py two_tasks   the same, trained on churn and category alone
    python benchmarks/bench_ubt_score.py bench       1.5 million generated clients, 80,000 embedded and scored
    python benchmarks/bench_ubt_score.py rees46      twelve hours of a real shop (FOOTFALL_DATA)

Runs go to runs/<name> of the working directory, tables to benchmarks/results/ubt_score_<name>.md and .json. A run that
is there already is reported with --finished.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from record import header, machine, write

from ubt.cli import main as ubt

COMMANDS = {
    "demo": "run --config demo",
    "two_tasks": "run --config demo --run_dir runs/two_tasks --task-weights churn:1.0,category_propensity:2.0",
    "bench": "run --config demo --config bench",
    "rees46": "run --config rees46",
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=COMMANDS)
    parser.add_argument("--finished", type=Path, metavar="RUN_DIR", help="report this run, run nothing")
    arguments = parser.parse_args()
    command = COMMANDS[arguments.name]
    if not arguments.finished and ubt(shlex.split(command)):
        raise SystemExit(f"failed: ubt {command}")
    report(arguments.name, f"ubt {command}", arguments.finished or Path("runs") / arguments.name)


def report(name: str, command: str, run_dir: Path) -> None:
    """Write the tables of a run with its date, commit, seed, times and memory."""
    metadata = json.loads((run_dir / "metadata.json").read_text())
    stages = {step: one for step, one in metadata["commands"].items() if step != "run"}
    facts = {
        "date": stages["score"]["finished"][:16].replace("T", " ") + " UTC",
        "machine": machine(),
        "commit": (metadata["commit"] or "unknown")[:7],
        "command": command,
        "seed": str(metadata["seed"]),
        **{package: metadata["versions"][package] for package in ("python", "torch", "lightgbm")},
    }
    minutes = sum(stage["wall_seconds"] for stage in stages.values()) / 60
    lines = [
        f"# ubt: {name}",
        "",
        header(facts),
        "",
        f"{minutes:.1f} minutes from end to end:",
        "",
        "| step | seconds | peak memory so far, MB |",
        "|---|---|---|",
        *(f"| {step} | {one['wall_seconds']} | {one['peak_memory_mb']} |" for step, one in stages.items()),
        "",
        "```",
        (run_dir / "scores" / "table.txt").read_text().rstrip(),
        "```",
        "",
    ]
    metrics = json.loads((run_dir / "metrics.json").read_text())
    write(RESULTS / f"ubt_score_{name}", {"facts": facts, "stages": stages, **metrics}, "\n".join(lines))


if __name__ == "__main__":
    main()
