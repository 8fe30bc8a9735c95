"""Train the network with lightning: labels of the train window and earlier ones only, resumable to the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from mtl_heads import WEIGHTINGS, MultiTaskHeads, TaskSpec, parse_task_weights
from mtl_heads.distributed import all_reduce_sum
from mtl_heads.losses import class_balanced_weights, novelty_loss
from mtl_heads.metrics import AUROC, MeanLosses
from runkit.files import read_json
from runkit.plots import lines
from runkit.training import ResumableModule, fit, load_checkpoint, trainer
from ubt.batches import Example, Reader, UserBatches
from ubt.config import TASKS, Config, ModelConfig, TrainConfig
from ubt.labels import Labels, earlier_labels, window_labels
from ubt.model import UniversalBehavioralTransformer
from ubt.prepare import Prepared

KINDS = {
    "churn": "binary",
    "category_propensity": "multilabel",
    "product_propensity": "retrieval",
    "price": "regression",
    "name": "vector",
}
# What a run that is resumed may change: how long it goes on, and what it runs on. Weights are compared as numbers.
FREE = ("num_epochs", "patience", "threads", "processes", "task_weights")
# Tasks whose ranking of the users kept apart is reported.
AREAS = ("churn", "category_propensity")


def train(prepared: Prepared, config: Config) -> Path:
    """Train on the users' events before train_start and return the checkpoint of the best epoch.

    A share of the users is kept apart: their labels of the train window decide about learning rate and stopping.
    Outcomes of the scored window are not read. With `config.resume` a run continues from its last finished epoch;
    all randomness is a function of the seed and the epoch, so the weights are those of an uninterrupted run.

    Raises:
        ValueError: if a task is unknown, has no label, nobody is left to train on, or the loss is not finite
    """
    config.check()
    settings, run_dir = config.train, Path(config.run_dir)
    weights = _task_weights(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    reader = Reader(prepared, config.model.max_ids)
    if settings.hold_out_newest and settings.cutoffs < 2:
        raise ValueError(f"train.hold_out_newest: needs train.cutoffs of 2 or more, got {settings.cutoffs}")
    labels = [window_labels(prepared, "train"), *earlier_labels(prepared, settings.cutoffs - 1, settings.span)][::-1]
    _check(labels[:-1] if settings.hold_out_newest else labels, weights)
    L.seed_everything(config.seed, verbose=False)
    module = UBTModule(reader, labels, config, weights)
    views = {"train on": module.data.train_view, "keep apart": module.data.valid_view}
    for use, view in views.items():
        if not len(view):
            raise ValueError(
                f"train.valid_share: {settings.valid_share} of the {sum(map(len, views.values()))} relevant clients "
                f"with a history leaves nobody to {use}; needs another share, or more clients"
            )
    lightning = trainer(
        run_dir,
        settings.num_epochs,
        patience=settings.patience,
        progress=config.progress,
        devices=settings.processes,
        # Every weight has a gradient, also where a share of a small last batch holds nobody.
        strategy="ddp" if settings.processes > 1 else "auto",
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
        gradient_clip_val=settings.gradient_clip,
    )
    best = fit(lightning, module, run_dir, config.resume)
    if lightning.is_global_zero:
        _plot(run_dir)
    return best


def _task_weights(settings: TrainConfig) -> dict[str, float]:
    """Return the weights of the tasks that are trained."""
    weights = {task: weight for task, weight in parse_task_weights(settings.task_weights, TASKS).items() if weight > 0}
    if not weights:
        raise ValueError(f"task_weights: got {settings.task_weights!r}, needs at least one above 0")
    return weights


def tasks_of(
    reader: Reader, weights: Mapping[str, float], model: ModelConfig, config: TrainConfig, labels: Sequence[Labels] = ()
) -> tuple[list[TaskSpec], dict[str, tuple[str, list[int]]]]:
    """Return the tasks on this log, and for those about values of a family, the family and the values' ids.

    Args:
        reader: what reads the log
        weights: weight of every task
        model: sizes
        config: losses
        labels: labels of the training windows, which the losses are balanced by; none to only use the network
    """
    width, prepared, specs, values = model.embedding_size, reader.prepared, [], {}
    for task, weight in weights.items():
        options: dict[str, Any] = {}
        if task == "churn":
            options = {"loss": config.loss, "loss_options": _binary_loss(config, _churn_rate(labels))}
        elif task == "category_propensity":
            counts = sum((one.category.sum(0) for one in labels), np.ones(len(prepared.categories)))
            # Summed over the labels of a user, which are rare: a mean over them would drown in negatives.
            balance = len(counts) * class_balanced_weights(torch.from_numpy(counts), config.balance)
            options = {"size": len(counts), "loss": config.loss}
            options["loss_options"] = _binary_loss(config, 0.0) | {"weight": balance}
            values[task] = ("category", _ids(prepared, "category", prepared.categories))
        elif task == "product_propensity":
            size = reader.families["item"].size
            options = {"size": size, "head_options": {"num_negatives": config.num_negatives, "first": 2}}
            ids = _ids(prepared, "item", prepared.skus)
            values[task] = ("item", [number if number < size else 1 for number in ids])
            options["missing"] = 0
        elif task == "name":
            options = {"size": prepared.name_width, "loss": "cosine"}
        spec = TaskSpec(task, KINDS[task], weight=weight, hidden=(width,), dropout=model.dropout, **options)
        specs.append(spec)
    return specs, values


def load(checkpoint: str | Path, prepared: Prepared) -> tuple[UniversalBehavioralTransformer, Reader]:
    """Return the network of a checkpoint in evaluation mode, and the reader that feeds it.

    Raises:
        FileNotFoundError: if there is none; names the command that helps
        ValueError: if it was trained on another prepared log
    """
    help = "run `ubt train` with the same --config and --run-dir first"
    if not Path(checkpoint).exists():
        raise FileNotFoundError(f"{checkpoint}: no trained model; {help}")
    state = load_checkpoint(checkpoint)
    spec = state["spec"]
    if spec["fingerprint"] != prepared.fingerprint:
        raise ValueError(f"{checkpoint}: was trained on another log than {prepared.folder} holds now; {help}")
    model = ModelConfig(**spec["model"])
    reader = Reader(prepared, model.max_ids)
    tasks, values = tasks_of(reader, dict.fromkeys(spec["tasks"], 1.0), model, TrainConfig())
    network = UniversalBehavioralTransformer(reader.families, tasks, values, model)
    prefix = "network."
    weights = {name[len(prefix) :]: value for name, value in state["state_dict"].items() if name.startswith(prefix)}
    network.load_state_dict(weights)
    return network.eval(), reader


class UBTModule(ResumableModule):
    """The network with its losses, optimiser and schedule."""

    def __init__(self, reader: Reader, labels: list[Labels], config: Config, weights: dict[str, float]):
        # Kept in every checkpoint: what is needed to load it, and what may not differ when it is resumed.
        spec = {
            "tasks": list(weights),
            "weights": weights,
            "model": asdict(config.model),
            "train": {key: value for key, value in asdict(config.train).items() if key not in FREE},
            "seed": config.seed,
            "fingerprint": reader.prepared.fingerprint,
        }
        super().__init__(config.seed, spec)
        self.data = UserBatches(reader, labels, config, weights)
        labels = self.data.train_labels
        tasks, values = tasks_of(reader, weights, config.model, config.train, labels)
        self.network = UniversalBehavioralTransformer(reader.families, tasks, values, config.model)
        self.weighting = WEIGHTINGS[config.train.weighting](list(weights), static=weights)
        _start_from_base_rates(self.network.tasks.heads, labels)
        self.settings, self.weights = config.train, weights
        self.popularity = {
            task: torch.from_numpy(reader.prepared.targets[what].popularity)
            for task, what in (("category_propensity", "category"), ("product_propensity", "sku"))
            if task in weights and reader.prepared.targets[what].popularity.any()
        }
        sizes = {"churn": 1, "category_propensity": len(reader.prepared.categories)}
        # Not attributes of their own: what is summed up inside an epoch does not belong into a checkpoint.
        self._judges: dict[str, Any] = {task: AUROC(sizes[task]) for task in AREAS if task in weights}
        self._judges["losses"] = MeanLosses(list(weights))
        self._schedule: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        self._schedule_state: dict[str, Any] = {}

    def on_fit_start(self) -> None:
        for judge in self._judges.values():
            judge.to(self.device)
        for task in self.weights:
            options = self.network.tasks.heads.head(task).options
            if "weight" in options:
                options["weight"] = options["weight"].to(self.device)

    def train_dataloader(self) -> Any:
        return self.data.train(self.current_epoch, self.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> Any:
        return self.data.valid(self.global_rank, self.trainer.world_size)

    def training_step(self, example: Example, _: int) -> Tensor:
        users = self._users(example)
        losses = self.network.tasks.heads.losses(users, example.targets)
        loss = self.weighting(losses, shared=[self.network.user[0].weight]) + self._novelty(users)
        if not torch.isfinite(loss):
            raise ValueError(f"loss: got {loss.item()} in epoch {self.current_epoch}; lower train.learning_rate")
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=1, sync_dist=True)
        return loss

    def validation_step(self, example: Example, _: int) -> None:
        users = self._users(example)
        losses = self.network.tasks.heads.losses(users, example.targets)
        logits = self.network.logits(users)
        self._judges["losses"].update(losses)
        for task in AREAS:
            if task in self._judges:
                # Of the newest window.
                truth, scores = example.targets[task][:, -1], logits[task][:, -1].float()
                known = ~truth.isnan() if truth.ndim == 1 else ~truth.isnan().any(1)
                self._judges[task].update(scores.reshape(truth.shape), truth.nan_to_num(), known)

    def on_validation_epoch_end(self) -> None:
        found = {name: judge.compute() for name, judge in self._judges.items()}
        # A task that nobody kept apart has a label of adds nothing.
        losses = {task: 0.0 if np.isnan(loss) else loss for task, loss in found.pop("losses").items()}
        self.log("valid_loss", sum(self.weights[task] * loss for task, loss in losses.items()), prog_bar=True)
        for task, loss in losses.items():
            self.log(f"valid_loss_{task}", loss)
        # Stepped here and not by lightning, which would do so after it saves, and lose the step when resumed.
        assert self._schedule is not None
        self._schedule.step(losses[next(iter(self.weights))])
        self.weighting.end_epoch()
        for task, area in found.items():
            if not np.isnan(area["macro"]):
                self.log(f"valid_auroc_{task}", area["macro"], prog_bar=True)
        for judge in self._judges.values():
            judge.reset()

    def configure_optimizers(self) -> Any:
        # Id tables are not decayed: a rare id has no gradient in most batches, and decay alone would wipe it out.
        tables = {id(p) for m in self.network.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if id(p) not in tables and p.ndim > 1]},
            {"params": [p for p in self.parameters() if id(p) in tables or p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay)
        self._schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, factor=0.5, patience=self.settings.lr_patience
        )
        self._schedule.load_state_dict(self._schedule_state)
        return optimiser

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._schedule_state = checkpoint["schedule"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        assert self._schedule is not None
        checkpoint["schedule"] = self._schedule.state_dict()

    def _users(self, example: Example) -> Tensor:
        return self.network(example.sequences, example.cutoffs)

    def _novelty(self, users: Tensor) -> Tensor:
        """Mean popularity of the categories and skus that are predicted for the users of all processes, weighed."""
        if not self.settings.novelty_weight or not self.popularity:
            return users.new_zeros(())
        users = users.flatten(0, 1)
        logits, rows = self.network.logits(users), all_reduce_sum(torch.tensor(float(len(users)), device=users.device))
        total = sum(
            novelty_loss(logits[task], popularity.to(users.device), reduction="sum")
            for task, popularity in self.popularity.items()
        )
        return self.settings.novelty_weight * self.trainer.world_size / rows * total


def _binary_loss(config: TrainConfig, rate: float) -> dict[str, Any]:
    """Options of the loss of labels that are 1 at this rate."""
    if config.loss == "bce":
        return {}
    alpha = config.focal_alpha if rate <= 0.5 else 1 - config.focal_alpha
    return {"gamma": config.focal_gamma, "alpha": alpha}


def _churn_rate(labels: Sequence[Labels]) -> float:
    values = np.concatenate([one.churn for one in labels]) if labels else np.zeros(0)
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0


def _start_from_base_rates(heads: MultiTaskHeads, labels: Sequence[Labels]) -> None:
    """Set the heads' biases, so that the first epoch need not spend its gradient on them."""
    for task in heads.names:
        out: Any = heads.head(task).out
        if task == "churn":
            rates = np.asarray([_churn_rate(labels)], np.float32)
        elif task == "category_propensity":
            asked = max(sum(one.asked.sum() for one in labels), 1)
            rates = np.asarray(sum(one.category.sum(0) for one in labels) / asked, np.float32)
        else:
            continue
        out.bias.data[:] = torch.logit(torch.from_numpy(rates).clamp(1e-5, 1 - 1e-5))
    prices = torch.from_numpy(np.concatenate([one.price for one in labels]))
    if "price" in heads.names:
        heads.fit_transforms({"price": prices})


