"""GradNorm: tasks train at similar rates because their gradients are kept at matching sizes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..gradients import task_gradients
from .base import LossWeighting
from .task_adam import TaskAdam


class GradNorm(LossWeighting):
    """Trained weights m_k, sum m = K: minimise sum |G_k - mean(G) r_k^a|, G_k = |grad m_k L_k|, target held constant.

    r_k = (L_k / L_k(0)) / their mean is the inverse training rate. The batch is weighed with the weights so far, then
    the weights take one Adam step and are scaled back to sum to K. L_k(0) is the first batch that has a label of the
    task. Only tasks that take part in the batch move; the others keep weight and statistics. A task whose first loss is
    not above 0 has no rate: r = 1; one whose loss falls below 0 later is as far as can be: r = 0.

    Args:
        tasks: task names or their number.
        static: the user's weights.
        alpha: strength a of pulling the training rates together.
        lr: step on the weights.

    Source: Chen et al. 2018, "GradNorm", eq. 1, 2 and algorithm 1.
    """

    weights: Tensor
    first_losses: Tensor

    def __init__(
        self,
        tasks: int | Sequence[str],
        static: Mapping[str, float] | None = None,
        alpha: float = 1.5,
        lr: float = 0.025,
    ) -> None:
        super().__init__(tasks, static)
        self.alpha = alpha
        k = len(self.tasks)
        self.register_buffer("weights", torch.ones(k))
        self.register_buffer("first_losses", torch.full((k,), torch.nan))
        self.adam = TaskAdam(k, lr)

    def _combine(
        self,
        values: Tensor,
        seen: Tensor,
        present: Tensor,
        shared: list[Tensor] | None,
        scaler: torch.amp.GradScaler | None,
    ) -> Tensor:
        if not shared:
            raise ValueError("shared must be the last shared layer's parameters for GradNorm, got none")
        total = self._weigh(values, self.weights.clone(), present)
        rows = task_gradients(values, shared, present, scaler)
        norms = torch.stack([row.square().sum(-1) for row in rows], -1).sum(-1).sqrt()
        if bool((norms.isfinite() & seen.isfinite() | ~present).all()):
            self._learn(norms.to(self.weights.dtype), seen.to(self.weights.dtype), present)
        return total

    @torch.no_grad()
    def _learn(self, norms: Tensor, seen: Tensor, present: Tensor) -> None:
        """One step of the weights; norms [K] are those of the unweighted gradients."""
        self.first_losses.copy_(torch.where(present & self.first_losses.isnan(), seen, self.first_losses))
        ratios = torch.where(self.first_losses > 0, seen / self.first_losses, 1.0).clamp_min(0)
        grad = gradnorm_gradient(self.weights, norms, ratios, present, self.alpha)
        self.adam(self.weights, grad, present)
        # A weight may be driven through zero: keep it positive, as a gradient size has no sign.
        self.weights.clamp_(min=1e-4)
        moved, fixed = self.weights[present].sum(), self.weights[~present].sum()
        self.weights.copy_(torch.where(present, self.weights * (len(self.tasks) - fixed) / moved, self.weights))


def gradnorm_gradient(weights: Tensor, norms: Tensor, ratios: Tensor, present: Tensor, alpha: float) -> Tensor:
    """d/dm of sum_k |m_k n_k - mean(m n) r_k^a| with the target constant [K]; 0 for tasks that take no part.

    Args:
        weights: m [K].
        norms: n, norms of the unweighted gradients [K].
        ratios: L_k / L_k(0) [K].
        present: bool [K].
        alpha: a.
    """
    number = present.sum().clamp_min(1)
    sizes = torch.where(present, weights * norms, 0.0)
    ratios = torch.where(present, ratios, 0.0)
    rates = torch.where(ratios.sum() > 0, ratios / (ratios.sum() / number), 1.0)
    target = sizes.sum() / number * rates**alpha
    return torch.where(present, torch.sign(sizes - target) * norms, 0.0)
