"""Score blocks of user vectors, alone and together, as the challenge does, beside rivals that must be beaten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.metrics import roc_curve

from runkit.compare import Estimate, auroc, two_class_columns, verdict
from runkit.files import atomic_file, write_json
from runkit.plots import lines
from runkit.progress import progress
from seqdata import positions_of
from ubt import official
from ubt.blocks import BASELINE, open_entry, write_blocks
from ubt.config import Config, ScoreConfig, parse_blocks
from ubt.labels import Labels, window_labels
from ubt.official import Result, Task
from ubt.prepare import Prepared

CONSTANT, TREES, ALL = "constant", "LightGBM on aggregates", "all"
# Propensity task -> what is asked about.
PROPENSITY = {
    "propensity_category": "category",
    "propensity_sku": "sku",
    "propensity_new_sku": "new_sku",
    "propensity_price": "price",
}
TASKS = ("churn", "propensity_category", "propensity_sku", "conversion", "propensity_new_sku", "propensity_price")


@dataclass
class Method:
    """One row of the table.

    Args:
        dims: width of the vectors, None where there are none
        score: gives its result on a task
    """

    dims: int | None
    score: Callable[[Task], Result]


@dataclass
class _Scored:
    """What was scored: who on what, and the results by method and task."""

    prepared: Prepared
    config: Config
    tasks: list[Task]
    left_out: dict[str, str]
    methods: dict[str, Method]
    results: dict[str, dict[str, Result]]


def score(prepared: Prepared, config: Config) -> str:
    """Score every block, all of them together and all but one, and their rivals; return the tables as text.

    All vectors are made of events before train_start. The scorer's network is fitted on the labels of the train window
    and judged on the labels of the scored window of the same users. Writes the blocks that are not there yet,
    ``metrics.json``, the tables in ``scores/table.txt``, ``scores/<method>/scores.json`` and ``epochs.json`` as the
    challenge's tool does, and plots.

    Raises:
        FileNotFoundError: if the network's embeddings are missing; names the command that helps
        ValueError: if they are no entry the challenge accepts, or no task can be scored
    """
    config.check()
    names = parse_blocks(config.blocks)
    folders = write_blocks(prepared, config)
    order = _order(prepared, config, names)
    tasks, left_out = _tasks(prepared, config.score, order, config.seed)
    vectors = {name: open_entry(folders[name], prepared.users)[0] for name in [BASELINE, *names]}
    methods = _methods(vectors, names, config)
    results: dict[str, dict[str, Result]] = {name: {} for name in methods}
    with progress(len(methods) * len(tasks), "score", unit="fit") as bar:
        for task in tasks:
            for name, method in methods.items():
                results[name][task.name] = method.score(task)
                bar.update()
    scored = _Scored(prepared, config, tasks, left_out, methods, results)
    _write(scored)
    _plot(scored, [BASELINE, *names, *([ALL] if len(names) > 1 else [])])
    text = _tables(scored, names)
    with atomic_file(Path(config.run_dir) / "scores" / "table.txt") as path:
        path.write_text(text + "\n")
    return text


def _order(prepared: Prepared, config: Config, names: list[str]) -> NDArray[np.int64]:
    """Positions of the users in the order of the entry's client_ids.npy, which is the order of training."""
    if "hstu" not in names:
        return np.arange(len(prepared.users))
    return positions_of(np.load(config.embeddings / "client_ids.npy"), prepared.users)


