"""Ops whose gradients have no gradients of their own say so."""

from typing import Any

import torch


def refuse_second_derivative(op: str) -> None:
    """Let a backward op raise NotImplementedError where autograd wants to differentiate it."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op.split(':')[0]} has no second derivatives: call backward without create_graph=True"
        )

    torch.library.register_autograd(op, refuse)
