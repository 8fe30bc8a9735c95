"""Train with each of some settings and say which is best on the validation window; the target window is never seen.

RUN/trials/NAME/     a run directory each
    tune.md          all of them, best first
    best.yaml        for ``--config``
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from typing import Any

from purchase.config import Config, Train
from purchase.prepare import PACKAGES, open_prepared
from purchase.train import train_network
from runkit.compare import markdown_table, text_table
from runkit.files import atomic_file, write_yaml
from runkit.progress import progress
from runkit.run import Run


def tune(config: Config) -> str:
    """Write ``tune.md`` and ``best.yaml``; finished trials are kept with ``--resume``."""
    run = Run(config.run_dir)
    rows: list[dict[str, Any]] = []
    with run.command("tune", config, PACKAGES) as facts:
        prepared = open_prepared(config)
        for settings in progress(trials(config), "tune", "trial"):
            changed = {name: getattr(settings, name) for name in ("loss", "learning_rate", "purchase_weight")}
            name = "_".join(f"{value}" for value in changed.values())
            trial = Run(run.folder / "trials" / name)
            own = replace(config, train=settings, run_dir=str(trial.folder))
            with trial.command("train", own, PACKAGES) as found:
                found |= train_network(own, prepared, trial)
            rows.append(changed | found)
        rows.sort(key=lambda row: -row[f"ndcg_{config.split.target}"])
        facts |= {"trials": len(rows), **rows[0]}
        with atomic_file(run.folder / "tune.md") as path:
            path.write_text(markdown_table(rows))
        best = {name: rows[0][name] for name in ("loss", "learning_rate", "purchase_weight")}
        write_yaml(run.folder / "best.yaml", {"train": best, "model": asdict(config.model)})
    return text_table(rows)


def trials(config: Config) -> list[Train]:
    """The settings of training, each with each."""
    chosen = itertools.product(config.tune.losses, config.tune.learning_rates, config.tune.purchase_weights)
    return [
        replace(config.train, loss=loss, learning_rate=rate, purchase_weight=weight) for loss, rate, weight in chosen
    ]
