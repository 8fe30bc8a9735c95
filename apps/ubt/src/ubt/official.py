"""The fixed scorer of the RecSys Challenge 2025: its network, its settings, its metrics with all their quirks.

What the settings, the order of the rows and the metrics are is decided by the organisers' code (Synerise/recsys2025 at
e91c1a6, training_pipeline); none of it is a choice of this app. The metrics come from mtl-heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_heads.metrics import AUROC, PropensityScore, auroc_influence, propensity_influence
from runkit.compare import Estimate

SEED, WIDTH, BLOCKS, EPOCHS, BATCH, LEARNING_RATE = 1278, 2048, 3, 3, 128, 1e-3
# Rows that go through the network together when it is judged; metrics still see them in batches of BATCH.
JUDGED_TOGETHER = 64 * BATCH


@dataclass
class Task:
    """One task as the scorer sees it.

    Args:
        name: the challenge's name of it
        rows: positions of the users who take part, in the order of training [n]
        train: 0/1 labels of the train window of those users, sparse [n, C]
        scored: 0/1 labels of the scored window [n, C]
        popularity: weight of each label in the novelty, None for churn and conversion [C]
    """

    name: str
    rows: NDArray[np.int64]
    train: csr_array
    scored: csr_array
    popularity: NDArray[np.float64] | None


@dataclass
class Result:
    """What one representation scores on one task.

    Args:
        estimate: the task's score, of the best epoch, and what each row contributes to its error [n]
        parts: AUROC, diversity and novelty of the best epoch; churn and conversion have the AUROC only
        best_epoch: counted from 0
        logits: of the best epoch [n, C]
    """

    estimate: Estimate
    parts: dict[str, float]
    best_epoch: int
    logits: NDArray[np.float32]

    @property
    def score(self) -> float:
        """The task's score."""
        return self.estimate.value


class Network(nn.Module):
    """Linear, LayerNorm, residual blocks x + W2 gelu(W1 LN(x)), LayerNorm, Linear."""

    def __init__(self, inputs: int, outputs: int, width: int = WIDTH, blocks: int = BLOCKS):
        super().__init__()
        self.input = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.ups, self.downs = nn.ModuleList(), nn.ModuleList()
        # Weights are drawn in the order of the organisers' code, so that a seed means the same here.
        for _ in range(blocks):
            self.ups.append(nn.Linear(width, 2 * width))
            self.downs.append(nn.Linear(2 * width, width))
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, outputs] of features [n, inputs]."""
        x = self.input(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return self.output(x)


def fit(
    features: Callable[[NDArray[np.int64]], NDArray], task: Task, width: int, blocks: int, seed: int = SEED
) -> Result:
    """Train the scorer's network for three epochs on the train window and return the best epoch's score.

    AdamW 1e-3, batches of 128, binary cross-entropy, no shuffling: `task.rows` is the order of training. After each
    epoch all rows are judged on the scored window; the best epoch counts, as in the challenge.

    Args:
        features: gives the vectors [n, F] of the users at some positions [n]
        task: rows and labels
        width, blocks: size of the network; the challenge's are WIDTH and BLOCKS
        seed: of the weights; the challenge's is SEED
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def batch(start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.asarray(features(task.rows[start:stop]), np.float32)).to(device)

    count, labels = task.train.shape
    best: tuple[float, dict[str, float], int, NDArray[np.float32]] | None = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(batch(0, 1).shape[1], labels, width, blocks).to(device)
        optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
        for epoch in range(EPOCHS):
            for start in range(0, count, BATCH):
                truth = torch.from_numpy(task.train[start : start + BATCH].toarray()).to(device)
                loss = F.binary_cross_entropy_with_logits(network(batch(start, start + BATCH)), truth)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            with torch.inference_mode():
                pieces = [
                    network(batch(start, start + JUDGED_TOGETHER)).cpu() for start in range(0, count, JUDGED_TOGETHER)
                ]
            logits = torch.cat(pieces).numpy()
            value, parts = official_score(logits, task)
            if best is None or value > best[0]:
                best = value, parts, epoch, logits
    assert best is not None
    value, parts, epoch, logits = best
    return Result(Estimate(value, _influence(logits, task)), parts, epoch, logits)


def official_score(logits: NDArray[np.float32], task: Task) -> tuple[float, dict[str, float]]:
    """Return the challenge's score of logits [n, C] on the scored window, and its parts.

    Churn and conversion: AUROC. Propensity: 0.8 AUROC + 0.1 novelty + 0.1 diversity. Rows are taken in batches of 128,
    because scores become sigmoids batch by batch, and only where one of the batch lies outside [0, 1].
    """
    if task.popularity is None:
        area = AUROC()
        for start in range(0, len(logits), BATCH):
            scores = torch.from_numpy(logits[start : start + BATCH, 0])
            if bool(((scores < 0) | (scores > 1)).any()):
                scores = scores.sigmoid()
            area.update(scores, torch.from_numpy(task.scored[start : start + BATCH].toarray()[:, 0]))
        # One class alone is no error to the organisers' code: it counts as 0.
        value = float(np.nan_to_num(area.compute()["macro"]))
        return value, {"auroc": value}
    metric = PropensityScore(torch.from_numpy(np.asarray(task.popularity)))
    for start in range(0, len(logits), BATCH):
        truth = torch.from_numpy(task.scored[start : start + BATCH].toarray())
        metric.update(torch.from_numpy(logits[start : start + BATCH]), truth)
    parts = metric.compute()
    return parts.pop("score"), parts


def judged(task: Task, logits: NDArray[np.float32]) -> Result:
    """Return the result of logits [n, C] that were had without the scorer's network."""
    logits = np.asarray(logits, np.float32)
    value, parts = official_score(logits, task)
    return Result(Estimate(value, _influence(logits, task)), parts, 0, logits)


def _influence(logits: NDArray[np.float32], task: Task) -> NDArray[np.float64]:
    """What every row contributes to the error of the score [n].

    The error speaks of the users who are scored; it does not know how another seed of the network would have done.
    """
    scores, truth = torch.from_numpy(logits), torch.from_numpy(task.scored.toarray())
    if task.popularity is not None:
        return propensity_influence(scores, truth, torch.from_numpy(np.asarray(task.popularity))).numpy()
    # One class alone scores 0 whatever the rows say.
    return auroc_influence(scores[:, 0], truth[:, 0]).nan_to_num(0.0).numpy()
