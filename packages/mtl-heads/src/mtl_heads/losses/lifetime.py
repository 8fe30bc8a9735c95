"""Zero-inflated lognormal: values that are zero for most and heavy-tailed for the rest."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import check_mask, hide, reduce, widen


def ziln_loss(outputs: Tensor, targets: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Cross-entropy of "the value is positive" plus, where it is, the negative log-density of a lognormal.

    Args:
        outputs: logit of p(value > 0), mean mu of the log, raw spread s with sigma = softplus(s) [..., 3].
        targets: values >= 0 [...].
        mask: bool [...]; True = present.
        reduction: "mean" over present labels, "sum" or "none".

    Source: Wang, Liu, Miao 2019, "A deep probabilistic model for customer lifetime value prediction", eq. 5.
    """
    if outputs.shape != (*targets.shape, 3):
        raise ValueError(f"outputs must have shape {(*targets.shape, 3)}, got {tuple(outputs.shape)}")
    mask = check_mask(mask, targets.shape)
    logit, mu, spread = hide(widen(outputs), None if mask is None else mask[..., None]).unbind(-1)
    targets = hide(targets.to(logit.dtype), mask)
    positive = targets > 0
    log_value = torch.where(positive, targets, 1.0).log()
    sigma = F.softplus(spread).clamp_min(math.sqrt(torch.finfo(logit.dtype).eps))
    density = log_value + sigma.log() + 0.5 * math.log(2 * math.pi) + (log_value - mu) ** 2 / (2 * sigma**2)
    values = F.binary_cross_entropy_with_logits(logit, positive.to(logit.dtype), reduction="none")
    values = values + torch.where(positive, density, 0.0)
    return reduce(hide(values, mask), mask, reduction)


def ziln_mean(outputs: Tensor) -> Tensor:
    """The expected value p exp(mu + sigma^2 / 2) of the distribution behind :func:`ziln_loss`'s outputs [...]."""
    logit, mu, spread = widen(outputs).unbind(-1)
    sigma = F.softplus(spread).clamp_min(math.sqrt(torch.finfo(logit.dtype).eps))
    return logit.sigmoid() * (mu + 0.5 * sigma**2).exp()
