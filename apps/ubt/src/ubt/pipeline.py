"""The steps of a run, in order, each timed and recorded in the run directory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from ubt.config import Config, TrainConfig
from ubt.progress import show_progress
from ubt.rundir import read_json, record, temporary_file

STEPS = ("generate", "prepare", "train", "embed", "score")


def run(steps: Sequence[str], config: Config) -> int:
    """Run the named steps, print one line for each, and return 0."""
    config.check()
    _share(config)
    show_progress(config.progress)
    config.data_dir = os.path.expandvars(os.path.expanduser(config.data_dir))
    if "$" in config.data_dir:
        raise ValueError(
            f"data_dir: {config.data_dir} names an environment variable that is not set; set it or give --data-dir"
        )
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    run_dir, helper = Path(config.run_dir), int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) > 0
    if helper:
        # Training is all that several processes share; the first one does the rest.
        _train(config, False)
        return 0
    if steps != ("generate",):
        run_dir.mkdir(parents=True, exist_ok=True)
        with temporary_file(run_dir / "config.yaml") as name:
            name.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    for step in steps:
        begin = time.perf_counter()
        if step == "generate" and len(steps) > 1 and not config.generate.if_missing:
            continue
        line, facts = globals()[f"_{step}"](config, len(steps) > 1)
        seconds = time.perf_counter() - begin
        print(f"{step}: {line} ({seconds:.1f} s)", flush=True)
        if steps != ("generate",):
            record(run_dir, step, seconds, seed=config.seed, **facts)
    return 0


def _share(config: Config) -> None:
    """Take the number of processes from torchrun, where that started this one."""
    started = int(os.environ.get("WORLD_SIZE", config.train.processes))
    if config.train.processes not in (started, TrainConfig.processes):
        raise ValueError(
            f"train.processes: got {config.train.processes}, needs {started}, "
            "the processes that were started (WORLD_SIZE)"
        )
    config.train.processes = started


def _generate(config: Config, whole_run: bool) -> tuple[str, dict]:
    from synthlogs.folder import MARK
    from synthlogs.shop import generate, settings_of

    folder = Path(config.data_dir)
    if whole_run and folder.exists() and any(folder.iterdir()):
        found = read_json(folder / MARK)
        if not found or found == settings_of(config.generate):
            return f"{folder} is there already", {}
    generate(folder, config.generate, bar=config.progress)
    return f"{config.generate.clients:,} clients over {config.generate.days} days in {folder}", {}


def _prepare(config: Config, whole_run: bool) -> tuple[str, dict]:
    from ubt.prepare import open_prepared, prepare

    written = prepare(config.data_dir, config.prepared, config.log, config.prepare)
    prepared = open_prepared(config.prepared)
    store = prepared.store
    line = f"{store.num_events:,} events of {store.num_users:,} users, {len(prepared.users):,} asked for"
    return f"{line}, in {prepared.folder}{'' if written else ', up to date'}", {
        "data_fingerprint": prepared.fingerprint
    }


def _train(config: Config, whole_run: bool) -> tuple[str, dict]:
    from ubt.prepare import open_prepared
    from ubt.train import train

    best = train(open_prepared(config.prepared), config)
    epochs = read_json(Path(config.run_dir) / "epochs.json")
    chosen = min(epochs, key=lambda number: epochs[number]["valid_loss"])
    areas = [
        f"{name.removeprefix('valid_auroc_')} {value:.4f}" for name, value in epochs[chosen].items() if "auroc" in name
    ]
    kept_apart = f"; AUROC of users kept apart: {', '.join(areas)}" if areas else ""
    return f"best of {len(epochs)} epochs is {int(chosen) + 1} in {best}{kept_apart}", {}


def _embed(config: Config, whole_run: bool) -> tuple[str, dict]:
    from ubt.blocks import open_entry, write_blocks
    from ubt.embed import embed
    from ubt.prepare import open_prepared

    prepared = open_prepared(config.prepared)
    number, width, without = embed(prepared, _checkpoint(config), config.embeddings, _cache(config), config.embed)
    line = f"{number:,} users x {width} float16 in {config.embeddings}, {without:,} of them without events, no NaN"
    folders = write_blocks(prepared, config, baseline=False)
    dims = ", ".join(f"{name} {open_entry(folder, prepared.users)[0].shape[1]}" for name, folder in folders.items())
    return f"{line}; blocks: {dims}", {}


def _update(config: Config, whole_run: bool) -> tuple[str, dict]:
    from ubt.prepare import open_prepared
    from ubt.update import append_days, update

    prepared = open_prepared(config.prepared)
    if config.update.new_data is not None:
        prepared = append_days(prepared, config.data_dir, config.update.new_data, config.log)
    number, reused, moment = update(prepared, _checkpoint(config), config.embeddings, _cache(config), config)
    return f"{number:,} users have new events before {moment}, {reused:,} of them embedded from the cache", {}


def _score(config: Config, whole_run: bool) -> tuple[str, dict]:
    from ubt.embed import check_made_of
    from ubt.prepare import open_prepared
    from ubt.score import score

    prepared = open_prepared(config.prepared)
    if "hstu" in config.blocks:
        check_made_of(config.embeddings, prepared, _checkpoint(config))
    table = score(prepared, config)
    return f"metrics in {Path(config.run_dir) / 'metrics.json'}\n{table}\n", {}


def _checkpoint(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints" / "best.ckpt"


def _cache(config: Config) -> Path:
    return Path(config.run_dir) / "cache"
