"""Where negatives come from, and with which probability: what the logQ correction needs."""

import math

import torch
from torch import Tensor, nn

from .precision import ExactBuffers


class UniformSampler(nn.Module):
    """Every item with the same probability, with replacement.

    Args:
        num_items: rows of the item table.
        first: the smallest item drawn; rows before it (missing, unknown) never are.
    """

    def __init__(self, num_items: int, first: int = 0) -> None:
        super().__init__()
        if not 0 <= first < num_items:
            raise ValueError(f"first must be in [0, {num_items}), got {first}")
        self.num_items, self.first = num_items, first

    def sample(self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Items of the given shape."""
        return torch.randint(self.first, self.num_items, shape, device=device, generator=generator)

    def log_q(self, items: Tensor) -> Tensor:
        """Log-probability of drawing each item, same shape."""
        return torch.full(items.shape, -math.log(self.num_items - self.first), device=items.device)


class FrequencySampler(ExactBuffers):
    """Items in proportion to count^power, with replacement; items with count 0 are never drawn.

    Args:
        counts: how often each item occurs in the training data [I].
        power: 1 samples by frequency, 0.75 is word2vec's flattening.
    """

    cumulative: Tensor
    log_probability: Tensor

    def __init__(self, counts: Tensor, power: float = 0.75) -> None:
        super().__init__()
        weights = torch.where(counts > 0, counts.double().clamp_min(0) ** power, 0.0)
        if counts.dim() != 1 or not torch.isfinite(weights).all() or weights.sum() <= 0:
            raise ValueError(f"counts must be finite [I] with a positive entry, got shape {tuple(counts.shape)}")
        self.register_buffer("cumulative", (weights.cumsum(0) / weights.sum()))
        # What is never drawn gets the least positive probability instead of 0.
        probability = (weights / weights.sum()).clamp_min(float((weights / weights.sum())[weights > 0].min()))
        self.register_buffer("log_probability", probability.log().float())

    def sample(self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Items of the given shape, by inverting the cumulative distribution."""
        u = torch.rand(shape, device=device, generator=generator, dtype=torch.float64)
        return torch.searchsorted(self.cumulative, u, right=True).clamp_max(len(self.cumulative) - 1)

    def log_q(self, items: Tensor) -> Tensor:
        """Log-probability of drawing each item, same shape; one never drawn has the least positive one's."""
        return self.log_probability[items]


class StreamingFrequency(ExactBuffers):
    """Estimates Q of in-batch negatives from the stream: an item seen every b batches has probability 1 / b.

    Args:
        num_items: rows of the item table.
        rate: learning rate a of b <- (1 - a) b + a (steps since the item was last seen).

    Source: Yi et al. 2019, "Sampling-bias-corrected neural modeling", algorithm 2 (with exact item slots, no hashing).
    """

    last: Tensor
    gap: Tensor
    step: Tensor

    def __init__(self, num_items: int, rate: float = 0.05) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}")
        self.rate = rate
        self.register_buffer("last", torch.zeros(num_items, dtype=torch.long))
        self.register_buffer("gap", torch.zeros(num_items))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, items: Tensor, mask: Tensor | None = None) -> None:
        """Take in the items of one batch [N]; an item that occurs twice counts once. ``mask`` bool [N]: present."""
        if not len(items):
            return
        mask = torch.ones_like(items, dtype=torch.bool) if mask is None else mask
        # Absent rows repeat a present one: an item that occurs twice is written twice with the same number.
        present, items = mask.any(), torch.where(mask, items, items.gather(0, mask.int().argmax(0, keepdim=True)))
        self.step += present
        since = (self.step - self.last[items]).float()
        # The first sight of an item has no gap yet: the steps so far are the best estimate.
        known = self.last[items] > 0
        gap = torch.where(known, (1 - self.rate) * self.gap[items] + self.rate * since, since)
        self.gap[items] = torch.where(present, gap, self.gap[items])
        self.last[items] = torch.where(present, self.step, self.last[items])

    def log_q(self, items: Tensor) -> Tensor:
        """Log-probability that a batch contains each item, same shape; an item never seen counts as seen once."""
        unseen = self.step.clamp_min(1).float()
        gap = torch.where(self.last[items] > 0, self.gap[items], unseen)
        return -gap.clamp_min(1.0).log()
