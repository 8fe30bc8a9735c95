"""What a task is: its name, kind of label, loss and weight."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KINDS = ("binary", "multiclass", "multilabel", "regression", "vector", "ordinal", "ziln", "retrieval")


@dataclass(frozen=True)
class TaskSpec:
    """One task of a :class:`~mtl_heads.MultiTaskHeads`.

    Args:
        name: unique name; the key in features, targets, outputs and metrics.
        kind: "binary", "multiclass", "multilabel", "regression", "vector", "ordinal", "ziln" or "retrieval".
        size: classes, labels, ordered levels, the vector's width or the catalogue's items; 1 for the other kinds.
        weight: the user's static weight; 0 switches the task off.
        loss: the loss's name, see the table of heads in the README; None is the kind's first.
        loss_options: keyword arguments of the loss, e.g. ``{"gamma": 2.0}``.
        head_options: keyword arguments of the head, e.g. ``{"transform": "log1p"}`` or ``{"num_negatives": 128}``.
        hidden: widths of the head's own hidden layers.
        dropout: dropout after each of them.
        per_position: the task has a label for each position of a sequence instead of one for each row.
        after: name of a binary task that must happen first: p(this) = p(this | after) p(after), as in ESMM.
        missing: the label value that means "no label"; NaN by default, read once at the border.
    """

    name: str
    kind: str
    size: int = 1
    weight: float = 1.0
    loss: str | None = None
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    head_options: Mapping[str, Any] = field(default_factory=dict)
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    per_position: bool = False
    after: str | None = None
    missing: float = math.nan

    def __post_init__(self) -> None:
        if not self.name or any(character in self.name for character in ".,: "):
            raise ValueError(f"name must be non-empty without dots, commas, colons or blanks, got {self.name!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind of task {self.name!r} must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not math.isfinite(self.weight) or self.weight < 0:
            raise ValueError(f"weight of task {self.name!r} must be finite and >= 0, got {self.weight}")
        least = {"multiclass": 2, "ordinal": 2, "retrieval": 2}.get(self.kind, 1)
        if self.size < least:
            raise ValueError(f"size of {self.kind} task {self.name!r} must be >= {least}, got {self.size}")
        if self.size != 1 and self.kind in ("binary", "regression", "ziln"):
            raise ValueError(f"size of {self.kind} task {self.name!r} must be 1, got {self.size}")
        if self.after is not None and self.kind != "binary":
            raise ValueError(f"after is for binary tasks only, task {self.name!r} is {self.kind}")


@dataclass(frozen=True)
class TaskLosses:
    """The losses of one batch, one a task, and how many labels stood behind each.

    Args:
        names: the tasks' names, in order.
        values: losses with their graph [K]; an exact 0 with a graph for a task without a label.
        counts: labels behind each loss [K], over all processes.
    """

    names: tuple[str, ...]
    values: Tensor
    counts: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.values[self.names.index(name)]

    def as_dict(self) -> dict[str, float]:
        """The losses as numbers, by name; a task without a label in the batch is left out."""
        return {n: v for n, v, c in zip(self.names, self.values.tolist(), self.counts.tolist(), strict=True) if c > 0}


def parse_task_weights(text: str, tasks: Iterable[str] | None = None) -> dict[str, float]:
    """Read ``"churn:1.0,price:0.5"`` into ``{"churn": 1.0, "price": 0.5}``.

    Args:
        text: name:weight pairs separated by commas; blanks around them are fine.
        tasks: known names; when given, an unknown name is an error.

    Raises:
        ValueError: On a pair without a colon, a repeated or unknown name, a weight that is not a finite number >= 0.
    """
    known = None if tasks is None else set(tasks)
    weights: dict[str, float] = {}
    for pair in text.split(","):
        name, colon, value = (part.strip() for part in pair.partition(":"))
        if not name or not colon:
            raise ValueError(f'task weights must look like "churn:1.0,price:0.5", got {pair.strip()!r} in {text!r}')
        if name in weights:
            raise ValueError(f"task {name!r} appears twice in the task weights {text!r}")
        if known is not None and name not in known:
            raise ValueError(f"unknown task {name!r} in the task weights, known tasks: {', '.join(sorted(known))}")
        try:
            weight = float(value)
        except ValueError:
            raise ValueError(f"weight of task {name!r} must be a number, got {value!r}") from None
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight of task {name!r} must be finite and >= 0, got {value!r}")
        weights[name] = weight
    return weights


def stack_losses(names: Iterable[str], losses: Iterable[Tensor], counts: Iterable[Tensor]) -> TaskLosses:
    """Gather scalar losses and label counts into a :class:`TaskLosses`."""
    return TaskLosses(tuple(names), torch.stack(list(losses)), torch.stack(list(counts)))
