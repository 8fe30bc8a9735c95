"""A deep model on the same features as the trees, trained shard by shard (extra `torch`)."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .cache import FeatureCache, Ints
from .features import Matrix
from .heads import HEADS

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
# Rows are predicted in padded blocks of one size: a matrix product may round differently for another number of rows.
_BLOCK = 1024


class DeepModel:
    """Embeddings and standardised features, a shared trunk, and one of the heads.

    Args:
        kind: "ziln", "odmn" or "optdist".
        names: features in order.
        categorical: feature of dictionary ids -> number of ids.
        horizons: names in order.
        seed: of weights and shuffles.
        hidden: widths of the trunk.
        embedding: width of an embedding.
        epochs: passes over the training rows.
        batch_size: rows a step.
        learning_rate: of AdamW, falling to 0 along a cosine.
        weight_decay: of AdamW.
        dropout: in the trunk.
        device: where torch computes.
        head: further settings of the head, by name.
    """

    def __init__(
        self,
        kind: str,
        names: Sequence[str],
        categorical: Mapping[str, int],
        horizons: Sequence[str],
        *,
        seed: int = 0,
        hidden: Sequence[int] = (128, 64),
        embedding: int = 8,
        epochs: int = 8,
        batch_size: int = 1024,
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-4,
        dropout: float = 0.1,
        device: str = "cpu",
        head: Mapping[str, Any] | None = None,
    ) -> None:
        if kind not in HEADS:
            raise ValueError(f"kind: got {kind!r}, needs one of {sorted(HEADS)}")
        if epochs < 1 or batch_size < 2:
            raise ValueError(f"epochs, batch_size: got {epochs} and {batch_size}, needs at least 1 and 2")
        self.settings: dict[str, Any] = {
            "kind": kind,
            "names": list(names),
            "categorical": dict(categorical),
            "horizons": list(horizons),
            "seed": seed,
            "hidden": list(hidden),
            "embedding": embedding,
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "dropout": dropout,
            "device": device,
            "head": dict(head or {}),
        }
        self.horizons = list(horizons)
        self.scale = 1.0
        self.largest = [np.inf] * len(self.horizons)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = _Network(self.settings)

    def fit(self, cache: FeatureCache, rows: Ints, targets: Mapping[str, Floats]) -> "DeepModel":
        """Train on cached rows, ascending.

        Args:
            cache: features.
            rows: training rows.
            targets: horizon -> amounts, NaN where unknown, of all cached rows [N].

        Returns:
            the model itself.
        """
        settings = self.settings
        device = torch.device(settings["device"])
        y = np.column_stack([targets[name] for name in self.horizons])
        positive = y[rows][np.nan_to_num(y[rows]) > 0]
        # Amounts in units of their median: logits start near the truth.
        self.scale = float(np.median(positive)) if len(positive) else 1.0
        self.largest = [float(np.nanmax(y[rows, h])) for h in range(y.shape[1])]
        chosen = np.isin(cache.sample, rows)
        self.network.standardise(cache.sample_matrix[chosen])
        self.network.head.prepare(y[rows] / self.scale)
        network = self.network.to(device).train()
        steps = settings["epochs"] * sum(-(-len(own) // settings["batch_size"]) for own in _by_shard(cache, rows))
        optimiser = torch.optim.AdamW(
            network.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
        draws = np.random.default_rng(settings["seed"])
        with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
            torch.manual_seed(settings["seed"] + 1)
            for epoch in range(settings["epochs"]):
                loss, count = 0.0, 0
                for number in draws.permutation(len(cache.shards)):
                    own = _by_shard(cache, rows)[number]
                    if not len(own):
                        continue
                    matrix = torch.from_numpy(cache.take(own))
                    target = torch.from_numpy((y[own] / self.scale).astype(np.float32))
                    order = torch.from_numpy(draws.permutation(len(own)))
                    for batch in order.split(settings["batch_size"]):
                        value = self._step(network, optimiser, matrix[batch].to(device), target[batch].to(device))
                        schedule.step()
                        loss, count = loss + value * len(batch), count + len(batch)
                log.info("%s epoch %d: loss %.5f", settings["kind"], epoch + 1, loss / max(count, 1))
        self.network = network.eval()
        return self

    def predict(self, matrix: Matrix) -> dict[str, Floats]:
        """Horizon -> mean amount [N], at most ten times the largest amount seen in training."""
        device = torch.device(self.settings["device"])
        network = self.network.eval()
        parts = []
        with torch.inference_mode():
            for start in range(0, len(matrix), _BLOCK):
                block = np.zeros((_BLOCK, matrix.shape[1]), np.float32)
                own = matrix[start : start + _BLOCK]
                block[: len(own)] = own
                said = network.head.mean(network(torch.from_numpy(block).to(device)))
                parts.append(said[: len(own)].double().cpu().numpy())
        found = np.concatenate(parts) if parts else np.empty((0, len(self.horizons)))
        columns = {}
        for h, name in enumerate(self.horizons):
            columns[name] = np.clip(found[:, h] * self.scale, 0.0, 10.0 * self.largest[h])
        return columns

    def save(self, path: Path) -> None:
        """Write settings and weights in one file, loadable without unpickling code."""
        weights = {name: value.cpu() for name, value in self.network.state_dict().items()}
        state = {"settings": self.settings, "scale": self.scale, "largest": self.largest, "weights": weights}
        torch.save(state, path)

    @classmethod
    def load(cls, path: Path) -> "DeepModel":
        """The model `save` wrote."""
        state = torch.load(path, weights_only=True, map_location="cpu")
        settings = dict(state["settings"])
        if settings["device"] != "cpu" and not torch.cuda.is_available():
            settings["device"] = "cpu"
        model = cls(
            settings.pop("kind"),
            settings.pop("names"),
            settings.pop("categorical"),
            settings.pop("horizons"),
            **settings,
        )
        model.scale, model.largest = state["scale"], state["largest"]
        model.network.load_state_dict(state["weights"])
        model.network.to(torch.device(settings["device"])).eval()
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "network": {n: v.cpu().numpy() for n, v in self.network.state_dict().items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weights = state.pop("network")
        self.__dict__.update(state)
        self.network = _Network(self.settings)
        self.network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
        self.network.eval()

    def _step(self, network: "_Network", optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
        known = torch.isfinite(y).to(y.dtype)
        loss = network.head.loss(network(x), torch.nan_to_num(y), known)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        return float(loss.detach())


class _Network(nn.Module):
    """Features to the head's outputs; constants of the standardisation are buffers."""

    mean: Tensor
    spread: Tensor
    holes: Tensor

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        names, sizes = settings["names"], settings["categorical"]
        self.codes = [names.index(name) for name in sizes]
        self.sizes = list(sizes.values())
        self.numbers = [i for i in range(len(names)) if i not in set(self.codes)]
        self.embeddings = nn.ModuleList(nn.Embedding(size, settings["embedding"]) for size in self.sizes)
        width = 2 * len(self.numbers) + settings["embedding"] * len(self.codes)
        layers: list[nn.Module] = []
        for hidden in settings["hidden"]:
            layers += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Dropout(settings["dropout"])]
            width = hidden
        self.trunk = nn.Sequential(*layers)
        self.head = HEADS[settings["kind"]](width, len(settings["horizons"]), **settings["head"])
        self.register_buffer("mean", torch.zeros(len(self.numbers)))
        self.register_buffer("spread", torch.ones(len(self.numbers)))
        self.register_buffer("holes", torch.zeros(len(self.numbers)))

    def standardise(self, sample: Matrix) -> None:
        """Learn mean and spread of the squashed features, and which have unknown values, from a sample [S, F]."""
        x = _squash(torch.from_numpy(sample[:, self.numbers].astype(np.float32)))
        known = torch.isfinite(x)
        count = known.sum(dim=0).clamp(min=1)
        filled = torch.where(known, x, 0.0)
        mean = filled.sum(dim=0) / count
        spread = (torch.where(known, x - mean, 0.0) ** 2).sum(dim=0).div(count).sqrt()
        self.mean.copy_(mean)
        self.spread.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))
        self.holes.copy_((known.float().mean(dim=0) < 1).float())

    def forward(self, matrix: Tensor) -> Any:
        x = _squash(matrix[:, self.numbers])
        unknown = ~torch.isfinite(x)
        x = torch.where(unknown, 0.0, ((x - self.mean) / self.spread).clamp(-5, 5))
        parts = [x, unknown.to(x.dtype) * self.holes]
        for column, size, embedding in zip(self.codes, self.sizes, self.embeddings, strict=True):
            ids = torch.nan_to_num(matrix[:, column]).long().clamp(0, size - 1)
            parts.append(embedding(ids))
        return self.head(self.trunk(torch.cat(parts, dim=1)))


def _squash(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.log1p(x.abs())


def _by_shard(cache: FeatureCache, rows: Ints) -> list[Ints]:
    ends = [np.searchsorted(rows, [shard.start, shard.start + shard.rows]) for shard in cache.shards]
    return [rows[first:last] for first, last in ends]
