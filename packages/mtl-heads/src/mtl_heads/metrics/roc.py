"""Area under the ROC curve and what each row adds to its error, in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..masks import check_mask


@torch.no_grad()
def auroc(scores: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """The chance that a positive scores above a negative, equal scores counting half: by mid-ranks, exactly.

    Numerator and denominator are whole numbers and halves in float64, so the order of the rows does not matter.

    Args:
        scores: probabilities or logits [N] or [N, C]; only their order matters.
        targets: 0 or 1, same shape; above 0.5 is a positive.
        mask: bool, the targets' shape or [N]; True = present.

    Returns:
        The area of each column, float64 [] or [C]; NaN where a class is missing. ``nanmean()`` is the macro mean.

    Raises:
        ValueError: On shapes that do not fit, or a NaN among the present scores.
    """
    return _by_column(_area, scores, targets, mask)


@torch.no_grad()
def auroc_influence(scores: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """What each row contributes to the error of :func:`auroc`: a column's squares sum to the area's variance.

    The squared differences of two scores' contributions on the same rows sum to the variance of the difference; a mean
    over columns has the mean of their contributions. A class of a single row says nothing of its spread and counts
    from chance.

    Args:
        scores: [N] or [N, C].
        targets: 0 or 1, same shape.
        mask: bool, the targets' shape or [N]; True = present.

    Returns:
        Contributions, float64, of the scores' shape; 0 in absent rows, NaN in a column where a class is missing.

    Raises:
        ValueError: As :func:`auroc`.

    Source: DeLong, DeLong, Clarke-Pearson 1988, "Comparing the areas under two or more correlated ROC curves".
    """
    return _by_column(_influence, scores, targets, mask)


def _by_column(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], scores: Tensor, targets: Tensor, mask: Tensor | None
) -> Tensor:
    if scores.shape != targets.shape or scores.dim() not in (1, 2) or scores.shape[1:] == (0,):
        shapes = f"{tuple(scores.shape)}, {tuple(targets.shape)}"
        raise ValueError(f"scores and targets: got {shapes}, needs both [N] or both [N, C] with C >= 1")
    mask = check_mask(mask, targets.shape)
    here = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    if bool((scores.isnan() & here).any()):
        raise ValueError(
            f"scores: got {int((scores.isnan() & here).sum())} NaN, needs numbers where a label is present"
        )
    if scores.dim() == 1:
        return function(scores, targets > 0.5, here)
    # One column at a time: all of them sorted at once would take five times the memory of the scores.
    columns = zip(scores.unbind(1), (targets > 0.5).unbind(1), here.unbind(1), strict=True)
    parts = [function(*column) for column in columns]
    return torch.stack(parts, -1)


def _area(scores: Tensor, positive: Tensor, here: Tensor) -> Tensor:
    ordered, places = scores[here].sort()
    hit = positive[here][places].double()
    # Mid-rank of each value: the mean of how many are smaller and how many are not larger.
    left = torch.searchsorted(ordered, ordered, right=False)
    right = torch.searchsorted(ordered, ordered, right=True)
    below = (left + right + 1).double() / 2
    positives = hit.sum()
    pairs = positives * (len(ordered) - positives)
    area = ((below * hit).sum() - positives * (positives + 1) / 2) / pairs
    return torch.where(pairs > 0, area, torch.nan)


def _influence(scores: Tensor, positive: Tensor, here: Tensor) -> Tensor:
    result = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    value = _area(scores, positive, here)
    if bool(value.isnan()):
        return torch.full_like(result, torch.nan)
    high, low = here & positive, here & ~positive
    for rows, beaten in (
        (high, _share_below(scores[high], scores[low])),
        (low, 1 - _share_below(scores[low], scores[high])),
    ):
        number = len(beaten)
        # The mean is estimated from the same rows.
        spread = (beaten - value) * (number / (number - 1)) ** 0.5 if number > 1 else beaten - 0.5
        result[rows] = spread / number
    return result


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    others = others.sort().values
    low, high = torch.searchsorted(others, values, right=False), torch.searchsorted(others, values, right=True)
    return (low + high).double() / (2 * len(others))
