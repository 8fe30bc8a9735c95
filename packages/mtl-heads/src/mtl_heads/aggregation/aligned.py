"""Aligned-MTL: gradients made orthogonal and equally long, as near to the original ones as that allows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import GramianAggregator

SCALES = ("min", "median", "rmse")


class AlignedMTL(GramianAggregator):
    """m = B 1/K with B = sqrt(s) V S^-1 V', from the Gramian's eigenvectors V and eigenvalues S^2.

    Args:
        tasks: task names or their number.
        static: the user's weights.
        scale: common squared length s of the aligned gradients: "min" (the paper's: the least eigenvalue above the rank
            tolerance), "median" or "rmse" (the mean).

    Source: Senushkin et al. 2023, "Independent component alignment for multi-task learning", algorithm 1.
    """

    def __init__(
        self, tasks: int | Sequence[str], static: Mapping[str, float] | None = None, scale: str = "min"
    ) -> None:
        super().__init__(tasks, static)
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        self.scale = scale

    def _method(self, gramian: Tensor, matrices: Sequence[Tensor], here: Tensor) -> Tensor:
        wide = all(matrix.dtype == torch.float64 for matrix in matrices)
        return aligned_mtl_weights(gramian.cpu(), self.scale, torch.finfo(torch.float64 if wide else torch.float32).eps)


def aligned_mtl_weights(gramian: Tensor, scale: str = "min", eps: float = torch.finfo(torch.float32).eps) -> Tensor:
    """Coefficients [K] of the mean of the aligned gradients; 1/K when all gradients are zero.

    Args:
        gramian: inner products of the gradients [K, K].
        scale: "min", "median" or "rmse".
        eps: rounding of the gradients' inner products, relative to their lengths.
    """
    k = len(gramian)
    products = gramian.double()
    lengths = products.diagonal().clamp_min(0).sqrt()
    # The cosines say how many directions there are, whatever the gradients' lengths; then eigenvalues in that number.
    cosines = products / torch.outer(lengths, lengths).clamp_min(torch.finfo(torch.float64).tiny)
    rank = int((torch.linalg.eigvalsh(cosines) > k * eps).sum())
    values, vectors = torch.linalg.eigh(products)
    rank = min(rank, int((values > values[-1] * k * torch.finfo(torch.float64).eps).sum()))
    if not rank or values[-1] <= 0:
        return torch.full_like(gramian[0], 1 / k)
    values, vectors = values[-rank:], vectors[:, -rank:]
    length = {"min": values.min(), "median": values.median(), "rmse": values.mean()}[scale].sqrt()
    mean = torch.full((k,), 1 / k, dtype=torch.float64)
    return (length * vectors @ ((vectors.T @ mean) / values.sqrt())).to(gramian.dtype)
