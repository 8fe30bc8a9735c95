"""Score representations on the window after the one they were trained on, beside rivals that must be beaten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightgbm
import numpy as np
from numpy.typing import NDArray

from ubt.config import Config
from ubt.features import Aggregates, aggregates
from ubt.labels import window_labels
from ubt.metrics import Auroc, auroc, macro_auroc, roc_curve
from ubt.plots import plot_labels, plot_roc
from ubt.prepare import Prepared
from ubt.probe import probe
from ubt.progress import progress
from ubt.rundir import write_json

OURS, BASELINE, TREES = "ubt embeddings, probe", "aggregates, probe", "aggregates, LightGBM"


@dataclass
class Task:
    """A task as the scorer sees it.

    Args:
        name: name of the task
        rows: users who take part [U]
        train: labels of the train window of those users [n, C]
        scored: labels of the scored window [n, C]
    """

    name: str
    rows: NDArray[np.bool_]
    train: NDArray[np.float32]
    scored: NDArray[np.float32]

    def area(self, score: NDArray) -> Auroc:
        """Return the AUROC of a score [n, C], the mean over the labels if there are several."""
        return auroc(self.scored[:, 0], score[:, 0]) if self.name == "churn" else macro_auroc(self.scored, score)


def score(prepared: Prepared, embeddings_dir: str | Path, config: Config) -> str:
    """Score our embeddings and their rivals, write ``metrics.json`` and plots, and return the table as text.

    Every representation is made of events before train_start. A probe, the same for all, is fitted on the labels of
    the train window and judged on the labels of the scored window of the same users; LightGBM likewise.

    Raises:
        FileNotFoundError: if there are no embeddings
        ValueError: if they do not fit the users asked for
    """
    embeddings = load_embeddings(prepared, embeddings_dir)
    baseline = aggregates(prepared, prepared.train_start, config.score.windows_days)
    tasks = _tasks(prepared)
    methods: dict[str, Callable[[Task], NDArray]] = {
        "constant": lambda task: np.zeros(task.scored.shape),
        "one feature, untrained": lambda task: _one_feature(baseline, task),
        BASELINE: lambda task: probe(baseline.values[task.rows], task.train, config.score, config.seed),
        TREES: lambda task: _trees(baseline.values[task.rows], task.train, config),
        OURS: lambda task: probe(embeddings[task.rows], task.train, config.score, config.seed),
    }
    scores: dict[str, dict[str, NDArray]] = {task.name: {} for task in tasks}
    areas: dict[str, dict[str, Auroc]] = {task.name: {} for task in tasks}
    with progress(len(methods) * len(tasks), "score", unit="method") as bar:
        for task in tasks:
            for name, method in methods.items():
                scores[task.name][name] = method(task)
                areas[task.name][name] = task.area(scores[task.name][name])
                bar.update()
    run_dir = Path(config.run_dir)
    widths = {BASELINE: baseline.values.shape[1], TREES: baseline.values.shape[1], OURS: embeddings.shape[1]}
    write_json(run_dir / "metrics.json", _metrics(prepared, tasks, areas))
    _plot(run_dir, tasks, scores)
    return _table(prepared, tasks, areas, widths)


def load_embeddings(prepared: Prepared, folder: str | Path) -> NDArray[np.float16]:
    """Return the embeddings [U, D] in the order of the users asked for, memory-mapped where the order allows it.

    Raises:
        FileNotFoundError: if a file is missing; names the command that helps
        ValueError: if dtype, shape or ids are not what the challenge accepts, or a value is not finite
    """
    folder = Path(folder)
    for name in ("embeddings.npy", "client_ids.npy"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name}: not found; run `ubt embed` with the same --config and --run-dir first"
            )
    vectors, ids = np.load(folder / "embeddings.npy", mmap_mode="r"), np.load(folder / "client_ids.npy")
    if vectors.ndim != 2 or vectors.dtype != np.float16 or not 0 < vectors.shape[1] <= 2048:
        raise ValueError(f"embeddings.npy: got {vectors.dtype} {vectors.shape}, needs float16 [users, 1..2048]")
    order = np.argsort(ids, kind="stable")
    if len(ids) != len(vectors) or not np.array_equal(ids[order], np.sort(prepared.users)):
        raise ValueError(
            f"client_ids.npy: got {len(ids)} ids, needs each of the {len(prepared.users)} relevant clients once"
        )
    for start in range(0, len(vectors), 1 << 16):
        if not np.isfinite(vectors[start : start + (1 << 16)]).all():
            raise ValueError(f"embeddings.npy: NaN or infinite in rows {start} to {start + (1 << 16)}")
    if np.array_equal(ids, prepared.users):
        return vectors
    return vectors[order[np.searchsorted(ids, prepared.users, sorter=order)]]


def _tasks(prepared: Prepared) -> list[Task]:
    train, scored = window_labels(prepared, "train"), window_labels(prepared, "validation")
    tasks = []
    active = ~np.isnan(train.churn)
    if active.any():
        tasks.append(Task("churn", active, train.churn[active, None], scored.churn[active, None]))
    if len(prepared.categories):
        rows = train.asked
        tasks.append(Task("category propensity", rows, train.category[rows].toarray(), scored.category[rows].toarray()))
    for task in tasks:
        for window, labels in (("train", task.train), ("scored", task.scored)):
            if not (labels.any() and (labels == 0).any()):
                raise ValueError(
                    f"{task.name}: all labels of the {window} window are the same, so nothing can be scored"
                )
    return tasks


def _one_feature(baseline: Aggregates, task: Task) -> NDArray:
    """Recency of the last event for churn; for propensity, how often a user touched each target category."""
    if task.name == "churn":
        columns = [baseline.names.index("any: days since last")]
    else:
        columns = [baseline.names.index(f"target category {i}") for i in range(task.scored.shape[1])]
    return baseline.values[task.rows][:, columns]


def _trees(features: NDArray, labels: NDArray, config: Config) -> NDArray:
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
    data = lightgbm.Dataset(features, params=settings, free_raw_data=False)
    scores = np.zeros(labels.shape)
    for c in range(labels.shape[1]):
        if labels[:, c].any():
            model = lightgbm.train(settings, data.set_label(np.ascontiguousarray(labels[:, c])), config.score.trees)
            scores[:, c] = model.predict(features, raw_score=True)
    return scores


def _metrics(prepared: Prepared, tasks: list[Task], areas: dict[str, dict[str, Auroc]]) -> dict:
    result: dict = {"scored_window": [str(prepared.valid_start), str(prepared.end)], "tasks": {}}
    for task in tasks:
        methods = {}
        for name, area in areas[task.name].items():
            difference, error = area.minus(areas[task.name][BASELINE])
            methods[name] = {
                "auroc": round(area.value, 5),
                "standard_error": round(area.standard_error, 5),
                "minus_aggregates_probe": round(difference, 5),
                "standard_error_of_difference": round(error, 5),
            }
        result["tasks"][task.name] = {
            "users": int(task.rows.sum()),
            "positives": int(task.scored.sum()),
            "labels_scored": areas[task.name][OURS].labels,
            "labels": task.scored.shape[1],
            "methods": methods,
        }
    return result


def _table(prepared: Prepared, tasks: list[Task], areas: dict[str, dict[str, Auroc]], widths: dict[str, int]) -> str:
    lines = [f"scored window {prepared.valid_start} .. {prepared.end} UTC, history before {prepared.train_start}"]
    head = f"{'method':<26}{'dims':>6}"
    for task in tasks:
        head += f"{task.name + ', AUROC (se)':>34}{'- aggregates (se)':>22}"
    lines += [head, "-" * len(head)]
    for name in areas[tasks[0].name]:
        line = f"{name:<26}{widths.get(name, '-'):>6}"
        for task in tasks:
            area = areas[task.name][name]
            difference, error = area.minus(areas[task.name][BASELINE])
            line += f"{area.value:>25.4f} ({area.standard_error:.4f})"
            line += f"{'-':>22}" if name == BASELINE else f"{difference:>+13.4f} ({error:.4f})"
        lines.append(line)
    for task in tasks:
        number = f"{int(task.rows.sum()):,} users, {int(task.scored.sum()):,} positive labels"
        if task.name != "churn":
            number += f", mean over {areas[task.name][OURS].labels} of {task.scored.shape[1]} categories"
        lines.append(f"{task.name}: {number}. {_verdict(areas[task.name])}")
    return "\n".join(lines)


def _verdict(areas: dict[str, Auroc]) -> str:
    sentences = []
    for rival in (BASELINE, TREES):
        difference, error = areas[OURS].minus(areas[rival])
        word = "win against" if difference > 2 * error else "LOSE against" if difference < -2 * error else "tie with"
        sentences.append(f"{word} {rival} ({difference:+.4f}, se {error:.4f})")
    return "Our embeddings " + " and ".join(sentences) + "."


def _plot(run_dir: Path, tasks: list[Task], scores: dict[str, dict[str, NDArray]]) -> None:
    shown = (BASELINE, TREES, OURS)
    for task in tasks:
        if task.name == "churn":
            curves = {name: roc_curve(task.scored[:, 0], scores[task.name][name][:, 0]) for name in shown}
            plot_roc(run_dir, curves, "Churn in the scored window")
        else:
            usable = [c for c in range(task.scored.shape[1]) if 0 < task.scored[:, c].sum() < len(task.scored)]
            lists = {
                name: [auroc(task.scored[:, c], scores[task.name][name][:, c]).value for c in usable] for name in shown
            }
            plot_labels(run_dir, lists, "Purchase of each target category in the scored window")