def _ids(prepared: Prepared, family: str, values: np.ndarray) -> list[int]:
    return prepared.store.vocabulary(prepared.families[family]).encode(values).tolist()


def _check(labels: list[Labels], weights: dict[str, float]) -> None:
    """Raise ValueError for the first task without a label."""
    newest = labels[-1]
    has = {
        "churn": not np.isnan(newest.churn).all(),
        "category_propensity": newest.category.shape[1] > 0,
        "product_propensity": any(one.item.any() for one in labels),
        "price": any(not np.isnan(one.price).all() for one in labels),
        "name": any(one.name.shape[1] and not np.isnan(one.name).all() for one in labels),
    }
    why = {
        "churn": "no user asked for is active; see log.active_events",
        "category_propensity": "the log has no category",
    }
    for task in weights:
        if not has[task]:
            reason = why.get(task, "no outcome before valid_start has one")
            raise ValueError(f"task {task}: {reason}; leave the task out of task_weights")


def _plot(run_dir: Path) -> None:
    epochs = read_json(run_dir / "epochs.json")
    x = [int(number) + 1 for number in epochs]
    series = {
        name.replace("_", " "): (x, [values.get(name) for values in epochs.values()])
        for name in ("train_loss", "valid_loss")
    }
    path, height = run_dir / "plots" / "loss.png", "weighted loss, nats a user"
    lines(path, series, "Loss over the epochs", x="epoch", y=height, whole=True, marker="o")
