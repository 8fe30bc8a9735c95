"""Gradients of each task's loss with respect to what the tasks share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .distributed import all_reduce_mean, world_size


def task_gradients(
    losses: Tensor, shared: Sequence[Tensor], present: Tensor, scaler: torch.amp.GradScaler | None = None
) -> list[Tensor]:
    """One matrix [K, numel] for each shared tensor: row k is the gradient of loss k, zero for a task that takes no
    part.

    Leaves ``.grad`` alone and keeps the graph. Over several processes the gradients are averaged. With a loss scaler
    the backward passes run on scaled losses and the result is scaled back.

    Args:
        losses: [K] with a graph.
        shared: parameters, or activations the losses depend on.
        present: bool [K].
        scaler: the GradScaler in use, or None.
    """
    factor = loss_scale(scaler, losses.device)
    rows: list[list[Tensor]] = []
    for loss, here in zip(losses, present.tolist(), strict=True):
        grads: Sequence[Tensor | None] = [None] * len(shared)
        if here:
            grads = torch.autograd.grad(loss * factor, shared, retain_graph=True, allow_unused=True)
        rows.append(
            [
                torch.zeros(p.numel(), device=p.device, dtype=p.dtype) if g is None else g.reshape(-1) / factor
                for g, p in zip(grads, shared, strict=True)
            ]
        )
    matrices = [torch.stack(column) for column in zip(*rows, strict=True)]
    return [all_reduce_mean(m) for m in matrices] if world_size() > 1 else matrices


def loss_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> float:
    """The factor a loss scaler puts on losses; 1 without one."""
    # Only scale() makes a fresh scaler ready: get_scale() would leave its step() unusable.
    return 1.0 if scaler is None else float(scaler.scale(torch.ones((), device=device)))


def gramian(matrices: Sequence[Tensor]) -> Tensor:
    """Inner products of the tasks' gradients [K, K], summed over the shared tensors."""
    total = torch.zeros(len(matrices[0]), len(matrices[0]), device=matrices[0].device, dtype=torch.float64)
    for matrix in matrices:
        wide = matrix.float() if matrix.dtype != torch.float64 else matrix
        with torch.autocast(wide.device.type, enabled=False):
            total += (wide @ wide.T).double()
    return total
