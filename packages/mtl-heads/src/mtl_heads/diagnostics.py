"""Do the tasks pull together? Gradient conflicts, gradient norms and the weights applied, over time."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .aggregation import GradientAggregator
from .gradients import gramian, task_gradients
from .tasks import TaskLosses


class GradientMonitor(nn.Module):
    """Keeps, for each recorded step, the cosines between the tasks' gradients, their norms and the weights applied.

    A task without a label in the batch has NaN in all three. The history is part of ``state_dict``.

    Args:
        tasks: task names, in the losses' order.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.steps: list[int] = []
        self._cosines: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._weights: list[Tensor] = []

    def measure(
        self, step: int, losses: TaskLosses, shared: Iterable[Tensor], weights: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Compute the gradients of the batch's losses and record them; call before ``backward`` frees the graph.

        Costs one backward pass for each task: measure every hundred steps or so.

        Args:
            step: number of the step, for the plot's axis.
            losses: the batch's losses.
            shared: the shared parameters, or a layer of them.
            weights: the weights applied, e.g. ``weighting.effective_weights()``.
        """
        matrices = task_gradients(losses.values, list(shared), losses.counts > 0)
        products = gramian(matrices)
        absent = losses.counts <= 0
        products[absent] = torch.nan
        products[:, absent] = torch.nan
        return self.record(step, products, weights)

    def record(self, step: int, gramian: Tensor, weights: Mapping[str, float] | None = None) -> dict[str, float]:
        """Record gradients that are known already, e.g. ``aggregator.last_gramian``.

        Args:
            step: number of the step.
            gramian: inner products of the tasks' gradients [K, K], NaN for absent tasks.
            weights: the weights applied, by task.
        """
        k = len(self.tasks)
        if gramian.shape != (k, k):
            raise ValueError(f"gramian must be [{k}, {k}], got {tuple(gramian.shape)}")
        products = gramian.detach().double().cpu()
        norms = products.diagonal().clamp_min(0).sqrt()
        self.steps.append(step)
        # A zero gradient conflicts with nothing: cosine 0.
        self._cosines.append(products / torch.outer(norms, norms).clamp_min(1e-300))
        self._norms.append(norms)
        self._weights.append(torch.tensor([(weights or {}).get(t, torch.nan) for t in self.tasks], dtype=torch.float64))
        return self.metrics()

    def record_aggregator(self, step: int, aggregator: GradientAggregator) -> dict[str, float]:
        """Record what an aggregator saw in its last ``backward``, at no cost."""
        return self.record(step, aggregator.last_gramian, aggregator.effective_weights())

    def metrics(self) -> dict[str, float]:
        """The latest record: ``gradient_cosine/a.b``, ``gradient_norm/a``, ``weight/a``, and ``gradient_conflict``,
        the share of task pairs with a negative cosine; NaN values are left out.
        """
        if not self.steps:
            return {}
        cosines, norms, weights = self._cosines[-1], self._norms[-1], self._weights[-1]
        pairs = [(i, j) for i in range(len(self.tasks)) for j in range(i)]
        values = {f"gradient_cosine/{self.tasks[j]}.{self.tasks[i]}": float(cosines[i, j]) for i, j in pairs}
        known = [value for value in values.values() if value == value]
        if known:
            values["gradient_conflict"] = sum(value < 0 for value in known) / len(known)
        values |= {f"gradient_norm/{task}": float(norm) for task, norm in zip(self.tasks, norms, strict=True)}
        values |= {f"weight/{task}": float(weight) for task, weight in zip(self.tasks, weights, strict=True)}
        return {name: value for name, value in values.items() if value == value}

    def history(self) -> dict[str, Tensor]:
        """Everything recorded: ``steps`` [R], ``cosines`` [R, K, K], ``norms`` [R, K], ``weights`` [R, K]."""
        k = len(self.tasks)
        return {
            "steps": torch.tensor(self.steps, dtype=torch.long),
            "cosines": torch.stack(self._cosines) if self.steps else torch.zeros(0, k, k),
            "norms": torch.stack(self._norms) if self.steps else torch.zeros(0, k),
            "weights": torch.stack(self._weights) if self.steps else torch.zeros(0, k),
        }

    def get_extra_state(self) -> Any:
        return self.history()

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"].tolist()
        self._cosines, self._norms, self._weights = (list(state[name]) for name in ("cosines", "norms", "weights"))

    def plot(self, path: str | PathLike[str]) -> Path:
        """Write one figure over the steps: cosine of every pair of tasks, norm and weight of every task.

        Args:
            path: PNG, SVG or PDF file; needs matplotlib.

        Raises:
            ValueError: When nothing is recorded yet.
        """
        if not self.steps:
            raise ValueError("nothing to plot: call measure or record first")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install 'mtl-heads[plots]'") from error
        history = self.history()
        figure = Figure(figsize=(8, 9), layout="constrained")
        cosine, norm, weight = figure.subplots(3, 1, sharex=True)
        for i in range(len(self.tasks)):
            for j in range(i):
                pair = f"{self.tasks[j]} · {self.tasks[i]}"
                cosine.plot(self.steps, history["cosines"][:, i, j].tolist(), label=pair)
            norm.plot(self.steps, history["norms"][:, i].tolist(), label=self.tasks[i])
            weight.plot(self.steps, history["weights"][:, i].tolist(), label=self.tasks[i])
        cosine.axhline(0, color="black", linewidth=0.5)
        cosine.set(title="Gradients of the tasks: below 0 they conflict", ylabel="cosine", ylim=(-1.05, 1.05))
        norm.set(ylabel="gradient norm", yscale="log")
        weight.set(ylabel="weight applied", xlabel="step")
        for axis in (cosine, norm, weight):
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="small", ncols=2)
        path = Path(path)
        # The suffix stays last: it names the format.
        partial = path.with_name(f".{path.name}.partial{path.suffix}")
        figure.savefig(partial, dpi=120)
        partial.replace(path)
        return path
