"""Plots of a run as PNG, one message a figure, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from runkit.files import atomic_file


def lines(
    path: str | Path,
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str,
    x: str,
    y: str,
    size: tuple[float, float] = (6, 4),
    whole: bool = False,
    diagonal: bool = False,
    marker: str | None = None,
) -> None:
    """Draw one line a name; labels of axes bear their units.

    Args:
        path: the PNG
        series: name -> places and heights [n] of its points
        title: the message
        x, y: labels of the axes, with units
        size: of the figure, in inches
        whole: marks of the x axis at whole numbers only
        diagonal: a dotted line from (0, 0) to (1, 1), what chance or a calibrated model gives
        marker: mark of each point
    """
    figure, axes = _figure(size, title, x, y)
    for name, (places, heights) in series.items():
        axes.plot(places, heights, label=name, marker=marker)
    if diagonal:
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small")
    save(figure, path)


def bars(path: str | Path, heights: Mapping[str, float], title: str, y: str, errors: ArrayLike | None = None) -> None:
    """Draw one bar a name, with standard errors [n] where they are given."""
    figure, axes = _figure((6, 4), title, "", y)
    axes.bar(list(heights), list(heights.values()), yerr=errors, capsize=3)
    axes.tick_params(axis="x", rotation=30)
    save(figure, path)


def calibration(path: str | Path, predicted: ArrayLike, observed: ArrayLike, title: str, bins: int = 10) -> None:
    """Draw the mean outcome against the mean prediction in `bins` groups of equal size, lowest predictions first."""
    predicted, observed = np.asarray(predicted, float), np.asarray(observed, float)
    order = np.argsort(predicted, kind="stable")
    groups = [rows for rows in np.array_split(order, bins) if len(rows)]
    points = np.array([(predicted[rows].mean(), observed[rows].mean()) for rows in groups])
    figure, axes = _figure((5, 5), title, "mean prediction", "mean outcome")
    top = float(points.max())
    axes.plot([0, top], [0, top], color="grey", linewidth=0.8, linestyle=":")
    axes.plot(points[:, 0], points[:, 1], marker="o")
    save(figure, path)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG."""
    figure.tight_layout()
    with atomic_file(path) as name:
        figure.savefig(name, dpi=130, format="png")


def _figure(size: tuple[float, float], title: str, x: str, y: str) -> tuple[Figure, Axes]:
    # Without pyplot nothing is kept open and no backend is chosen for the process.
    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, title=title)
    return figure, axes
