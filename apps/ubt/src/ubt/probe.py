"""One small network that turns any representation into predictions; its shape is that of the challenge's scorer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ubt.config import ScoreConfig


class ProbeNetwork(nn.Module):
    """Linear, LayerNorm, residual blocks x + W2 gelu(W1 LN(x)), LayerNorm, Linear."""

    def __init__(self, inputs: int, outputs: int, width: int, blocks: int):
        super().__init__()
        self.input = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, outputs] of features [n, inputs]."""
        x = self.input(x)
        for block in self.blocks:
            x = x + block(x)
        return self.output(x)


def probe(features: NDArray, labels: NDArray, config: ScoreConfig, seed: int) -> NDArray[np.float32]:
    """Fit the probe on `features` [n, F] and 0/1 `labels` [n, C] and return its logits [n, C] for the same rows.

    Features are standardised and cut at ten standard deviations; AdamW, binary cross-entropy, a fixed number of
    epochs and no look at the scored window. The learning rate falls to zero and the logits of several networks, which
    differ in their seed, are averaged: one network alone moves the AUROC by as much as the methods differ.
    """
    x = torch.from_numpy(np.asarray(features, np.float32))
    x = ((x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)).clamp(-10, 10)
    y = torch.from_numpy(np.asarray(labels, np.float32))
    with torch.random.fork_rng(devices=[]):
        logits = [_fit(x, y, config, seed + i) for i in range(config.probe_seeds)]
    return torch.stack(logits).mean(0).numpy()


def _fit(x: Tensor, y: Tensor, config: ScoreConfig, seed: int) -> Tensor:
    torch.manual_seed(seed)
    network = ProbeNetwork(x.shape[1], y.shape[1], config.probe_width, config.probe_blocks)
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.probe_learning_rate)
    steps = config.probe_epochs * -(-len(x) // config.probe_batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    for _ in range(config.probe_epochs):
        for rows in torch.randperm(len(x)).split(config.probe_batch_size):
            loss = F.binary_cross_entropy_with_logits(network(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.inference_mode():
        return torch.cat([network(part) for part in x.split(8192)])
