"""Deep heads for revenue at several horizons: ZILN, OptDist and ODMN (extra `torch`)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

Floats = npt.NDArray[np.float64]
# The same bounds in loss and prediction, so that no exponential overflows and none is trained against another.
_SIGMA = (0.05, 3.0)
_MU = (-12.0, 12.0)


class ZILN(nn.Module):
    """Zero-inflated log-normal per horizon: chance, mean and spread of the log amount.

    Args:
        width: of the trunk's output.
        horizons: number of horizons.

    Source: Wang, Liu, Miao, A Deep Probabilistic Model for Customer Lifetime Value Prediction, 2019 (arXiv 1912.07753).
    """

    def __init__(self, width: int, horizons: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, horizons * 3)
        self.horizons = horizons

    def prepare(self, targets: Floats) -> None:
        """Learn constants from the training amounts [N, H]; this head has none."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [B, H, 3]."""
        return self.out(hidden).unflatten(-1, (self.horizons, 3))

    def loss(self, logits: Tensor, y: Tensor, known: Tensor) -> Tensor:
        """Mean negative log likelihood over known labels: y and known [B, H].

        Args:
            logits: what `forward` gave.
            y: amounts; whatever stands at labels not known.
            known: 1 where a label is known.
        """
        return (ziln_loss(logits, y) * known).sum() / known.sum().clamp(min=1)

    def mean(self, logits: Tensor) -> Tensor:
        """Mean amount [B, H]."""
        return ziln_mean(logits)


