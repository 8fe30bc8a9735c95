"""Train the network with lightning: labels of the train window and earlier ones only, resumable to the same weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import timezone
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from torch import Tensor
from torch.nn import functional as F

from seqdata import View
from ubt.config import TASKS, Config, ModelConfig
from ubt.data import Example, Reader, examples
from ubt.labels import Labels, earlier_labels, window_labels
from ubt.metrics import auroc, macro_auroc
from ubt.model import Task, UniversalBehavioralTransformer
from ubt.plots import plot_losses
from ubt.prepare import Prepared
from ubt.rundir import read_json, write_json


def train(prepared: Prepared, config: Config) -> Path:
    """Train on the users' events before train_start and return the checkpoint of the best epoch.

    A share of the users is kept apart: their labels of the train window decide about learning rate and stopping.
    Outcomes of the scored window are not read. With `config.resume` a run continues from its last finished epoch;
    all randomness is a function of the seed and the epoch, so the weights are those of an uninterrupted run.

    Raises:
        ValueError: if a task is unknown, has no label, or the loss is not finite
    """
    settings, folder = config.train, Path(config.run_dir) / "checkpoints"
    weights = parse_task_weights(settings.task_weights)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    reader = Reader(prepared, config.model.max_ids)
    labels = [window_labels(prepared, "train"), *earlier_labels(prepared, settings.cutoffs - 1, settings.span)][::-1]
    _check_labels(labels, weights)
    L.seed_everything(config.seed, verbose=False)
    module = UBTModule(reader, labels, config, weights)
    last, finished = folder / "last.ckpt", folder / "finished.json"
    resume_from = str(last) if config.resume and last.exists() else None
    if resume_from is None:
        for old in folder.glob("*.ckpt"):
            old.unlink()
        (folder.parent / "epochs.json").unlink(missing_ok=True)
    elif read_json(finished).get("num_epochs") == settings.num_epochs:
        return folder / "best.ckpt"
    finished.unlink(missing_ok=True)
    callbacks: list[Callback] = [
        ModelCheckpoint(folder, filename="best", monitor="valid_loss", enable_version_counter=False),
        # save_last of the one above would follow the best epochs only, and a run resumed would lose the others.
        ModelCheckpoint(folder, filename="last", enable_version_counter=False),
        EarlyStopping("valid_loss", patience=settings.patience, check_finite=True),
        History(folder.parent),
    ]
    if config.progress:
        callbacks.append(TQDMProgressBar(refresh_rate=5))
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch.utils.data")
        trainer = L.Trainer(
            max_epochs=settings.num_epochs,
            accelerator="auto",
            devices=1,
            gradient_clip_val=settings.gradient_clip,
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=config.progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
        )
        trainer.fit(module, ckpt_path=resume_from, weights_only=False)
    if trainer.interrupted:
        raise KeyboardInterrupt
    write_json(finished, {"num_epochs": settings.num_epochs, "epochs": trainer.current_epoch})
    plot_losses(folder.parent)
    return folder / "best.ckpt"


def parse_task_weights(text: str) -> dict[str, float]:
    """Return the weight of each task named in "task:weight,task:weight".

    Raises:
        ValueError: if a task is unknown or named twice, or a weight is no positive number
    """
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        task, _, number = part.partition(":")
        if task not in TASKS:
            raise ValueError(f"task_weights: unknown task {task!r} in {text!r}, needs some of {', '.join(TASKS)}")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if task in weights or not 0 < weight < float("inf"):
            raise ValueError(f"task_weights: got {part!r} in {text!r}, needs each task once with a positive number")
        weights[task] = weight
    if not weights:
        raise ValueError(f"task_weights: got {text!r}, needs at least one of {', '.join(TASKS)}")
    return weights


def tasks_of(prepared: Prepared, names: Iterable[str]) -> dict[str, Task]:
    """Return what the head of each named task predicts on this log."""
    tasks = {"churn": Task(1)}
    if len(prepared.categories):
        ids = prepared.store.vocabulary(prepared.families["category"]).encode(prepared.categories)
        tasks["category_propensity"] = Task(len(prepared.categories), "category", [int(number) for number in ids])
    return {name: tasks[name] for name in names}


def load(checkpoint: str | Path, prepared: Prepared) -> tuple[UniversalBehavioralTransformer, Reader]:
    """Return the network of a checkpoint in evaluation mode, and the reader that feeds it.

    Raises:
        FileNotFoundError: if there is none; names the command that helps
        ValueError: if it was trained on another prepared log
    """
    help = "run `ubt train` with the same --config and --run-dir first"
    if not Path(checkpoint).exists():
        raise FileNotFoundError(f"{checkpoint}: no trained model; {help}")
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    spec = state["network"]
    if spec["fingerprint"] != prepared.fingerprint:
        raise ValueError(f"{checkpoint}: was trained on another log than {prepared.folder} holds now; {help}")
    model = ModelConfig(**spec["model"])
    reader = Reader(prepared, model.max_ids)
    network = UniversalBehavioralTransformer(reader.families, tasks_of(prepared, spec["tasks"]), model)
    prefix = "network."
    weights = {name[len(prefix) :]: value for name, value in state["state_dict"].items() if name.startswith(prefix)}
    network.load_state_dict(weights)
    return network.eval(), reader


class UBTModule(L.LightningModule):
    """The network with its losses, optimiser and schedule."""

    cutoffs: Tensor

    def __init__(self, reader: Reader, labels: list[Labels], config: Config, weights: dict[str, float]):
        super().__init__()
        # Kept in every checkpoint: what is needed to load it, and what may not differ when it is resumed.
        self.spec = {"tasks": list(weights), "model": asdict(config.model), "fingerprint": reader.prepared.fingerprint}
        tasks = tasks_of(reader.prepared, weights)
        self.network = UniversalBehavioralTransformer(reader.families, tasks, config.model)
        # Start from the base rates, so that the first epoch need not spend its gradient on them.
        for task, bias in self.network.tasks.bias.items():
            bias.data[:] = _base_rate_logits(task, labels)
        self.settings, self.seed, self.weights = config.train, config.seed, weights
        self.data = UserBatches(reader, labels, config)
        self.register_buffer("cutoffs", self.data.cutoffs, persistent=False)
        self._valid: list[tuple[dict[str, Tensor], Example]] = []
        self._schedule: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        self._schedule_state: dict[str, Any] = {}

    def train_dataloader(self) -> Any:
        return self.data.train(self.current_epoch)

    def val_dataloader(self) -> Any:
        return self.data.valid()

    def on_train_epoch_start(self) -> None:
        # The only source of randomness inside an epoch is dropout: an epoch resumed is the epoch that would have been.
        torch.manual_seed(self.seed * 1000 + self.current_epoch)

    def training_step(self, example: Example, _: int) -> Tensor:
        losses = self._losses(self._logits(example), example)
        loss = self._total(losses)
        if not torch.isfinite(loss):
            raise ValueError(f"loss: got {loss.item()} in epoch {self.current_epoch}; lower train.learning_rate")
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(example.churn))
        return loss

    def validation_step(self, example: Example, _: int) -> None:
        self._valid.append((self._logits(example), example))

    def on_validation_epoch_end(self) -> None:
        logits = {task: torch.cat([step[task] for step, _ in self._valid]) for task in self.weights}
        churn = torch.cat([example.churn for _, example in self._valid])
        category = torch.cat([example.category for _, example in self._valid])
        self._valid.clear()
        whole = Example(None, churn, category)  # type: ignore[arg-type]
        losses = self._losses(logits, whole)
        self.log("valid_loss", self._total(losses), prog_bar=True)
        for task, loss in losses.items():
            self.log(f"valid_loss_{task}", loss)
        # Stepped here and not by lightning, which would do so after it saves, and lose the step when resumed.
        assert self._schedule is not None
        self._schedule.step(losses[next(iter(self.weights))].item())
        for task, area in _areas(logits, whole).items():
            self.log(f"valid_auroc_{task}", area, prog_bar=True)

    def configure_optimizers(self) -> Any:
        # Id tables are not decayed: a rare id has no gradient in most batches, and decay alone would wipe it out.
        tables = {id(p) for m in self.network.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.network.parameters() if id(p) not in tables and p.ndim > 1]},
            {"params": [p for p in self.network.parameters() if id(p) in tables or p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay)
        self._schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, factor=0.5, patience=self.settings.lr_patience
        )
        self._schedule.load_state_dict(self._schedule_state)
        return optimiser

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key, value in self.spec.items():
            if checkpoint["network"][key] != value:
                was = checkpoint["network"][key]
                raise ValueError(
                    f"resume: the run was started with {key} {was}, now it is {value}; start without --resume"
                )
        self._schedule_state = checkpoint["schedule"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self._schedule is not None
        checkpoint["network"], checkpoint["schedule"] = self.spec, self._schedule.state_dict()

    def _logits(self, example: Example) -> dict[str, Tensor]:
        cutoffs = self.cutoffs[-example.churn.shape[1] :]
        return self.network.logits(self.network(example.sequences, cutoffs))

    def _losses(self, logits: dict[str, Tensor], example: Example) -> dict[str, Tensor]:
        """Return the mean binary cross-entropy of each task over the labels that exist."""
        losses = {}
        if "churn" in logits:
            losses["churn"] = _masked_bce(logits["churn"][..., 0], example.churn, 1.0)
        if "category_propensity" in logits:
            # Summed over the labels of a user, which are rare: a mean over them would drown in negatives.
            width = example.category.shape[-1]
            losses["category_propensity"] = _masked_bce(logits["category_propensity"], example.category, width)
        return losses

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        return sum((self.weights[task] * loss for task, loss in losses.items()), torch.zeros((), device=self.device))


class UserBatches:
    """Shuffled batches of the training users, ordered ones of the users kept apart."""

    def __init__(self, reader: Reader, labels: list[Labels], config: Config):
        self.reader, self.labels, self.config = reader, labels, config
        prepared = reader.prepared
        users = np.random.default_rng([config.seed, 7]).permutation(prepared.known)
        number = max(1, round(len(users) * config.train.valid_share))
        valid, rest = np.sort(users[:number]), np.sort(users[number:])
        view = prepared.store.as_of(prepared.train_start)
        self.train_view, self.valid_view = view.select(prepared.users[rest]), view.select(prepared.users[valid])

    @property
    def cutoffs(self) -> Tensor:
        """Starts of the label windows, ascending, in seconds since 1970 [K]."""
        return torch.tensor([int(one.start.replace(tzinfo=timezone.utc).timestamp()) for one in self.labels])

    def train(self, epoch: int) -> _Batches:
        """Return the batches of one epoch, in an order drawn from the seed and the epoch."""
        return _Batches(self, self.train_view, self.labels, epoch)

    def valid(self) -> _Batches:
        """Return the users kept apart, with the labels of the train window."""
        return _Batches(self, self.valid_view, self.labels[-1:], None)


class _Batches:
    def __init__(self, data: UserBatches, view: View, labels: list[Labels], epoch: int | None):
        self.data, self.view, self.labels, self.epoch = data, view, labels, epoch
        self.size = data.config.train.batch_size

    def __len__(self) -> int:
        return -(-len(self.view) // self.size)

    def __iter__(self) -> Iterator[Example]:
        batches = self.view.batches(
            self.size,
            shuffle=self.epoch is not None,
            seed=self.data.config.seed,
            epoch=self.epoch or 0,
            fields=self.data.reader.fields,
            max_len=self.data.config.model.max_seq_length,
        )
        for batch in batches:
            yield examples(self.data.reader, batch, self.labels)


class History(Callback):
    """Keep the losses of every finished epoch in ``epochs.json``."""

    def __init__(self, folder: Path):
        self.path = folder / "epochs.json"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = read_json(self.path)
        values = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        values["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        epochs[str(trainer.current_epoch)] = values
        write_json(self.path, epochs)


def _masked_bce(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Mean over the labels that are not NaN, times `scale`; zero when there is none."""
    known = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return scale * (losses * known).sum() / known.sum().clamp(min=1)


