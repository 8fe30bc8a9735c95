"""What a regression head learns instead of the raw label, and the way back."""

import torch
from torch import Tensor, nn

from .masks import check_mask, widen

NAMES = ("identity", "log1p", "asinh")


class TargetTransform(nn.Module):
    """z = (f(y) - mean) / std with f the identity, log(1 + y) or asinh(y); the inverse maps a prediction back.

    The inverse of a log is a median-like value, not a mean: use the "ziln" kind where sums of predictions matter.

    :param name: "identity", "log1p" (labels > -1) or "asinh".
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str = "identity") -> None:
        super().__init__()
        if name not in NAMES:
            raise ValueError(f"transform must be one of {', '.join(NAMES)}, got {name!r}")
        self.name = name
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @torch.no_grad()
    def fit(self, labels: Tensor, mask: Tensor | None = None) -> "TargetTransform":
        """Set mean and standard deviation of f(y) over the present labels; state_dict carries them.

        :param labels: training labels, any shape.
        :param mask: bool, same shape; True = present.
        :raises ValueError: when no label is present.
        """
        mask = check_mask(mask, labels.shape)
        z = self._f((labels if mask is None else labels[mask]).double())
        if z.numel() == 0:
            raise ValueError("labels must hold at least one present label to fit a transform, got none")
        self.mean.copy_(z.mean())
        spread = z.std(correction=0)
        self.std.copy_(spread if spread > 0 else torch.ones_like(spread))
        return self

    def forward(self, labels: Tensor) -> Tensor:
        """Labels in the head's unit."""
        return (self._f(widen(labels)) - self.mean) / self.std

    def inverse(self, values: Tensor) -> Tensor:
        """Predictions of the head in the labels' unit."""
        z = widen(values) * self.std + self.mean
        return z if self.name == "identity" else torch.expm1(z) if self.name == "log1p" else torch.sinh(z)

    def _f(self, y: Tensor) -> Tensor:
        return y if self.name == "identity" else torch.log1p(y) if self.name == "log1p" else torch.asinh(y)
