"""Train the network on what is before the validation window; judge every epoch by its lists on that window.

RUN/checkpoints/best.ckpt, last.ckpt   weights, their moving average, optimiser
    epochs.json                        NDCG@10 and share of the gradient of every objective, by epoch
    plots/ndcg.png, gradients.png
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from mtl_heads import FrequencySampler
from purchase.config import EVENTS, Config
from purchase.network import Recommender
from purchase.objectives import inputs, terms, total
from purchase.prepare import FIRST, PACKAGES, Prepared, open_prepared
from purchase.ranking import FIELDS, NetworkRanker
from rankers import evaluate
from runkit.files import read_json
from runkit.plots import lines
from runkit.run import Run
from runkit.training import ResumableModule, fit, load_checkpoint, trainer
from seqdata import SequenceDataset

# Users that are put in order of length before they are cut into batches, so that little is padded.
POOL_USERS = 4096
LIMITS = ("max_epochs", "patience", "valid_users", "accelerator")
log = logging.getLogger("purchase")


def train(config: Config) -> str:
    """Write ``<run_dir>/checkpoints``."""
    run = Run(config.run_dir)
    with run.command("train", config, PACKAGES) as facts:
        prepared = open_prepared(config)
        facts |= train_network(config, prepared, run)
    return ", ".join(f"{name} {value:.4f}" for name, value in facts.items() if name.startswith("ndcg"))


def train_network(config: Config, prepared: Prepared, run: Run) -> dict[str, float]:
    """Train in a run directory and return the best epoch's NDCG@10 by objective."""
    torch.manual_seed(config.seed)
    module = Training(config, prepared)
    log.info(
        "%d users, %d items, objectives %s",
        len(module.view),
        prepared.num_items,
        ", ".join(module.network.heads),
    )
    teacher = trainer(
        run.folder,
        config.train.max_epochs,
        patience=config.train.patience,
        progress=config.progress,
        accelerator=config.train.accelerator,
        gradient_clip_val=config.train.clip,
    )
    fit(teacher, module, run.folder, config.resume)
    epochs = read_json(run.folder / "epochs.json")
    for name, title in (("ndcg", "NDCG@10 on the validation window"), ("gradients", "Share of the gradient")):
        key = {"ndcg": "ndcg@10/", "gradients": "gradient_share/"}[name]
        series = {
            event: ([int(at) for at in epochs], [values[key + event] for values in epochs.values()])
            for event in module.network.heads
            if all(key + event in values for values in epochs.values())
        }
        lines(run.plots / f"{name}.png", series, title, "epoch", title.split(" ")[0], whole=True, marker="o")
    best = min(epochs.values(), key=lambda values: values["valid_loss"])
    return {f"ndcg_{event}": best[f"ndcg@10/{event}"] for event in module.network.heads}


def load_network(config: Config, prepared: Prepared) -> Recommender:
    """Return the best epoch's averaged network.

    Raises:
        FileNotFoundError: without a checkpoint
        ValueError: if it was trained on another log or with another network
    """
    path = Path(config.run_dir) / "checkpoints" / "best.ckpt"
    if not path.exists():
        raise FileNotFoundError(f"run_dir: got {config.run_dir}, needs a network; run `purchase train` first")
    checkpoint = load_checkpoint(path)
    spec = checkpoint["spec"]
    if spec["prepared"] != prepared.key:
        raise ValueError(f"{path}: is of another log or split, needs `purchase train` again")
    if spec["model"] != asdict(config.model):
        raise ValueError(f"model: got {asdict(config.model)}, needs that of `purchase train`, {spec['model']}")
    network = _network(config, prepared, spec["objectives"], np.ones(prepared.num_items, bool))
    prefix = "average.module."
    state = {name.removeprefix(prefix): one for name, one in checkpoint["state_dict"].items() if prefix in name}
    network.load_state_dict(state)
    return network.eval()


