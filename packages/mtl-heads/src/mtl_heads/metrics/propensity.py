"""The propensity score of RecSys Challenge 2025 (Synerise), with the official code's quirks.

1. Scores become sigmoids batch by batch: a batch whose scores all lie in [0, 1] is taken as probabilities already, the
   others are not (only in AUROC; diversity and novelty always apply the sigmoid).
2. A label without a positive scores AUROC 0.0 and counts in the mean; so does one without a negative.
3. Popularity enters through w = pop / sum of the top k pop: its scale does not matter.
4. Diversity has its epsilon inside the logarithm: -sum p log2(p + 1e-9) / log2 C, which can pass 1 by a hair.
5. Novelty is raised to the 100th power.

Source: Synerise/recsys2025, training_pipeline/metrics.py at e91c1a6.
"""

import torch
from torch import Tensor

from ..losses.propensity import TOP_K, diversity_loss, novelty_loss
from ..masks import check_mask, widen
from .base import Metric

NOVELTY_POWER = 100
SHARES = {"auroc": 0.8, "novelty": 0.1, "diversity": 0.1}


class PropensityScore(Metric):
    """0.8 AUROC + 0.1 novelty + 0.1 diversity of multi-hot labels.

    :param popularity: popularity of each label [C], any positive scale.
    :param k: top labels of the novelty; all C when C < k.
    """

    popularity: Tensor

    def __init__(self, popularity: Tensor, k: int = TOP_K) -> None:
        super().__init__()
        if popularity.dim() != 1 or len(popularity) < 2:
            raise ValueError(f"popularity must be [C] with C >= 2, got {tuple(popularity.shape)}")
        self.k = k
        self.register_buffer("popularity", popularity.detach().clone().float(), persistent=False)
        self._sum_state("sums", 3)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch; how batches are cut matters, see quirk 1.

        :param logits: [N, C].
        :param targets: 0 or 1 [N, C].
        :param mask: bool [N]; False = the row has no labels and is left out of all three parts.
        """
        if logits.shape != targets.shape or logits.shape[1:] != self.popularity.shape:
            raise ValueError(
                f"logits and targets must be [N, {len(self.popularity)}], "
                f"got {tuple(logits.shape)}, {tuple(targets.shape)}"
            )
        mask = check_mask(mask, targets.shape[:1])
        if mask is not None:
            logits, targets = logits[mask], targets[mask]
        if not len(logits):
            return
        logits = widen(logits)
        scores = logits.sigmoid() if bool(((logits < 0) | (logits > 1)).any()) else logits
        self._keep(scores=scores, labels=targets > 0)
        sums = torch.stack(
            [
                1 - diversity_loss(logits, reduction="none").double(),
                novelty_loss(logits, self.popularity, k=self.k, reduction="none").double(),
                torch.ones(len(logits), device=logits.device, dtype=torch.float64),
            ]
        ).sum(1)
        self.get_buffer("sums").add_(sums)

    def compute(self) -> dict[str, float]:
        """``score`` and its parts ``auroc``, ``novelty``, ``diversity``."""
        diversity, popular, rows = self._summed("sums").tolist()
        if rows == 0:
            return dict.fromkeys(("score", *SHARES), float("nan"))
        parts = {
            "auroc": float(_auroc_or_zero(self._kept("scores"), self._kept("labels")).mean()),
            "novelty": (1 - popular / rows) ** NOVELTY_POWER,
            "diversity": diversity / rows,
        }
        return {"score": sum(share * parts[name] for name, share in SHARES.items()), **parts}


def official_diversity(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rows of -sum p log2(p + 1e-9) / log2 C, p = sigmoid(z) / sum sigmoid(z) []."""
    return 1 - diversity_loss(logits, mask=mask)


def official_novelty(logits: Tensor, popularity: Tensor, k: int = TOP_K, mask: Tensor | None = None) -> Tensor:
    """(1 - mean popularity of the top k)^100 []."""
    return (1 - novelty_loss(logits, popularity, k=k, mask=mask)) ** NOVELTY_POWER


def _auroc_or_zero(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC of each column [C], equal scores by mid-ranks; 0 where a class is missing."""
    # One column at a time: all of them sorted at once would take five times the memory of the scores.
    return torch.stack([_area(column, hit) for column, hit in zip(scores.unbind(1), labels.unbind(1), strict=True)])


def _area(scores: Tensor, labels: Tensor) -> Tensor:
    ordered, places = scores.sort()
    hit = labels[places].double()
    # Mid-rank of each value: the mean of how many are smaller and how many are not larger.
    left = torch.searchsorted(ordered, ordered, right=False)
    right = torch.searchsorted(ordered, ordered, right=True)
    below = (left + right + 1).double() / 2
    positives = hit.sum()
    negatives = len(scores) - positives
    area = ((below * hit).sum() - positives * (positives + 1) / 2) / (positives * negatives)
    return torch.where((positives > 0) & (negatives > 0), area, 0.0)