def _areas(logits: dict[str, Tensor], example: Example) -> dict[str, float]:
    """Return the AUROC of every task for which the users kept apart have labels of both classes."""
    areas = {}
    for task, value in logits.items():
        score, truth = value[:, -1].float().cpu().numpy(), example.churn[:, -1:].cpu().numpy()
        if task != "churn":
            truth = example.category[:, -1].cpu().numpy()
        rows = ~np.isnan(truth).any(1)
        try:
            areas[task] = (
                auroc(truth[rows, 0], score[rows, 0]) if task == "churn" else macro_auroc(truth[rows], score[rows])
            ).value
        except ValueError:
            continue
    return areas


def _base_rate_logits(task: str, labels: list[Labels]) -> Tensor:
    if task == "churn":
        rates = np.nanmean(np.concatenate([one.churn for one in labels]), keepdims=True)
    else:
        rates = sum(one.category.sum(0) for one in labels) / max(sum(one.asked.sum() for one in labels), 1)
    return torch.logit(torch.from_numpy(np.asarray(rates, np.float32)).clamp(1e-5, 1 - 1e-5))


def _check_labels(labels: list[Labels], weights: dict[str, float]) -> None:
    newest = labels[-1]
    if "churn" in weights and np.isnan(newest.churn).all():
        raise ValueError("task churn: no user asked for is active; see log.active_events, or leave the task out")
    if "category_propensity" in weights and not newest.category.shape[1]:
        raise ValueError("task category_propensity: the log has no category; leave the task out of task_weights")
