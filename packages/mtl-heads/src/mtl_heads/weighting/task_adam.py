"""Adam on a vector with one entry for each task, in which a task that takes no part stays exactly as it is."""

import torch
from torch import Tensor

from ..precision import ExactBuffers


class TaskAdam(ExactBuffers):
    """torch.optim.Adam's update on a vector [K], with a step count of its own for each entry, kept in buffers.

    Args:
        size: K.
        lr: step size.
        weight_decay: added to the gradient, times the vector.

    Source: Kingma and Ba 2015, with beta = (0.9, 0.999) and eps = 1e-8.
    """

    mean: Tensor
    square: Tensor
    step: Tensor

    def __init__(self, size: int, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("square", torch.zeros(size))
        self.register_buffer("step", torch.zeros(size))

    @torch.no_grad()
    def forward(self, vector: Tensor, grad: Tensor, present: Tensor) -> None:
        """Update the vector in place where ``present`` is True."""
        grad = torch.where(present, grad, 0.0) + self.weight_decay * vector
        step = self.step + 1
        mean = self.mean.lerp(grad, 0.1)
        square = 0.999 * self.square + 0.001 * grad * grad
        change = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        vector.copy_(torch.where(present, vector - self.lr * change, vector))
        for buffer, value in ((self.step, step), (self.mean, mean), (self.square, square)):
            buffer.copy_(torch.where(present, value, buffer))