def _tasks(
    prepared: Prepared, config: ScoreConfig, order: NDArray[np.int64], seed: int
) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks that can be scored, and why the others cannot."""
    train, scored = window_labels(prepared, "train"), window_labels(prepared, "validation")
    users = order[train.asked[order] & scored.asked[order]]
    if config.scorer == "sampled" and 0 < config.sample < len(users):
        kept = np.random.default_rng([seed, 11]).choice(len(users), config.sample, replace=False)
        users = users[np.sort(kept)]
    tasks, left_out = [], {}
    for name in TASKS:
        rows = users[~np.isnan(train.churn[users])] if name == "churn" else users
        popularity = prepared.targets[PROPENSITY[name]].popularity if name in PROPENSITY else None
        task = Task(name, rows, _labels(train, name)[rows], _labels(scored, name)[rows], popularity)
        reason = _unfit(task)
        if reason:
            left_out[name] = reason
        else:
            tasks.append(task)
    if not tasks:
        listed = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"no task can be scored: {listed}")
    return tasks, left_out


def _labels(labels: Labels, task: str) -> csr_array:
    if task in PROPENSITY:
        return {
            "category": labels.category,
            "sku": labels.sku,
            "new_sku": labels.new_sku,
            "price": labels.price_buckets,
        }[PROPENSITY[task]]
    return csr_array(np.nan_to_num({"churn": labels.churn, "conversion": labels.conversion}[task])[:, None])


def _unfit(task: Task) -> str | None:
    width = task.train.shape[1]
    if not len(task.rows):
        return "no client takes part"
    if task.popularity is not None and width < 2:
        return f"{width} targets, needs two or more"
    if task.popularity is not None and not task.popularity.any():
        return "no target has a popularity above 0"
    for window, labels in (("train", task.train), ("scored", task.scored)):
        if labels.nnz in (0, len(task.rows) * width):
            return f"all labels of the {window} window are {int(labels.nnz > 0)}"
    return None


def _methods(vectors: dict[str, NDArray], names: list[str], config: Config) -> dict[str, Method]:
    def network(*blocks: str) -> Method:
        parts = [vectors[block] for block in blocks]

        def features(rows: NDArray[np.int64]) -> NDArray:
            return np.concatenate([part[rows] for part in parts], 1)

        return Method(sum(part.shape[1] for part in parts), lambda task: _fit(features, task, config.score))

    methods = {CONSTANT: Method(None, lambda task: official.judged(task, np.zeros(task.scored.shape, np.float32)))}
    methods[BASELINE] = network(BASELINE)
    if config.score.trees and "aggregates" in names:
        block = vectors["aggregates"]
        methods[TREES] = Method(
            block.shape[1], lambda task: official.judged(task, _trees(block[task.rows], task, config))
        )
    methods |= {name: network(name) for name in names}
    if len(names) > 1:
        methods[ALL] = network(*names)
    if len(names) > 2:
        methods |= {_without(name): network(*(other for other in names if other != name)) for name in names}
    return methods


def _without(name: str) -> str:
    return f"{ALL} but {name}"


def _fit(features: Callable[[NDArray[np.int64]], NDArray], task: Task, config: ScoreConfig) -> Result:
    """One network in "official"; in "sampled" the mean over `seeds` networks, with the logits of the first."""
    if config.scorer == "official":
        return official.fit(features, task, official.WIDTH, official.BLOCKS)
    results = [
        official.fit(features, task, config.width, config.layers, official.SEED + i) for i in range(config.seeds)
    ]
    influence = np.mean([one.estimate.influence for one in results], axis=0)
    return Result(
        estimate=Estimate(float(np.mean([one.score for one in results])), influence),
        parts={part: float(np.mean([one.parts[part] for one in results])) for part in results[0].parts},
        best_epoch=results[0].best_epoch,
        logits=results[0].logits,
    )


def _trees(features: NDArray, task: Task, config: Config) -> NDArray[np.float32]:
    """Fit one LightGBM per label and return its raw scores [n, C]; the bins are made once for all labels."""
    settings = {
        "objective": "binary",
        "learning_rate": 0.05,
        "num_leaves": 7,
        "min_data_in_leaf": 30,
        "feature_fraction": 0.3,
        "lambda_l2": 5.0,
        "max_bin": 63,
        "seed": config.seed,
        "deterministic": True,
        "force_col_wise": True,
        "num_threads": config.train.threads,
        "verbosity": -1,
    }
    features = np.asarray(features, np.float32)
    data = lightgbm.Dataset(features, params=settings, free_raw_data=False)
    truth = task.train.toarray()
    # A label that nobody had in the train window is as good as impossible.
    scores = np.full(truth.shape, -np.log(2 * len(truth)), np.float32)
    for c in np.flatnonzero(truth.any(0)):
        model = lightgbm.train(settings, data.set_label(np.ascontiguousarray(truth[:, c])), config.score.trees)
        scores[:, c] = model.predict(features, raw_score=True)
    return scores


def _write(scored: _Scored) -> None:
    run_dir, results = Path(scored.config.run_dir), scored.results
    content: dict = {
        "scorer": _scorer(scored.config.score),
        "scored_window": [str(scored.prepared.valid_start), str(scored.prepared.end)],
        "left_out": scored.left_out,
        "tasks": {},
    }
    for task in scored.tasks:
        found = {}
        for name, method in scored.methods.items():
            result = results[name][task.name]
            difference = result.estimate - results[BASELINE][task.name].estimate
            found[name] = {
                "dims": method.dims,
                "score": round(result.score, 5),
                "standard_error": round(result.estimate.error, 5),
                **{part: round(value, 5) for part, value in result.parts.items()},
                "best_epoch": result.best_epoch,
                "minus_official_baseline": round(difference.value, 5),
                "standard_error_of_difference": round(difference.error, 5),
            }
        content["tasks"][task.name] = {
            "clients": len(task.rows),
            "positives": int(task.scored.nnz),
            "labels": task.scored.shape[1],
            "methods": found,
        }
    write_json(run_dir / "metrics.json", content)
    for name, one in results.items():
        folder = run_dir / "scores" / name.replace(" ", "_")
        write_json(folder / "scores.json", {task: result.score for task, result in one.items()})
        write_json(folder / "epochs.json", {task: result.best_epoch for task, result in one.items()})


def _scorer(config: ScoreConfig) -> str:
    if config.scorer == "official":
        return f"official: all clients, network {official.WIDTH} wide with {official.BLOCKS} blocks"
    clients = f"at most {config.sample:,} clients" if config.sample else "all clients"
    more = f", mean of {config.seeds} networks" if config.seeds > 1 else ""
    return (
        f"sampled: {clients}, network {config.width} wide with {config.layers} block(s){more}; "
        "not comparable with the challenge's leaderboard"
    )


def _tables(scored: _Scored, names: list[str]) -> str:
    prepared, tasks, methods, results = scored.prepared, scored.tasks, scored.methods, scored.results
    shown = {task.name: task.name.removeprefix("propensity_") for task in tasks}
    lines = [
        f"scorer {_scorer(scored.config.score)}",
        f"scored window {prepared.valid_start} .. {prepared.end} UTC, history before {prepared.train_start}",
        "score of the challenge: AUROC for churn and conversion, else 0.8 AUROC + 0.1 novelty + 0.1 diversity; "
        "(standard error)",
    ]
    head = f"{'method':<24}{'dims':>6}" + "".join(f"{shown[task.name]:>18}" for task in tasks)
    lines += [head, "-" * len(head)]
    for name, method in methods.items():
        line = f"{name:<24}{method.dims if method.dims else '-':>6}"
        for task in tasks:
            result = results[name][task.name]
            line += f"{result.score:>9.4f} ({result.estimate.error:.4f})"
        lines.append(line)
    clients = ", ".join(f"{shown[t.name]} {len(t.rows):,} / {t.scored.nnz:,}" for t in tasks)
    lines.append(f"clients / positive labels in the scored window: {clients}")
    lines += [f"{name}: left out, {reason}" for name, reason in scored.left_out.items()]
    lines += ["", f"{'difference':<30}" + "".join(f"{shown[task.name]:>24}" for task in tasks)]
    ours = ALL if len(names) > 1 else names[0]
    for one, other in _comparisons(names, ours, methods):
        line = f"{f'{one} - {other}':<30}"
        for task in tasks:
            difference = results[one][task.name].estimate - results[other][task.name].estimate
            line += f"{difference.value:>+10.4f} ({difference.error:.4f}) {verdict(difference):<4}"
        lines.append(line)
    return "\n".join(lines)


def _comparisons(names: list[str], ours: str, methods: dict[str, Method]) -> list[tuple[str, str]]:
    pairs = [(ours, BASELINE), *((name, BASELINE) for name in names if name != ours), (ours, TREES)]
    # What a block adds to the others.
    pairs += [(ours, _without(name)) for name in names]
    if len(names) == 2:
        pairs += [(ours, name) for name in names]
    return [(one, other) for one, other in pairs if one in methods and other in methods]


def _plot(scored: _Scored, shown: list[str]) -> None:
    folder = Path(scored.config.run_dir) / "plots"
    for task in scored.tasks:
        truth, logits = task.scored.toarray(), {name: scored.results[name][task.name].logits for name in shown}
        series: dict[str, tuple[Any, Any]] = {}
        if task.name == "churn":
            for name, one in logits.items():
                series[name] = roc_curve(truth[:, 0], one[:, 0], drop_intermediate=False)[:2]
            rates = "false positive rate", "true positive rate"
            lines(folder / "roc_churn.png", series, "Churn in the scored window", *rates, size=(5, 5), diagonal=True)
        elif task.name == "propensity_category":
            for name, one in logits.items():
                areas = [auroc(one[:, c], truth[:, c]).value for c in two_class_columns(truth)]
                series[name] = (range(1, len(areas) + 1), sorted(areas, reverse=True))
            title = "Purchase of each target category in the scored window"
            lines(folder / "auroc_category.png", series, title, x="target category, best first", y="AUROC")