class Training(ResumableModule):
    """What lightning trains: the network, its moving average, the sampler of negatives.

    Args:
        config: all settings
        prepared: the log
    """

    def __init__(self, config: Config, prepared: Prepared) -> None:
        self.view = prepared.history(prepared.split.valid_start)
        past = self.view.gather(list(FIELDS))
        counts = np.bincount(past["item_id"].astype(np.int64) - FIRST, minlength=prepared.num_items)
        kinds = np.bincount(past["event_type"], minlength=FIRST + len(EVENTS))[FIRST:]
        objectives = [name for name in config.train.weights if kinds[EVENTS.index(name)]]
        if config.split.target not in objectives:
            raise ValueError(
                f"split.target: got {config.split.target}, needs one such event before the validation window"
            )
        settings = {name: value for name, value in asdict(config.train).items() if name not in LIMITS}
        spec = {"model": asdict(config.model), "train": settings, "seed": config.seed, "prepared": prepared.key}
        super().__init__(config.seed, spec | {"objectives": objectives})
        self.config, self.prepared = config, prepared
        self.network = _network(config, prepared, objectives, counts > 0)
        self.average = AveragedModel(self.network, avg_fn=self._mixed).requires_grad_(False)
        self.sampler = FrequencySampler(torch.from_numpy(counts), config.train.sampling_power)
        self.shares: dict[str, float] = {}

    def train_dataloader(self) -> DataLoader:
        data = SequenceDataset(
            # One event alone has nothing after it to learn from.
            self.view.at_least(2),
            max_tokens=self.config.train.batch_events,
            max_len=self.config.model.max_len,
            fields=list(FIELDS),
            shuffle=True,
            seed=self.seed,
            length_pool=POOL_USERS,
            transform=inputs,
        )
        data.set_epoch(self.current_epoch)
        return DataLoader(data, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        # The window is judged as a whole, in `on_validation_epoch_end`.
        return DataLoader(TensorDataset(torch.zeros(1)))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        settings = self.config.train
        found = terms(self.network, batch, self.sampler, settings, self.prepared.split.horizon / 1e6)
        if index == 0:
            self.shares = gradient_shares(self.network, found, settings.weights)
        loss = total(found, settings.weights)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=1)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.average.update_parameters(self.network)

    def validation_step(self, batch: Any, index: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        found = {name: self._ndcg(name) for name in self.network.heads}
        self.log_dict({f"ndcg@10/{name}": value for name, value in found.items()})
        self.log_dict({f"gradient_share/{name}": share for name, share in self.shares.items()})
        self.log("valid_loss", 1 - found[self.config.split.target])

    def configure_optimizers(self) -> Any:
        settings = self.config.train
        optimiser = torch.optim.AdamW(parameter_groups(self.network, settings.embedding_factor, settings))
        rise = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min(1.0, (step + 1) / max(settings.warmup_steps, 1))
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": rise, "interval": "step"}}

    def _mixed(self, average: Tensor, current: Tensor, steps: Any) -> Tensor:
        # Early averages forget faster: they would be those of random weights.
        steps = float(steps)
        return torch.lerp(average, current, 1 - min(self.config.train.ema, (1 + steps) / (10 + steps)))

    def _ndcg(self, event: str) -> float:
        """NDCG@10 of the users with such an event on the validation window and a history before it; 0 without any."""
        start = self.prepared.split.valid_start
        rows, items, _ = self.prepared.targets(start, event)
        users = np.unique(rows[self.view.lengths()[rows] > 0])
        if len(users) > self.config.train.valid_users:
            users = np.sort(np.random.default_rng(self.seed).permutation(users)[: self.config.train.valid_users])
        if not len(users):
            return 0.0
        network = cast(Recommender, self.average.module)
        ranker = NetworkRanker(network, self.view, event, self.config.model.max_len)
        lists, _ = ranker.recommend(users, 10)
        return evaluate(users, lists, rows, items, (10,)).means()["ndcg@10"]


def parameter_groups(network: Recommender, embedding_factor: float, settings: Any) -> list[dict[str, Any]]:
    """Embeddings, heads, matrices of the encoder, and what is never shrunk; each with its own rate and decay."""
    found: dict[str, list[Tensor]] = {"embeddings": [], "heads": [], "matrices": [], "rest": []}
    embedding = {id(module.weight) for module in network.modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in network.named_parameters():
        if id(parameter) in embedding:
            kind = "embeddings"
        elif parameter.dim() < 2:
            kind = "rest"
        else:
            kind = "heads" if name.startswith("heads.") else "matrices"
        found[kind].append(parameter)
    rates = {"embeddings": settings.learning_rate * embedding_factor}
    decays = {"heads": settings.weight_decay, "matrices": settings.weight_decay}
    return [
        {
            "params": parameters,
            "name": kind,
            "lr": rates.get(kind, settings.learning_rate),
            "weight_decay": decays.get(kind, 0.0),
        }
        for kind, parameters in found.items()
    ]


def gradient_shares(
    network: Recommender, terms: Mapping[str, Tensor], weights: Mapping[str, float]
) -> dict[str, float]:
    """Each weighted term's part of the sum of the norms of their gradients, in what the objectives share."""
    shared = [one for name, one in network.named_parameters() if not name.startswith("heads.")]
    norms = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, shared, retain_graph=True, allow_unused=True)
        square = sum(float(grad.double().square().sum()) for grad in grads if grad is not None)
        norms[name] = weights[name] * square**0.5
    whole = sum(norms.values())
    return {name: norm / whole if whole else 0.0 for name, norm in norms.items()}


def _network(config: Config, prepared: Prepared, objectives: list[str], learnt: np.ndarray) -> Recommender:
    brand, category = torch.from_numpy(prepared.brand), torch.from_numpy(prepared.category)
    return Recommender(config.model, brand, category, torch.from_numpy(learnt), objectives)
