"""The mask contract: a boolean mask says which labels are present, and an absent label contributes exactly nothing.

Every loss, metric and weighting takes such a mask; nothing in the package reads a NaN or an ignore value as "absent"
except :func:`split_labels`, called once where labels come in. What stands at an absent place is never used: it may be
NaN.
"""

import math

import torch
from torch import Tensor


def split_labels(labels: Tensor, missing: float = math.nan) -> tuple[Tensor, Tensor]:
    """Turn labels that mark absence by a value into labels and a mask, once, at the border.

    Args:
        labels: labels of any shape.
        missing: the value that stands for "no label"; NaN by default, a number such as -1 for integer labels.

    Returns:
        Labels with zeros where absent, and the mask (bool, same shape, True = present).
    """
    if math.isnan(missing):
        mask = ~labels.isnan() if labels.is_floating_point() else torch.ones_like(labels, dtype=torch.bool)
    else:
        mask = labels != missing
    return torch.where(mask, labels, torch.zeros_like(labels)), mask


def check_mask(mask: Tensor | None, shape: torch.Size, name: str = "mask") -> Tensor | None:
    """Validate a mask and spread a mask of rows over the labels of each row.

    Args:
        mask: None (every label is present), or bool of ``shape`` or of its leading dimensions.
        shape: the labels' shape.
        name: the argument's name, for the error.

    Returns:
        None, or the mask expanded to ``shape``.

    Raises:
        ValueError: When the mask is not boolean or does not fit.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be boolean (True = label present), got {mask.dtype}")
    if mask.shape != shape[: mask.dim()]:
        got = tuple(mask.shape)
        raise ValueError(f"{name} must have the labels' shape {tuple(shape)} or its first axes, got {got}")
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.dim())).expand(shape)


def hide(values: Tensor, mask: Tensor | None) -> Tensor:
    """Zero what stands at absent places, so that not even a NaN there reaches a value or a gradient."""
    return values if mask is None else torch.where(mask, values, torch.zeros_like(values))


def count_present(values: Tensor, mask: Tensor | None) -> Tensor:
    """The number of present labels, as a float tensor on the values' device []."""
    if mask is None:
        return torch.full((), float(values.numel()), device=values.device)
    return mask.sum().float()


def reduce(values: Tensor, mask: Tensor | None, reduction: str, denominator: Tensor | None = None) -> Tensor:
    """Reduce per-label values that are already zero where the label is absent.

    Args:
        values: per-label losses, any shape.
        mask: bool of the same shape, or None.
        reduction: "none", "sum", or "mean" over the present labels (an exact 0 with a graph when there is none).
        denominator: what "mean" divides by, instead of the number of present labels [].
    """
    if reduction == "none":
        return values
    if mask is None:
        # The gradient of a sum is one number spread out, and spread-out gradients take other vector code, whose last
        # bits differ. With a mask it arrives dense; make it so here too.
        values = values * 1.0
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        count = count_present(values, mask) if denominator is None else denominator
        return values.sum() / count.to(values.dtype).clamp_min(1.0)
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def wide_dtype(values: Tensor) -> torch.dtype:
    """What :func:`widen` would make of the values' dtype."""
    return torch.promote_types(values.dtype, torch.float32)


def widen(values: Tensor) -> Tensor:
    """Half precision becomes float32, so that losses and statistics are exact under autocast."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
