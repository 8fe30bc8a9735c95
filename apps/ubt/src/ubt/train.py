"""Train the network with lightning: labels of the train window and earlier ones only, resumable to the same weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from mtl_heads import WEIGHTINGS, MultiTaskHeads, TaskSpec, parse_task_weights
from mtl_heads.distributed import all_reduce_sum
from mtl_heads.losses import class_balanced_weights, novelty_loss
from seqdata import View
from seqdata.view import Gather
from ubt.config import TASKS, Config, ModelConfig, TrainConfig
from ubt.config import WEIGHTINGS as WEIGHTING_NAMES
from ubt.data import Example, Reader, examples
from ubt.labels import Labels, earlier_labels, window_labels
from ubt.metrics import auroc, macro_auroc
from ubt.model import UniversalBehavioralTransformer
from ubt.plots import plot_losses
from ubt.prepare import Prepared
from ubt.rundir import read_json, write_json

KINDS = {
    "churn": "binary",
    "category_propensity": "multilabel",
    "product_propensity": "retrieval",
    "price": "regression",
    "name": "vector",
}
# Tasks whose ranking of the users kept apart is reported.
# What a run that is resumed may change: how long it goes on, and what it runs on. Weights are compared as numbers.
FREE = ("num_epochs", "patience", "threads", "processes", "task_weights")
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
    settings, folder = config.train, Path(config.run_dir) / "checkpoints"
    weights = _task_weights(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    reader = Reader(prepared, config.model.max_ids)
    if settings.hold_out_newest and settings.cutoffs < 2:
        raise ValueError(f"train.hold_out_newest: needs train.cutoffs of 2 or more, got {settings.cutoffs}")
    labels = [window_labels(prepared, "train"), *earlier_labels(prepared, settings.cutoffs - 1, settings.span)][::-1]
    _check(labels[:-1] if settings.hold_out_newest else labels, weights, settings)
    L.seed_everything(config.seed, verbose=False)
    module = UBTModule(reader, labels, config, weights)
    views = {"train on": module.data.train_view, "keep apart": module.data.valid_view}
    for use, view in views.items():
        if not len(view):
            raise ValueError(
                f"train.valid_share: {settings.valid_share} of the {sum(map(len, views.values()))} relevant clients "
                f"with a history leaves nobody to {use}; needs another share, or more clients"
            )
    last, finished = folder / "last.ckpt", folder / "finished.json"
    resume_from = str(last) if config.resume and last.exists() else None
    if resume_from is not None and read_json(finished).get("num_epochs") == settings.num_epochs:
        check_same(read_json(finished)["spec"], module.spec)
        return folder / "best.ckpt"
    trainer = _trainer(config, folder)
    if trainer.is_global_zero:
        if resume_from is None:
            for old in folder.glob("*.ckpt"):
                old.unlink()
            (folder.parent / "epochs.json").unlink(missing_ok=True)
        finished.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch.utils.data")
        trainer.fit(module, ckpt_path=resume_from, weights_only=False)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        write_json(finished, {"num_epochs": settings.num_epochs, "epochs": trainer.current_epoch, "spec": module.spec})
        plot_losses(folder.parent)
    return folder / "best.ckpt"


def check_same(was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError where a run that is resumed has other settings than it was started with; names the first."""
    for key, value in now.items():
        old = was.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value != old:
            key, old, value = next(
                (f"{key}.{k}", old.get(k), value.get(k)) for k in {**old, **value} if old.get(k) != value.get(k)
            )
        if old != value:
            raise ValueError(f"resume: the run was started with {key} {old}, now it is {value}; start without --resume")


def _task_weights(settings: TrainConfig) -> dict[str, float]:
    """Return the weights of the tasks that are trained."""
    weights = {task: weight for task, weight in parse_task_weights(settings.task_weights, TASKS).items() if weight > 0}
    if not weights:
        raise ValueError(f"task_weights: got {settings.task_weights!r}, needs at least one above 0")
    return weights


