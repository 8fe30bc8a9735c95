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
from .roc import auroc, auroc_influence

NOVELTY_POWER = 100
SHARES = {"auroc": 0.8, "novelty": 0.1, "diversity": 0.1}


class PropensityScore(Metric):
    """0.8 AUROC + 0.1 novelty + 0.1 diversity of multi-hot labels.

    Args:
        popularity: popularity of each label [C], any positive scale.
        k: top labels of the novelty; all C when C < k.
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

        Args:
            logits: [N, C].
            targets: 0 or 1 [N, C].
            mask: bool [N]; False = the row has no labels and is left out of all three parts.
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
            "auroc": float(auroc(self._kept("scores"), self._kept("labels").double()).nan_to_num(0.0).mean()),
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


@torch.no_grad()
def propensity_influence(logits: Tensor, targets: Tensor, popularity: Tensor, k: int = TOP_K) -> Tensor:
    """What each row contributes to the error of :class:`PropensityScore`'s score: the squares sum to its variance.

    The AUROC's part is DeLong's (:func:`auroc_influence`), over all C labels as in the score: one without both classes
    counts 0 for everybody and adds no error. Diversity is a mean over the rows, novelty the 100th power of one.

    Args:
        logits: [N, C].
        targets: 0 or 1 [N, C].
        popularity: of each label [C].
        k: top labels of the novelty.

    Returns:
        Contributions, float64 [N].
    """
    area = auroc_influence(logits, targets).nan_to_num(0.0).sum(1) / logits.shape[1]
    spread = diversity_loss(logits, reduction="none").double()
    popular = novelty_loss(logits, popularity, k=k, reduction="none").double()
    slope = NOVELTY_POWER * (1 - popular.mean()) ** (NOVELTY_POWER - 1)
    diverse, novel = (spread - spread.mean()) / len(spread), slope * (popular - popular.mean()) / len(popular)
    return SHARES["auroc"] * area - SHARES["diversity"] * diverse - SHARES["novelty"] * novel
