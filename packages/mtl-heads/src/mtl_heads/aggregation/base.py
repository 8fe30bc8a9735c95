"""The common shape of all aggregators: ``backward`` fills ``.grad``, a call on a Jacobian gives the direction."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..balancing import Balancer
from ..gradients import gramian, loss_scale, task_gradients
from ..tasks import TaskLosses


class GradientAggregator(Balancer):
    """Combines the tasks' gradients g_k of the shared parameters into sum c_k m_k g_k, c the user's and m the
    method's weight.

    ``last_gramian`` [K, K] holds the inner products of the last batch's gradients, NaN for tasks that took no part.
    """

    last_gramian: Tensor

    def __init__(self, tasks: int | Sequence[str], static: Mapping[str, float] | None = None) -> None:
        super().__init__(tasks, static)
        k = len(self.tasks)
        self.register_buffer("last_gramian", torch.full((k, k), torch.nan, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def forward(self, jacobian: Tensor) -> Tensor:
        """The direction [P] for a Jacobian [K, P] whose row k is the gradient of loss k."""
        if jacobian.dim() != 2 or len(jacobian) != len(self.tasks):
            raise ValueError(f"jacobian must be [{len(self.tasks)}, P], got {tuple(jacobian.shape)}")
        weights = self._weights([jacobian], self.static > 0)
        return weights.to(jacobian.dtype) @ jacobian

    def backward(
        self,
        losses: TaskLosses | Tensor,
        *,
        shared: Iterable[Tensor],
        task_parameters: Iterable[Tensor] = (),
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Add the combined gradient to ``.grad``, in place of ``loss.backward()``.

        Costs one backward pass for each task with labels and the memory of K gradients of the shared parameters. Shared
        parameters get sum c_k m_k g_k, task parameters the gradient of sum c_k L_k (a method that balances tasks has
        nothing to balance in a head). Gradients are averaged over processes here: DDP's own reduction does not run.

        Args:
            losses: the batch's losses [K], with their graph.
            shared: parameters all tasks share.
            task_parameters: parameters of single tasks (heads, towers, gates).
            scaler: GradScaler in use: gradients are left scaled for its ``step``. Overflow reaches ``.grad`` and is
                skipped.

        Returns:
            The sum of the user's weighted losses, without a graph [].
        """
        values, seen, present = self._read(losses)
        params = [p for p in shared if p.requires_grad]
        own = [p for p in task_parameters if p.requires_grad]
        matrices = task_gradients(values, [*params, *own], present, scaler)
        with torch.no_grad():
            weights = self._weights(matrices[: len(params)], present)
            static = torch.where(present, self.static, 0.0)
            factor = loss_scale(scaler, values.device)
            for i, (p, matrix) in enumerate(zip([*params, *own], matrices, strict=True)):
                chosen = weights if i < len(params) else static
                grad = (chosen.to(matrix.dtype) @ matrix).view_as(p) * factor
                p.grad = grad if p.grad is None else p.grad + grad
        return (static * torch.where(present, seen, 0.0)).sum()

    def _weights(self, matrices: Sequence[Tensor], present: Tensor) -> Tensor:
        """c_k m_k [K]; sets ``last_weights`` and ``last_gramian``."""
        full = gramian(matrices)
        here = present.nonzero()[:, 0]
        method = torch.zeros(len(self.tasks), dtype=full.dtype, device=full.device)
        small = full[here][:, here]
        if not bool(small.isfinite().all()):
            # Let the overflow through, so that the loss scaler sees it and skips the step.
            method[here] = 1.0
        elif len(here):
            method[here] = self._method(small, matrices, here).to(method)
        self.last_gramian.fill_(torch.nan)
        self.last_gramian[here[:, None], here] = small
        self.last_weights.copy_(self.static * method)
        return self.static * method

    def _method(self, gramian: Tensor, matrices: Sequence[Tensor], here: Tensor) -> Tensor:
        """m of the tasks that take part [k], from their Gramian [k, k] or their gradients."""
        raise NotImplementedError


class GramianAggregator(GradientAggregator):
    """An aggregator that needs the inner products of the gradients only."""

    def _method(self, gramian: Tensor, matrices: Sequence[Tensor], here: Tensor) -> Tensor:
        return self.coefficients(gramian.cpu(), here.tolist())

    def coefficients(self, gramian: Tensor, here: list[int]) -> Tensor:
        """m [k] from the Gramian of the tasks that take part [k, k], float64 on CPU; ``here`` are their numbers."""
        raise NotImplementedError


class SumAggregator(GramianAggregator):
    """m = 1: the plain sum, for comparisons."""

    def coefficients(self, gramian: Tensor, here: list[int]) -> Tensor:
        return torch.ones(len(gramian), dtype=gramian.dtype)
