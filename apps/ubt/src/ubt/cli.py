"""The console script: one subcommand a step, and `ubt run` for all of them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from runkit.cli import App, Command
from ubt import pipeline
from ubt.config import Config

ALWAYS = ("data_dir", "run_dir", "embeddings_dir", "blocks", "seed", "resume", "progress")
EXAMPLES = """\
  ubt run --config demo
  ubt run --config rees46 --data-dir ~/data/rees46 --run-dir runs/rees46
  ubt score --config demo --scorer official --blocks hstu,cf
  ubt train --config demo --num-epochs 5 --task-weights churn:1.0,category_propensity:0.5 --resume
  ubt update --config demo --new-data new_days --until "2022-10-20"
"""
COMMANDS = {
    "generate": Command(
        pipeline.generate,
        Config,
        "write a log in the RecSys Challenge 2025 layout, with signal planted in it, to data_dir",
        (*ALWAYS, "generate"),
    ),
    "prepare": Command(
        pipeline.prepare,
        Config,
        "read the raw log and write store, targets and users to <run_dir>/prepared",
        (*ALWAYS, "log", "prepare"),
    ),
    "train": Command(
        pipeline.train,
        Config,
        "train the network on what `ubt prepare` wrote; checkpoints go to <run_dir>/checkpoints",
        (*ALWAYS, "model", "train"),
    ),
    "embed": Command(
        pipeline.embed,
        Config,
        "write embeddings.npy and client_ids.npy with the best checkpoint, and the other blocks beside them",
        (*ALWAYS, "embed", "features"),
    ),
    "score": Command(
        pipeline.score,
        Config,
        "score blocks, alone and together, as the challenge does, on the window after the one of training",
        (*ALWAYS, "features", "score", "train.threads"),
    ),
    "update": Command(
        pipeline.update,
        Config,
        "embed the users with new events, from what `ubt embed` kept of their old ones; other rows stay",
        (*ALWAYS, "update", "embed", "log"),
    ),
    "run": Command(
        pipeline.run,
        Config,
        "all of it: generate (where the config says so), prepare, train, embed, score",
        (*ALWAYS, "generate", "log", "prepare", "model", "train", "embed", "features", "score"),
    ),
}
APP = App(
    "ubt",
    "One vector per user, learned from an event log and scored against baselines.",
    COMMANDS,
    presets=Path(str(files("ubt") / "configs")),
    examples=EXAMPLES,
)
main, entry = APP.main, APP.entry