def _trainer(config: Config, folder: Path) -> L.Trainer:
    callbacks: list[Callback] = [
        ModelCheckpoint(folder, filename="best", monitor="valid_loss", enable_version_counter=False),
        # save_last of the one above would follow the best epochs only, and a run resumed would lose the others.
        ModelCheckpoint(folder, filename="last", enable_version_counter=False),
        EarlyStopping("valid_loss", patience=config.train.patience, check_finite=True),
        History(folder.parent),
    ]
    if config.progress:
        callbacks.append(TQDMProgressBar(refresh_rate=5))
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch.utils.data")
        return L.Trainer(
            max_epochs=config.train.num_epochs,
            accelerator="auto",
            devices=config.train.processes,
            # Every weight has a gradient, also where a share of a small last batch holds nobody.
            strategy="ddp" if config.train.processes > 1 else "auto",
            precision="bf16-mixed" if config.train.precision == "bf16" else "32-true",
            gradient_clip_val=config.train.gradient_clip,
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=config.progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
        )


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
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    spec = state["network"]
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


class UBTModule(L.LightningModule):
    """The network with its losses, optimiser and schedule."""

    def __init__(self, reader: Reader, labels: list[Labels], config: Config, weights: dict[str, float]):
        super().__init__()
        # Kept in every checkpoint: what is needed to load it, and what may not differ when it is resumed.
        settings = {key: value for key, value in asdict(config.train).items() if key not in FREE}
        self.spec = {
            "tasks": list(weights),
            "weights": weights,
            "model": asdict(config.model),
            "train": settings,
            "seed": config.seed,
            "fingerprint": reader.prepared.fingerprint,
        }
        self.data = UserBatches(reader, labels, config)
        labels = self.data.train_labels
        tasks, values = tasks_of(reader, weights, config.model, config.train, labels)
        self.network = UniversalBehavioralTransformer(reader.families, tasks, values, config.model)
        self.weighting = WEIGHTINGS[config.train.weighting](list(weights), static=weights)
        _start_from_base_rates(self.network.tasks.heads, labels)
        self.settings, self.seed, self.weights = config.train, config.seed, weights
        self.popularity = {
            task: torch.from_numpy(reader.prepared.targets[what].popularity)
            for task, what in (("category_propensity", "category"), ("product_propensity", "sku"))
            if task in weights and reader.prepared.targets[what].popularity.any()
        }
        self._sums: list[Tensor] = []
        self._judged: list[dict[str, tuple[Tensor, Tensor]]] = []
        self._schedule: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        self._schedule_state: dict[str, Any] = {}

    def on_fit_start(self) -> None:
        for task in self.weights:
            options = self.network.tasks.heads.head(task).options
            if "weight" in options:
                options["weight"] = options["weight"].to(self.device)

    def train_dataloader(self) -> Any:
        return self.data.train(self.current_epoch, self.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> Any:
        return self.data.valid(self.global_rank, self.trainer.world_size)

    def on_train_epoch_start(self) -> None:
        # Dropout and negatives are all the randomness inside an epoch: one that is resumed draws the same again.
        torch.manual_seed((self.seed * 1000 + self.current_epoch) * 1000 + self.global_rank)

    def training_step(self, example: Example, _: int) -> Tensor:
        users = self._users(example)
        losses = self.network.tasks.heads.losses(users, example.targets)
        loss = self.weighting(losses, shared=[self.network.user[0].weight]) + self._novelty(users)
        if not torch.isfinite(loss):
            raise ValueError(f"loss: got {loss.item()} in epoch {self.current_epoch}; lower train.learning_rate")
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=1, sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        # The same negatives every time, so that epochs can be compared.
        torch.manual_seed(self.seed)

    def validation_step(self, example: Example, _: int) -> None:
        users = self._users(example)
        losses = self.network.tasks.heads.losses(users, example.targets)
        logits = self.network.logits(users)
        self._sums.append(torch.stack([losses.values.float() * losses.counts, losses.counts]).cpu())
        self._judged.append({task: (example.targets[task], logits[task].float()) for task in AREAS if task in logits})

    def on_validation_epoch_end(self) -> None:
        values, counts = _gather(torch.stack(self._sums).sum(0)).sum(0)
        losses = dict(zip(self.weights, (values / counts.clamp(min=1)).tolist(), strict=True))
        self.log("valid_loss", sum(self.weights[task] * loss for task, loss in losses.items()), prog_bar=True)
        for task, loss in losses.items():
            self.log(f"valid_loss_{task}", loss)
        # Stepped here and not by lightning, which would do so after it saves, and lose the step when resumed.
        assert self._schedule is not None
        self._schedule.step(losses[next(iter(self.weights))])
        self.weighting.end_epoch()
        for task, area in _areas(self._judged).items():
            self.log(f"valid_auroc_{task}", area, prog_bar=True)
        self._sums.clear()
        self._judged.clear()

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
        check_same(checkpoint["network"], self.spec)
        self._schedule_state = checkpoint["schedule"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self._schedule is not None
        checkpoint["network"], checkpoint["schedule"] = self.spec, self._schedule.state_dict()

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


class UserBatches:
    """Shuffled batches of the training users, ordered ones of the users kept apart.

    Several processes share every batch: process r reads the rows r, r + processes, ... of it. So they train on the same
    batches as one process would, nobody is left out or seen twice, and all of them take the same number of steps.
    """

    def __init__(self, reader: Reader, labels: list[Labels], config: Config):
        self.reader, self.config = reader, config
        self.train_labels = labels[:-1] if config.train.hold_out_newest else labels
        self.valid_labels = labels[-1:]
        prepared = reader.prepared
        # Those whose first event comes later are in the store because of it, so they must not be among them.
        users = np.random.default_rng([config.seed, 7]).permutation(np.flatnonzero(prepared.seen(prepared.train_start)))
        number = max(1, round(len(users) * config.train.valid_share))
        valid, rest = np.sort(users[:number]), np.sort(users[number:])
        self.train_view = prepared.store.as_of(self.train_labels[-1].start).select(prepared.users[rest])
        self.valid_view = prepared.store.as_of(prepared.train_start).select(prepared.users[valid])

    def train(self, epoch: int, rank: int = 0, processes: int = 1) -> _Batches:
        """Return one process's share of the batches of an epoch, in an order drawn from the seed and the epoch."""
        return _Batches(self, self.train_view, self.train_labels, epoch, rank, processes)

    def valid(self, rank: int = 0, processes: int = 1) -> _Batches:
        """Return one process's share of the users kept apart, with the labels of the train window."""
        return _Batches(self, self.valid_view, self.valid_labels, None, rank, processes)


@dataclass
class _Batches:
    data: UserBatches
    view: View
    labels: list[Labels]
    epoch: int | None
    rank: int
    processes: int

    def __len__(self) -> int:
        return -(-len(self.view) // self.data.config.train.batch_size)

    def __iter__(self) -> Iterator[Example]:
        config = self.data.config
        tasks = list(_task_weights(config.train))
        gather = Gather(self.view.store, self.data.reader.fields)
        plan = self.view.plan(
            config.train.batch_size, shuffle=self.epoch is not None, seed=config.seed, epoch=self.epoch or 0
        )
        for rows in plan:
            batch = self.view.batch(rows[self.rank :: self.processes], gather, config.model.max_seq_length)
            yield examples(self.data.reader, batch, self.labels, tasks)


class History(Callback):
    """Keep the losses of every finished epoch in ``epochs.json``."""

    def __init__(self, folder: Path):
        self.path = folder / "epochs.json"

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = read_json(self.path)
        values = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        values["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        epochs[str(trainer.current_epoch)] = values
        write_json(self.path, epochs)


def _gather(value: Tensor) -> Tensor:
    """Return the value of every process [processes, ...]."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value[None]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value.cpu())
    return torch.stack(found)


def _areas(judged: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, float]:
    """Return the AUROC of every task for which the users kept apart have labels of both classes."""
    areas = {}
    everybody: list[Any] = [judged]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, judged)
    for task in judged[0]:
        pairs = [step[task] for mine in everybody for step in mine]
        truth, score = (torch.cat([pair[i][:, -1] for pair in pairs]).cpu().numpy() for i in (0, 1))
        truth = truth.reshape(len(truth), -1)
        rows = ~np.isnan(truth).any(1)
        try:
            if task == "churn":
                areas[task] = auroc(truth[rows, 0], score[rows, 0]).value
            else:
                areas[task] = macro_auroc(truth[rows], score[rows]).value
        except ValueError:
            continue
    return areas


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


def _check(labels: list[Labels], weights: dict[str, float], settings: TrainConfig) -> None:
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
    for name, known in (("weighting", WEIGHTING_NAMES), ("loss", ("focal", "bce")), ("precision", ("32", "bf16"))):
        if str(getattr(settings, name)) not in known:
            raise ValueError(f"train.{name}: got {getattr(settings, name)!r}, needs one of {', '.join(known)}")