class OptDist(nn.Module):
    """Several ZILN sub-distributions per horizon and a network that chooses among them.

    The choice is a Gumbel softmax while training, the likeliest one at prediction. It is aligned with the sub-network
    that explains the row best: focal cross entropy to the hard one, divergence from the soft one.

    Args:
        width: of the trunk's output.
        horizons: number of horizons.
        distributions: sub-distributions a horizon.
        temperature: of the Gumbel softmax.
        divergence: weight of the soft alignment.
        focus: exponent of the focal loss.

    Source: Weng et al., OptDist, CIKM 2024 (arXiv 2408.08585), section 3.
    """

    def __init__(
        self,
        width: int,
        horizons: int,
        distributions: int = 4,
        temperature: float = 1.0,
        divergence: float = 0.1,
        focus: float = 2.0,
    ) -> None:
        super().__init__()
        if distributions < 2:
            raise ValueError(f"distributions: got {distributions}, needs at least 2")
        self.shape = (horizons, distributions)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, horizons * 3))
            for _ in range(distributions)
        )
        self.choice = nn.Sequential(
            nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, horizons * distributions)
        )
        self.temperature, self.divergence, self.focus = temperature, divergence, focus

    def prepare(self, targets: Floats) -> None:
        """Learn constants from the training amounts [N, H]; this head has none."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the sub-distributions [B, H, L, 3] and of the choice [B, H, L]."""
        horizons, _ = self.shape
        logits = torch.stack([expert(hidden).unflatten(-1, (horizons, 3)) for expert in self.experts], dim=2)
        return logits, self.choice(hidden).unflatten(-1, self.shape)

    def loss(self, outputs: tuple[Tensor, Tensor], y: Tensor, known: Tensor) -> Tensor:
        """Weighted likelihood, focal alignment with the best sub-network and divergence: y and known [B, H].

        Args:
            outputs: what `forward` gave.
            y: amounts; whatever stands at labels not known.
            known: 1 where a label is known.
        """
        logits, alpha = outputs
        each = ziln_loss(logits, y.unsqueeze(-1).expand(logits.shape[:-1]))
        log_choice = functional.log_softmax(alpha, dim=-1)
        noise = -torch.log(-torch.log(torch.rand_like(alpha).clamp(1e-9, 1 - 1e-7)))
        weight = functional.softmax((log_choice + noise) / self.temperature, dim=-1)
        best = each.detach().argmin(dim=-1, keepdim=True)
        own = log_choice.gather(-1, best).squeeze(-1)
        focal = -((1 - own.exp()) ** self.focus) * own
        soft = functional.log_softmax(-each.detach(), dim=-1)
        divergence = (log_choice.exp() * (log_choice - soft)).sum(dim=-1)
        total = (weight * each).sum(dim=-1) + focal + self.divergence * divergence
        return (total * known).sum() / known.sum().clamp(min=1)

    def mean(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        """Mean amount of the likeliest sub-distribution [B, H]."""
        logits, alpha = outputs
        return ziln_mean(logits).gather(-1, alpha.argmax(dim=-1, keepdim=True)).squeeze(-1)


class ODMN(nn.Module):
    """Per horizon a mixture of sub-distributions cut into buckets, each horizon fed by the one before it.

    Zero is a sub-distribution of its own; positive amounts are cut into sub-distributions and these into buckets of
    about equal counts. Classification and ordinal towers choose them, the ordinal one teaching the other; a bias tower
    places the amount inside its bucket. A Mono Unit adds the earlier horizon's bucket probabilities, through
    non-negative weights and without gradient, to the later one's logits; a hinge punishes predictions out of order.

    Args:
        width: of the trunk's output.
        horizons: number of horizons.
        distributions: sub-distributions of positive amounts.
        buckets: buckets in each.
        decode: "expectation" over all buckets, or the "argmax" of sub-distribution and bucket as in the paper.
        order_weight: of the hinge.

    Source: Li et al., Billion-user Customer Lifetime Value Prediction, CIKM 2022 (arXiv 2208.13358), section 3; the
    equations were taken from secondary descriptions.
    """

    left: Tensor
    width_of: Tensor
    start: Tensor

    def __init__(
        self,
        width: int,
        horizons: int,
        distributions: int = 3,
        buckets: int = 5,
        decode: str = "expectation",
        order_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if decode not in ("expectation", "argmax"):
            raise ValueError(f"decode: got {decode!r}, needs 'expectation' or 'argmax'")
        if distributions < 1 or buckets < 1:
            raise ValueError(f"distributions, buckets: got {distributions} and {buckets}, needs at least 1 of each")
        self.horizons, self.distributions, self.buckets = horizons, distributions, buckets
        self.decode, self.order_weight = decode, order_weight
        cells = distributions * buckets
        sizes = (distributions + 1, distributions, cells, distributions * (buckets - 1), cells)
        self.sizes = sizes
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, sum(sizes)))
            for _ in range(horizons)
        )
        self.mono = nn.ModuleList(
            _MonoUnit(1 + cells, 16, distributions + 1 + cells) for _ in range(max(horizons - 1, 0))
        )
        self.register_buffer("left", torch.zeros(horizons, distributions, buckets))
        self.register_buffer("width_of", torch.ones(horizons, distributions, buckets))
        self.register_buffer("start", torch.zeros(horizons, distributions, buckets))

    def prepare(self, targets: Floats) -> None:
        """Cut the positive training amounts of each horizon into buckets of about equal counts; targets [N, H]."""
        cells = self.distributions * self.buckets
        for h in range(self.horizons):
            positive = targets[:, h][np.isfinite(targets[:, h]) & (targets[:, h] > 0)]
            edges = np.quantile(positive, np.arange(cells + 1) / cells) if len(positive) else np.arange(cells + 1.0)
            edges[0] = 0.0
            self.left[h] = torch.as_tensor(edges[:-1], dtype=torch.float32).view(self.distributions, self.buckets)
            wide = torch.as_tensor(np.diff(edges), dtype=torch.float32)
            self.width_of[h] = wide.view(self.distributions, self.buckets)
            cell = np.clip(np.searchsorted(edges, positive, side="right") - 1, 0, cells - 1)
            # The last bucket is wide and its amounts lie far to its left: biases start at the mean place.
            place = (positive - edges[cell]) / np.maximum(np.diff(edges)[cell], 1e-9)
            count = np.maximum(np.bincount(cell, minlength=cells), 1)
            mean = np.clip(np.bincount(cell, weights=place, minlength=cells) / count, 0.001, 0.999)
            start = torch.as_tensor(np.log(mean / (1 - mean)), dtype=torch.float32)
            self.start[h] = start.view(self.distributions, self.buckets)

    def forward(self, hidden: Tensor) -> list[tuple[Tensor, ...]]:
        """Per horizon: logits of sub-distributions, of their order, of buckets, of their order, and biases."""
        shape = (self.distributions, self.buckets)
        outputs: list[tuple[Tensor, ...]] = []
        earlier: Tensor | None = None
        for h, tower in enumerate(self.towers):
            dct, dot, bct, bot, bias = tower(hidden).split(self.sizes, dim=-1)
            if earlier is not None:
                extra = self.mono[h - 1](earlier.detach())
                dct = dct + extra[:, : self.distributions + 1]
                bct = bct + extra[:, self.distributions + 1 :]
            bct, bot = bct.unflatten(-1, shape), bot.unflatten(-1, (self.distributions, self.buckets - 1))
            outputs.append((dct, dot, bct, bot, torch.sigmoid(bias.unflatten(-1, shape) + self.start[h])))
            inner = (functional.softmax(dct, -1)[:, 1:, None] * functional.softmax(bct, -1)).flatten(1)
            earlier = torch.cat([functional.softmax(dct, -1)[:, :1], inner], dim=-1)
        return outputs

    def loss(self, outputs: list[tuple[Tensor, ...]], y: Tensor, known: Tensor) -> Tensor:
        """All towers' losses and the hinge on order: y and known [B, H].

        Args:
            outputs: what `forward` gave.
            y: amounts; whatever stands at labels not known.
            known: 1 where a label is known.
        """
        total = outputs[0][0].sum() * 0.0
        if not known.any():
            return total
        for h, (dct, dot, bct, bot, bias) in enumerate(outputs):
            rows = known[:, h].bool()
            if not rows.any():
                continue
            amount = y[rows, h]
            cell = self._cell(amount, h)
            which = torch.where(amount > 0, cell // self.buckets + 1, 0)
            part = _choice_loss(dct[rows], dot[rows], which)
            bought = amount > 0
            if bought.any():
                own, bucket = which[bought] - 1, cell[bought] % self.buckets
                pick = torch.arange(len(own), device=y.device)
                inner = _choice_loss(bct[rows][bought][pick, own], bot[rows][bought][pick, own], bucket)
                wide = self.width_of[h][own, bucket].clamp(min=1e-9)
                place = ((amount[bought] - self.left[h][own, bucket]) / wide).clamp(0, 1)
                miss = bias[rows][bought][pick, own, bucket] - place
                part = part + (inner + (miss**2).mean()) * bought.float().mean()
            total = total + part
        said = self._expectation(outputs)
        scale = y[known.bool()].mean().clamp(min=1e-6)
        hinge = functional.relu(said[:, :-1] - said[:, 1:]).sum(dim=1).mean() / scale
        return total + self.order_weight * hinge

    def mean(self, outputs: list[tuple[Tensor, ...]]) -> Tensor:
        """Mean amount, or that of the likeliest bucket, by `decode` [B, H]."""
        if self.decode == "expectation":
            return self._expectation(outputs)
        columns = []
        for h, (dct, _, bct, _, bias) in enumerate(outputs):
            which = dct.argmax(dim=-1)
            own = (which - 1).clamp(min=0)
            pick = torch.arange(len(own), device=dct.device)
            bucket = bct[pick, own].argmax(dim=-1)
            amount = self.left[h][own, bucket] + bias[pick, own, bucket] * self.width_of[h][own, bucket]
            columns.append(torch.where(which > 0, amount, 0.0))
        return torch.stack(columns, dim=1)

    def _expectation(self, outputs: list[tuple[Tensor, ...]]) -> Tensor:
        columns = []
        for h, (dct, _, bct, _, bias) in enumerate(outputs):
            amount = self.left[h] + bias * self.width_of[h]
            inner = (functional.softmax(bct, dim=-1) * amount).sum(dim=-1)
            columns.append((functional.softmax(dct, dim=-1)[:, 1:] * inner).sum(dim=-1))
        return torch.stack(columns, dim=1)

    def _cell(self, amount: Tensor, horizon: int) -> Tensor:
        edges = self.left[horizon].flatten()
        return (torch.searchsorted(edges.contiguous(), amount.contiguous(), right=True) - 1).clamp(0, len(edges) - 1)


class _MonoUnit(nn.Module):
    """Two layers with non-negative weights: more probability in, never a smaller logit out."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(hidden, inputs) * 0.1 - 2.0)
        self.second = nn.Parameter(torch.randn(outputs, hidden) * 0.1 - 2.0)
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(functional.linear(x, functional.softplus(self.first), self.bias))
        return functional.linear(x, functional.softplus(self.second))


HEADS: dict[str, Callable[..., Any]] = {"ziln": ZILN, "optdist": OptDist, "odmn": ODMN}


def ziln_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Negative log likelihood of a zero-inflated log-normal: logits [..., 3], y [...].

    Args:
        logits: of buying, mu, and sigma before softplus.
        y: amounts.
    """
    chance, mu, sigma = _ziln(logits)
    positive = y > 0
    log_y = torch.log(torch.where(positive, y, torch.ones_like(y)))
    amount = log_y + torch.log(sigma) + 0.9189385332046727 + 0.5 * ((log_y - mu) / sigma) ** 2
    entropy = functional.binary_cross_entropy_with_logits(chance, positive.to(y.dtype), reduction="none")
    return entropy + torch.where(positive, amount, torch.zeros_like(amount))


def ziln_mean(logits: Tensor) -> Tensor:
    """p · exp(mu + sigma² / 2): logits [..., 3]."""
    chance, mu, sigma = _ziln(logits)
    return torch.sigmoid(chance) * torch.exp(mu + 0.5 * sigma**2)


def _ziln(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chance, mu, spread = logits.unbind(dim=-1)
    return chance, mu.clamp(*_MU), functional.softplus(spread).clamp(*_SIGMA)


def _choice_loss(classes: Tensor, order: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, ordinal loss, and divergence of the classes from the ordinal tower's teaching."""
    loss = functional.cross_entropy(classes, target)
    if order.shape[-1] == 0:
        return loss
    above = (target[:, None] > torch.arange(order.shape[-1], device=target.device)).to(order.dtype)
    loss = loss + functional.binary_cross_entropy_with_logits(order, above)
    beyond = torch.sigmoid(order.detach()).cummin(dim=-1).values
    ones, zeros = torch.ones_like(beyond[:, :1]), torch.zeros_like(beyond[:, :1])
    teacher = (torch.cat([ones, beyond], -1) - torch.cat([beyond, zeros], -1)).clamp(min=1e-6)
    teacher = teacher / teacher.sum(dim=-1, keepdim=True)
    return loss + functional.kl_div(functional.log_softmax(classes, -1), teacher, reduction="batchmean")
