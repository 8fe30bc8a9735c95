"""What a regression head learns instead of the raw label, and the way back."""

import torch
from torch import Tensor

from .masks import check_mask, widen
from .precision import ExactBuffers

NAMES = ("identity", "log1p", "asinh")


class TargetTransform(ExactBuffers):
    """z = (f(y) - mean) / std with f the identity, log(1 + y) or asinh(y); the inverse maps a prediction back.

    The inverse of a log is a median-like value, not a mean: use the "ziln" kind where sums of predictions matter.

    Args:
        name: "identity", "log1p" (labels > -1) or "asinh".
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

        Args:
            labels: training labels, any shape.
            mask: bool, same shape; True = present.

        Raises:
            ValueError: When no label is present.
        """
        mask = check_mask(mask, labels.shape)
        labels = labels if mask is None else labels[mask]
        if not bool(self.fits(labels).all()):
            wrong = labels[~self.fits(labels)][0].item()
            raise ValueError(f"labels: got {wrong:g}, needs {self.needs} to fit a {self.name} transform")
        z = self._f(labels.double())
        if z.numel() == 0:
            raise ValueError("labels must hold at least one present label to fit a transform, got none")
        self.mean.copy_(z.mean())
        spread = z.std(correction=0)
        # A spread that the buffer would round to 0, or nearly, is none.
        some = bool(spread > torch.finfo(self.std.dtype).tiny)
        self.std.copy_(spread if some else torch.ones_like(spread))
        return self

    @property
    def needs(self) -> str:
        """What a label must be."""
        return "finite numbers above -1" if self.name == "log1p" else "finite numbers"

    def fits(self, labels: Tensor) -> Tensor:
        """Where the transform is defined (bool, same shape)."""
        return labels.isfinite() & (labels > -1) if self.name == "log1p" else labels.isfinite()

    def forward(self, labels: Tensor) -> Tensor:
        """Labels in the head's unit."""
        return (self._f(widen(labels)) - self.mean) / self.std

    def inverse(self, values: Tensor) -> Tensor:
        """Predictions of the head in the labels' unit."""
        z = widen(values) * self.std + self.mean
        return z if self.name == "identity" else torch.expm1(z) if self.name == "log1p" else torch.sinh(z)

    def _f(self, y: Tensor) -> Tensor:
        return y if self.name == "identity" else torch.log1p(y) if self.name == "log1p" else torch.asinh(y)
