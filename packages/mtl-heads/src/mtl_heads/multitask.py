"""All heads of a model as one module: features in, outputs, losses and predictions by task name out."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .distributed import all_reduce_sum, world_size
from .heads import HEADS, Head, RegressionHead, RetrievalHead
from .labels import check_labels
from .losses import product_logit
from .masks import check_mask, count_present, hide, split_labels
from .tasks import TaskLosses, TaskSpec, stack_losses

Features = Tensor | Mapping[str, Tensor]


class MultiTaskHeads(nn.Module):
    """One head for each task.

    Args:
        d_in: width of the representation.
        tasks: the tasks, in the order of every [K] in this package.
        tables: item embeddings to tie retrieval tasks to, by task name.

    Raises:
        ValueError: On repeated names, or an ``after`` that is not an earlier binary task.
    """

    def __init__(self, d_in: int, tasks: Sequence[TaskSpec], tables: Mapping[str, nn.Embedding] | None = None) -> None:
        super().__init__()
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) != len(tasks) or not tasks:
            raise ValueError(f"tasks must be at least one with distinct names, got {[task.name for task in tasks]}")
        self.names = tuple(self.tasks)
        self._chains = {task.name: self._chain(task) for task in tasks}
        self.heads = nn.ModuleDict()
        for task in tasks:
            options = dict(task.head_options)
            if tables is not None and task.name in tables:
                options["table"] = tables[task.name]
            self.heads[task.name] = HEADS[task.kind](d_in, task, **options)

    @property
    def weights(self) -> dict[str, float]:
        """The user's static weights, by task."""
        return {name: task.weight for name, task in self.tasks.items()}

    def head(self, name: str) -> Head:
        """The head of one task."""
        head = self.heads[name]
        assert isinstance(head, Head)
        return head

    def task_parameters(self) -> list[nn.Parameter]:
        """The heads' own parameters; a tied item table belongs to the model, not to them."""
        tied = {id(head.table.weight) for head in self.heads.values() if isinstance(head, RetrievalHead) and head.tied}
        return [p for p in self.parameters() if id(p) not in tied]

    def fit_transforms(self, targets: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> None:
        """Fit the regression heads' transforms on training labels; tasks not in ``targets`` keep theirs."""
        for name, labels in targets.items():
            head = self.head(name)
            if isinstance(head, RegressionHead):
                labels, mask = self._border(name, labels, (masks or {}).get(name))
                here = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
                check_labels(labels, head.fits(labels), here, name, head.needs)
                head.transform.fit(labels, mask)

    def forward(self, features: Features, positions: Features | None = None) -> dict[str, Tensor]:
        """Raw outputs of every task; a chained task's logit is that of the product along its chain.

        Args:
            features: representation [N, d_in], or one for each task by name (from a trunk).
            positions: the same for the per-position tasks [T, d_in]; None leaves those tasks out.
        """
        own: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            source = positions if task.per_position else features
            if source is not None:
                own[name] = self.head(name)(source if isinstance(source, Tensor) else source[name])
        return {name: self._chained(name, own) for name in own}

    def predict(self, features: Features, positions: Features | None = None) -> dict[str, Tensor]:
        """Predictions in the labels' units: probabilities, numbers, vectors, query vectors."""
        return {name: self.head(name).predict(out) for name, out in self(features, positions).items()}

    def losses(
        self,
        features: Features,
        targets: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        positions: Features | None = None,
    ) -> TaskLosses:
        """The mean loss of each task over its present labels.

        A head only sees the rows that have a label (under ``torch.compile`` those without come in as zeros). A task
        without any, or not in ``targets``, gets an exact 0 whose graph reaches its parameters. In training under
        ``torch.distributed`` the mean runs over all processes' labels: a process's loss is its sum times the number of
        processes over the global count, so that averaged gradients (DDP) are those of the union batch.

        Args:
            features: representation [N, d_in], or one for each task by name.
            targets: labels by task; the spec's ``missing`` value (NaN) marks absent ones where no mask is given.
            masks: bool by task, the labels' shape or [N]; True = present. Absent names mean "all present".
            positions: representation of the per-position tasks [T, d_in], their labels being [T].

        Raises:
            ValueError: On a name that is no task, labels whose rows do not match the features', or a label out of its
                range.
        """
        for name in (*targets, *(masks or {})):
            if name not in self.tasks:
                raise ValueError(f"unknown task {name!r}, known tasks: {', '.join(self.names)}")
        sums, denominators, counts = [], [], []
        for name in self.names:
            total, denominator, count = self._one(name, features, targets, masks or {}, positions)
            sums.append(total)
            denominators.append(denominator)
            counts.append(count)
        below, count = torch.stack(denominators), torch.stack(counts)
        share = 1
        if self.training and torch.is_grad_enabled() and world_size() > 1:
            below, count = all_reduce_sum(torch.stack([below, count]))
            share = world_size()
        means = [total * share / low.to(total.dtype).clamp_min(1.0) for total, low in zip(sums, below, strict=True)]
        return stack_losses(self.names, means, count)

    def _one(
        self,
        name: str,
        features: Features,
        targets: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        positions: Features | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of one task's losses, what to divide it by, and the number of its labels."""
        source = positions if self.tasks[name].per_position else features
        if source is None:
            raise ValueError(f"positions must be given for the per-position task {name!r}")
        chain = self._chains[name]
        inputs = [source if isinstance(source, Tensor) else source[link] for link in chain]
        rows = inputs[0].shape[:-1]
        labels: Tensor | None
        if name in targets:
            labels, mask = self._border(name, targets[name], masks.get(name))
            if labels.shape[: len(rows)] != rows:
                raise ValueError(f"targets of task {name!r} must start with {tuple(rows)}, got {tuple(labels.shape)}")
            # A row is seen by the head when any of its labels is present.
            here = mask if mask is None or mask.dim() == len(rows) else mask.flatten(len(rows)).any(-1)
        else:
            labels, mask, here = None, None, None
            inputs = [x.reshape(-1, x.shape[-1])[:0] for x in inputs]
        if here is not None and torch.compiler.is_compiling():
            # How many rows have a label is known at run time only: all of them go in, those without as zeros.
            inputs, here = [hide(x, here[..., None]) for x in inputs], None
        elif here is not None:
            inputs = [x[here] for x in inputs]
        outputs = {link: self.head(link)(x) for link, x in zip(chain, inputs, strict=True)}
        output = self._chained(name, outputs)
        if labels is None or not len(inputs[0]):
            # Empty slices put every parameter of the head into the graph at no cost.
            total = sum((p.reshape(-1)[:0].sum() for p in self.head(name).parameters()), output.sum())
            return total, torch.zeros_like(total).float(), torch.zeros_like(total).float()
        if here is not None and mask is not None:
            labels, mask = labels[here], mask[here]
        check_labels(labels, self.head(name).fits(labels), mask, name, self.head(name).needs)
        values, denominator = self.head(name).values(output, labels, mask)
        return values.sum(), denominator, count_present(values, mask)

    def _border(self, name: str, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Labels and mask of one task; the one place where a value can mean "no label"."""
        task = self.tasks[name]
        vector = task.kind == "vector"
        if mask is not None:
            return labels, check_mask(mask, labels.shape[:-1] if vector else labels.shape, f"masks[{name!r}]")
        if math.isnan(task.missing) and not labels.is_floating_point():
            return labels, None
        labels, mask = split_labels(labels, task.missing)
        return labels, mask.all(-1) if vector else mask

    def _chain(self, task: TaskSpec) -> tuple[str, ...]:
        """The task and those before it in its chain, first event first."""
        chain = [task.name]
        while task.after is not None:
            if task.after not in self.tasks or task.after in chain:
                raise ValueError(f"after of task {task.name!r} must name another task, got {task.after!r}")
            task = self.tasks[task.after]
            if task.kind != "binary" or task.per_position != self.tasks[chain[0]].per_position:
                raise ValueError(f"after of task {chain[-1]!r} must name a binary task of the same rows, got {task}")
            chain.append(task.name)
        return tuple(reversed(chain))

    def _chained(self, name: str, outputs: Mapping[str, Tensor]) -> Tensor:
        chain = self._chains[name]
        return outputs[name] if len(chain) == 1 else product_logit([outputs[link] for link in chain])
