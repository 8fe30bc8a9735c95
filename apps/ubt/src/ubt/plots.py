"""Plots of a run, one message a figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from numpy.typing import NDArray

from ubt.rundir import read_json, temporary_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator


def plot_losses(run_dir: Path) -> None:
    """Draw training and validation loss over the epochs into ``plots/loss.png``."""
    epochs = read_json(run_dir / "epochs.json")
    x = [int(number) + 1 for number in epochs]
    figure, axes = plt.subplots(figsize=(6, 4))
    for name in ("train_loss", "valid_loss"):
        axes.plot(x, [values.get(name) for values in epochs.values()], marker="o", label=name.replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="weighted loss, nats a user", title="Loss over the epochs")
    axes.legend()
    _save(figure, run_dir / "plots" / "loss.png")


def plot_roc(run_dir: Path, curves: dict[str, tuple[NDArray, NDArray]], title: str) -> None:
    """Draw one ROC curve for each method into ``plots/roc_churn.png``; `curves` holds false and true positive rates."""
    figure, axes = plt.subplots(figsize=(5, 5))
    for name, (false, true) in curves.items():
        axes.plot(false, true, label=name)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=title)
    axes.legend(loc="lower right", fontsize="small")
    _save(figure, run_dir / "plots" / "roc_churn.png")


def plot_labels(run_dir: Path, areas: dict[str, list[float]], title: str) -> None:
    """Draw the AUROC of every target category, sorted, for each method into ``plots/auroc_category.png``."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, values in areas.items():
        axes.plot(range(1, len(values) + 1), sorted(values, reverse=True), label=name)
    axes.set(xlabel="target category, best first", ylabel="AUROC", title=title)
    axes.legend(fontsize="small")
    _save(figure, run_dir / "plots" / "auroc_category.png")


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    with temporary_file(path) as name:
        figure.savefig(name, dpi=130)
    plt.close(figure)
