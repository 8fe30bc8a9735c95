"""What each command does, from its settings to the line it prints; all but `generate` work in the run directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runkit.files import read_json
from runkit.run import Run, is_helper
from runkit.settings import SettingError
from ubt.config import Config, TrainConfig

HOUSE = ("ubt", "seqdata", "hstu-kernels", "mtl-heads", "runkit", "synthlogs")
PACKAGES = (*HOUSE, "torch", "lightning", "numpy", "duckdb", "lightgbm", "scikit-learn")


def generate(config: Config) -> str:
    """Write a log of its own to data_dir."""
    from synthlogs.shop import generate as write

    began = time.perf_counter()
    write(config.data, config.generate, bar=config.progress)
    return f"generate: {_generated(config)} ({time.perf_counter() - began:.1f} s)"


def prepare(config: Config) -> None:
    """Bring the raw log into store, targets and users."""
    _steps(config, prepare=_prepare)


def train(config: Config) -> None:
    """Train the network on what is prepared."""
    _steps(config, train=_train)


def embed(config: Config) -> None:
    """Write the vectors of all users."""
    _steps(config, embed=_embed)


def score(config: Config) -> None:
    """Score the vectors beside their rivals."""
    _steps(config, score=_score)


def update(config: Config) -> None:
    """Embed the users with new events."""
    _steps(config, update=_update)


def run(config: Config) -> None:
    """Take all steps, one after the other."""
    first = {"generate": _generate} if config.generate.if_missing else {}
    with Run(config.run_dir).command("run", config, PACKAGES):
        _steps(config, **first, prepare=_prepare, train=_train, embed=_embed, score=_score)


def _steps(config: Config, **steps: Callable[[Config, dict[str, Any]], str]) -> None:
    """Take steps in the run directory; each is timed, recorded, and says in a line what it did."""
    _share(config)
    if is_helper():
        # Training is all that several processes share; the first one does the rest.
        steps = {"train": _train}
    for name, step in steps.items():
        began = time.perf_counter()
        with Run(config.run_dir).command(name, config, PACKAGES) as facts:
            line = step(config, facts)
        if not is_helper():
            print(f"{name}: {line} ({time.perf_counter() - began:.1f} s)", flush=True)


def _share(config: Config) -> None:
    """Take the number of processes from torchrun, where that started this one, and the number of threads."""
    started = int(os.environ.get("WORLD_SIZE", config.train.processes))
    if config.train.processes not in (started, TrainConfig.processes):
        raise SettingError(
            f"train.processes: got {config.train.processes}, needs {started}, "
            "the processes that were started (WORLD_SIZE)"
        )
    config.train.processes = started
    if config.train.threads:
        import torch

        torch.set_num_threads(config.train.threads)


def _generate(config: Config, facts: dict[str, Any]) -> str:
    from synthlogs.folder import MARK
    from synthlogs.shop import generate, settings_of

    folder = config.data
    if folder.exists() and any(folder.iterdir()):
        found = read_json(folder / MARK)
        if not found or found == settings_of(config.generate):
            return f"{folder} is there already"
    generate(folder, config.generate, bar=config.progress)
    return _generated(config)


def _generated(config: Config) -> str:
    return f"{config.generate.clients:,} clients over {config.generate.days} days in {config.data}"


def _prepare(config: Config, facts: dict[str, Any]) -> str:
    from ubt.prepare import open_prepared, prepare

    written = prepare(config.data, config.prepared, config.log, config.prepare)
    prepared = open_prepared(config.prepared)
    store = prepared.store
    facts["data_fingerprint"] = prepared.fingerprint
    line = f"{store.num_events:,} events of {store.num_users:,} users, {len(prepared.users):,} asked for"
    return f"{line}, in {prepared.folder}{'' if written else ', up to date'}"


def _train(config: Config, facts: dict[str, Any]) -> str:
    from ubt.prepare import open_prepared
    from ubt.train import train

    best = train(open_prepared(config.prepared), config)
    epochs = read_json(Path(config.run_dir) / "epochs.json")
    chosen = min(epochs, key=lambda number: epochs[number]["valid_loss"])
    areas = [
        f"{name.removeprefix('valid_auroc_')} {value:.4f}" for name, value in epochs[chosen].items() if "auroc" in name
    ]
    kept_apart = f"; AUROC of users kept apart: {', '.join(areas)}" if areas else ""
    return f"best of {len(epochs)} epochs is {int(chosen) + 1} in {best}{kept_apart}"


def _embed(config: Config, facts: dict[str, Any]) -> str:
    from ubt.blocks import open_entry, write_blocks
    from ubt.embed import embed
    from ubt.prepare import open_prepared

    prepared = open_prepared(config.prepared)
    number, width, without = embed(prepared, config.checkpoint, config.embeddings, config.cache, config.embed)
    line = f"{number:,} users x {width} float16 in {config.embeddings}, {without:,} of them without events, no NaN"
    folders = write_blocks(prepared, config, baseline=False)
    dims = ", ".join(f"{name} {open_entry(folder, prepared.users)[0].shape[1]}" for name, folder in folders.items())
    return f"{line}; blocks: {dims}"


def _update(config: Config, facts: dict[str, Any]) -> str:
    from ubt.prepare import open_prepared
    from ubt.update import append_days, update

    prepared = open_prepared(config.prepared)
    if config.update.new_data is not None:
        prepared = append_days(prepared, config.data, config.update.new_data, config.log)
    number, reused, moment = update(prepared, config.checkpoint, config.embeddings, config.cache, config)
    return f"{number:,} users have new events before {moment}, {reused:,} of them embedded from the cache"


def _score(config: Config, facts: dict[str, Any]) -> str:
    from ubt.embed import check_made_of
    from ubt.prepare import open_prepared
    from ubt.score import score

    prepared = open_prepared(config.prepared)
    if "hstu" in config.blocks:
        check_made_of(config.embeddings, prepared, config.checkpoint)
    return f"metrics in {Path(config.run_dir) / 'metrics.json'}\n{score(prepared, config)}\n"
