"""Trunks: from one input to a representation for each task, as a mapping task name -> [N, width]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .heads import mlp


class Trunk(nn.Module):
    """What all trunks share: which parameters serve several tasks, and which one only."""

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters more than one task trains."""
        raise NotImplementedError

    def task_parameters(self) -> list[nn.Parameter]:
        """All others: gates, own experts, the last tower."""
        shared = {id(p) for p in self.shared_parameters()}
        return [p for p in self.parameters() if id(p) not in shared]


class SharedBottom(Trunk):
    """One network for all tasks: every task gets the same representation.

    Args:
        d_in: width of the input.
        tasks: task names.
        hidden: widths of the layers; the last is the representation's.
        dropout: after each layer.
    """

    def __init__(self, d_in: int, tasks: Sequence[str], hidden: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.tasks = _names(tasks)
        self.bottom, self.d_out = mlp(d_in, tuple(hidden), dropout)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Representations [N, d_out] by task from inputs [N, d_in]."""
        shared = self.bottom(x)
        return dict.fromkeys(self.tasks, shared)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters every task trains."""
        return list(self.bottom.parameters())


class MMoE(Trunk):
    """Mixture of experts with a gate for each task: f_k(x) = sum_e softmax(W_k x)_e expert_e(x).

    Args:
        d_in: width of the input.
        tasks: task names.
        num_experts: experts all tasks share.
        hidden: widths of each expert's layers; the last is the representation's.
        dropout: inside the experts.

    Source: Ma et al. 2018, "Modeling task relationships in multi-task learning with multi-gate mixture-of-experts",
    eq. 6, 7.
    """

    def __init__(
        self, d_in: int, tasks: Sequence[str], num_experts: int, hidden: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tasks = _names(tasks)
        if num_experts < 1:
            raise ValueError(f"num_experts must be >= 1, got {num_experts}")
        self.experts = nn.ModuleList(mlp(d_in, tuple(hidden), dropout)[0] for _ in range(num_experts))
        self.gates = nn.ModuleDict({task: nn.Linear(d_in, num_experts, bias=False) for task in self.tasks})
        self.d_out = hidden[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Representations [N, d_out] by task from inputs [N, d_in]."""
        experts = torch.stack([expert(x) for expert in self.experts], -2)
        return {task: _mix(self.gates[task](x), experts) for task in self.tasks}

    def gate_weights(self, x: Tensor) -> dict[str, Tensor]:
        """How much each task takes from each expert [N, num_experts]."""
        return {task: self.gates[task](x).softmax(-1) for task in self.tasks}

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters every task trains: the experts'."""
        return list(self.experts.parameters())


class PLE(Trunk):
    """Progressive layered extraction: stacked levels of own and shared experts (one level is CGC).

    At each level a task's gate mixes its own and the shared experts, driven by the task's representation so far;
    below the last level a shared gate, driven by the shared representation, mixes all experts of all tasks.

    Args:
        d_in: width of the input.
        tasks: task names.
        num_task_experts: own experts of each task at each level.
        num_shared_experts: shared experts at each level.
        hidden: widths of each expert's layers; the last is the representation's.
        num_levels: stacked levels.
        dropout: inside the experts.

    Source: Tang et al. 2020, "Progressive layered extraction", eq. 1-6.
    """

    def __init__(
        self,
        d_in: int,
        tasks: Sequence[str],
        num_task_experts: int,
        num_shared_experts: int,
        hidden: Sequence[int],
        num_levels: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tasks = _names(tasks)
        if min(num_task_experts, num_shared_experts, num_levels) < 1:
            raise ValueError(
                "num_task_experts, num_shared_experts and num_levels must be >= 1, "
                f"got {num_task_experts}, {num_shared_experts}, {num_levels}"
            )
        widths = [d_in] + [hidden[-1]] * (num_levels - 1)
        self.levels = nn.ModuleList(
            CGCLevel(width, self.tasks, num_task_experts, num_shared_experts, hidden, dropout, level == num_levels - 1)
            for level, width in enumerate(widths)
        )
        self.d_out = hidden[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Representations [N, d_out] by task from inputs [N, d_in]."""
        own, shared = dict.fromkeys(self.tasks, x), x
        for level in self.levels:
            own, shared = level(own, shared)
        return own

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters more than one task trains: the shared experts', and what reaches them from the levels below."""
        levels = [level for level in self.levels if isinstance(level, CGCLevel)]
        parameters = list(levels[-1].shared_experts.parameters())
        for i, level in enumerate(levels[:-1]):
            # Right below the last level a task's gate feeds that task only.
            own = {id(p) for p in level.gates.parameters()} if i == len(levels) - 2 else set()
            parameters += [p for p in level.parameters() if id(p) not in own]
        return parameters


class CGCLevel(nn.Module):
    """One level of :class:`PLE`; the last level has no shared gate."""

    def __init__(
        self,
        d_in: int,
        tasks: tuple[str, ...],
        own: int,
        shared: int,
        hidden: Sequence[int],
        dropout: float,
        last: bool,
    ) -> None:
        super().__init__()
        self.tasks = tasks

        def experts(number: int) -> nn.ModuleList:
            return nn.ModuleList(mlp(d_in, tuple(hidden), dropout)[0] for _ in range(number))

        self.task_experts = nn.ModuleDict({task: experts(own) for task in tasks})
        self.shared_experts = experts(shared)
        self.gates = nn.ModuleDict({task: nn.Linear(d_in, own + shared, bias=False) for task in tasks})
        self.shared_gate = None if last else nn.Linear(d_in, own * len(tasks) + shared, bias=False)

    def forward(self, own: dict[str, Tensor], shared: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        by_task = {task: [expert(own[task]) for expert in _list(self.task_experts[task])] for task in self.tasks}
        common = [expert(shared) for expert in self.shared_experts]
        mixed = {
            task: _mix(self.gates[task](own[task]), torch.stack(by_task[task] + common, -2)) for task in self.tasks
        }
        if self.shared_gate is None:
            return mixed, shared
        everything = [expert for task in self.tasks for expert in by_task[task]] + common
        return mixed, _mix(self.shared_gate(shared), torch.stack(everything, -2))


class AITM(Trunk):
    """Adaptive information transfer along a chain of tasks (e.g. click, cart, purchase).

    Each task has a tower q_t. The first passes on z_1 = q_1; later ones attend over what the one before passes on,
    p = info(z_(t-1)), and their own tower: z_t = sum over u in {p, q_t} of softmax(h2(u) . h3(u) / sqrt d) h1(u).
    Use :func:`~mtl_heads.losses.order_penalty` beside the task losses, as the paper does.

    Args:
        d_in: width of the input.
        tasks: task names, first event first.
        hidden: widths of each tower's layers; the last is the representation's d.
        dropout: inside the towers.

    Source: Xi et al. 2021, "Modeling the sequential dependence among audience multi-step conversions", eq. 2-5.
    """

    def __init__(self, d_in: int, tasks: Sequence[str], hidden: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.tasks = _names(tasks)
        self.d_out = d = hidden[-1]
        self.towers = nn.ModuleDict({task: mlp(d_in, tuple(hidden), dropout)[0] for task in self.tasks})
        later = self.tasks[1:]
        self.info = nn.ModuleDict({task: mlp(d, (d,))[0] for task in later})
        self.projections = nn.ModuleDict({task: nn.Linear(d, 3 * d, bias=False) for task in later})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Representations [N, d_out] by task from inputs [N, d_in]."""
        out: dict[str, Tensor] = {}
        previous: Tensor | None = None
        for task in self.tasks:
            z = self.towers[task](x)
            if previous is not None:
                pair = torch.stack([self.info[task](previous), z], -2)
                value, key, query = self.projections[task](pair).chunk(3, -1)
                weight = ((key * query).sum(-1, keepdim=True) / self.d_out**0.5).softmax(-2)
                z = (weight * value).sum(-2)
            out[task] = previous = z
        return out

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters more than one task trains: all of the chain but its last link's."""
        groups = (self.towers, self.info, self.projections)
        last = {id(p) for group in groups if self.tasks[-1] in group for p in group[self.tasks[-1]].parameters()}
        return [p for p in self.parameters() if id(p) not in last]


def _mix(gate: Tensor, experts: Tensor) -> Tensor:
    """sum_e softmax(gate)_e expert_e: gate [N, E], experts [N, E, D] -> [N, D]."""
    return (gate.softmax(-1)[..., None, :] @ experts)[..., 0, :]


def _list(module: nn.Module) -> nn.ModuleList:
    assert isinstance(module, nn.ModuleList)
    return module


def _names(tasks: Sequence[str]) -> tuple[str, ...]:
    names = tuple(tasks)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks must be at least one with distinct names, got {names}")
    return names
