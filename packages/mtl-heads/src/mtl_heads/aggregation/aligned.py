"""Aligned-MTL: gradients made orthogonal and equally long, as near to the original ones as that allows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import GramianAggregator

SCALES = ("min", "median", "rmse")


class AlignedMTL(GramianAggregator):
    """m = B 1/K with B = sqrt(s) V S^-1 V', from the Gramian's eigenvectors V and eigenvalues S^2.

    :param tasks: task names or their number.
    :param static: the user's weights.
    :param scale: common squared length s of the aligned gradients: "min" (the paper's: the least eigenvalue above the
        rank tolerance), "median" or "rmse" (the mean).

    Source: Senushkin et al. 2023, "Independent component alignment for multi-task learning", algorithm 1.
    """

    def __init__(
        self, tasks: int | Sequence[str], static: Mapping[str, float] | None = None, scale: str = "min"
    ) -> None:
        super().__init__(tasks, static)
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        self.scale = scale

    def coefficients(self, gramian: Tensor, here: list[int]) -> Tensor:
        return aligned_mtl_weights(gramian, self.scale)


def aligned_mtl_weights(gramian: Tensor, scale: str = "min") -> Tensor:
    """Coefficients [K] of the mean of the aligned gradients; 1/K when all gradients are zero.

    :param gramian: inner products of the gradients [K, K].
    :param scale: "min", "median" or "rmse".
    """
    k = len(gramian)
    values, vectors = torch.linalg.eigh(gramian.double())
    # The Gramian's rounding, not float64's, decides what counts as zero.
    keep = values > values[-1].clamp_min(0) * k * torch.finfo(torch.float32).eps
    if not bool(keep.any()) or values[-1] <= 0:
        return torch.full_like(gramian[0], 1 / k)
    values, vectors = values[keep], vectors[:, keep]
    length = {"min": values.min(), "median": values.median(), "rmse": values.mean()}[scale].sqrt()
    mean = torch.full((k,), 1 / k, dtype=torch.float64)
    return (length * vectors @ ((vectors.T @ mean) / values.sqrt())).to(gramian.dtype)
