"""Training with lightning that can be interrupted at any moment and goes on to the same weights.

RUN/checkpoints/best.ckpt, last.ckpt           each with its SHA-256 beside it; data, never code
    checkpoints/finished.json                  what was trained to the end
    epochs.json                                what every finished epoch measured
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from runkit.files import atomic_file, file_hash, read_json, write_json

LOGGERS = ("csv", "tensorboard", "mlflow")


class ResumableModule(L.LightningModule):
    """A module whose epochs depend on the seed and their number only, and whose checkpoints say what they are of.

    A subclass that overrides one of the hooks calls it. State beyond weights and optimisers belongs into
    ``on_save_checkpoint``. Batches must be a function of seed and epoch too: give the `epoch_order` of the rows to the
    loader that ``train_dataloader`` returns, as its sampler.

    Args:
        seed: of everything drawn while training
        spec: what a run that is resumed may not change, as JSON can say it
    """

    def __init__(self, seed: int, spec: dict[str, Any]) -> None:
        super().__init__()
        self.seed, self.spec = seed, spec

    def epoch_order(self, rows: int) -> list[int]:
        """Return the places of all rows in an order drawn from the seed and the epoch; every process has the same."""
        drawn = torch.Generator().manual_seed(self.seed * 1000 + self.current_epoch)
        return torch.randperm(rows, generator=drawn).tolist()

    def on_train_epoch_start(self) -> None:
        # What is drawn inside an epoch is drawn again when it is resumed.
        torch.manual_seed((self.seed * 1000 + self.current_epoch) * 1000 + self.global_rank)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # A torch loader draws when it starts, and lightning starts it once more where nothing is resumed.
        if batch_idx == 0:
            ResumableModule.on_train_epoch_start(self)

    def on_validation_epoch_start(self) -> None:
        # The same every time, so that epochs can be compared.
        torch.manual_seed(self.seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["spec"] = self.spec

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same(checkpoint.get("spec", {}), self.spec)


def trainer(
    run_dir: str | Path,
    max_epochs: int,
    monitor: str = "valid_loss",
    patience: int | None = None,
    progress: bool = True,
    loggers: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    **flags: Any,
) -> L.Trainer:
    """Return a trainer that keeps the best and the last epoch and the history of all.

    Args:
        run_dir: the run directory
        max_epochs: epochs at most
        monitor: what is logged once an epoch and shall be low
        patience: epochs without a lower `monitor` before training stops; None = never
        progress: show a bar
        loggers: where lightning logs to, below ``<run_dir>/logs``: csv, tensorboard, mlflow
        callbacks: more of them
        flags: of `lightning.Trainer`; they go before what is chosen here

    Raises:
        ValueError: if a logger is not known
    """
    run_dir = Path(run_dir)
    folder = run_dir / "checkpoints"
    own: list[Callback] = [
        ModelCheckpoint(folder, filename="best", monitor=monitor, enable_version_counter=False),
        # save_last of the one above would follow the best epochs only, and a run resumed would lose the others.
        ModelCheckpoint(folder, filename="last", enable_version_counter=False),
    ]
    if patience is not None:
        own.append(EarlyStopping(monitor, patience=patience, check_finite=True))
    own += [History(run_dir / "epochs.json"), *callbacks]
    if progress:
        own.append(TQDMProgressBar(refresh_rate=5))
    chosen = {
        "accelerator": "auto",
        # With a sampler of lightning's own the rows would depend on the number of processes.
        "use_distributed_sampler": False,
        "reload_dataloaders_every_n_epochs": 1,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": progress,
    }
    with _quiet():
        return L.Trainer(
            max_epochs=max_epochs,
            logger=[_logger(name, run_dir / "logs") for name in loggers] or False,
            callbacks=own,
            plugins=[SafeCheckpoints(), *flags.pop("plugins", [])],
            **{**chosen, **flags},
        )


def fit(trainer: L.Trainer, module: ResumableModule, run_dir: str | Path, resume: bool = False, **data: Any) -> Path:
    """Train, or go on after the last finished epoch, and return the best epoch's checkpoint.

    Args:
        trainer: as `trainer` returns it
        module: what is trained
        run_dir: the run directory
        resume: go on; what is finished stays as it is
        data: loaders, as `lightning.Trainer.fit` takes them

    Raises:
        KeyboardInterrupt: if it was interrupted
        ValueError: if a run that is resumed was started with another `spec`, or its checkpoint is damaged
        FileExistsError: if a checkpoint in the way was not written here
    """
    folder = Path(run_dir) / "checkpoints"
    best, last, finished = folder / "best.ckpt", folder / "last.ckpt", folder / "finished.json"
    resume = resume and last.exists()
    done = read_json(finished)
    if resume and done.get("max_epochs") == trainer.max_epochs:
        check_same(done["spec"], module.spec)
        return best
    if trainer.is_global_zero:
        for path in (best, last):
            if path.exists() and not _hash_file(path).exists():
                raise FileExistsError(f"{path}: was not written here, needs to be moved away")
            if not resume:
                SafeCheckpoints().remove_checkpoint(path)
        if not resume:
            (Path(run_dir) / "epochs.json").unlink(missing_ok=True)
        finished.unlink(missing_ok=True)
    with _quiet(), _interrupts(trainer):
        trainer.fit(module, ckpt_path=str(last) if resume else None, **data)
    if trainer.is_global_zero:
        end = {"max_epochs": trainer.max_epochs, "epochs": trainer.current_epoch, "spec": module.spec}
        write_json(finished, end)
    return best


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return what a checkpoint holds: tensors and plain values, never code.

    Raises:
        FileNotFoundError: if it, or the hash beside it, is missing
        ValueError: if it is damaged, or holds anything else
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found, needs a checkpoint")
    if not _hash_file(path).exists():
        raise FileNotFoundError(f"{_hash_file(path)}: not found, needs to lie beside the checkpoint")
    if file_hash(path) not in _hash_file(path).read_text("utf-8", "replace").split():
        raise ValueError(f"{path}: damaged, needs the bytes that {_hash_file(path).name} was made of")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: got {reason}, needs a checkpoint of tensors and plain values") from None


def save_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint whole or not at all, and its SHA-256 beside it."""
    path, names = Path(path), _hash_file(Path(path))
    before = names.read_text("utf-8").split() if names.exists() else []
    with atomic_file(path) as name:
        torch.save(content, name)
        total = file_hash(name)
        # The hash of what stands there stays until that is replaced: a kill in between leaves a pair that fits.
        _write_lines(names, [total, *before])
    _write_lines(names, [total])


class SafeCheckpoints(CheckpointIO):
    """Lightning's checkpoints by `save_checkpoint` and `load_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return load_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        _hash_file(Path(path)).unlink(missing_ok=True)


class History(Callback):
    """Keep what every finished epoch logged, and its learning rate, in a JSON file.

    Args:
        path: the file
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = read_json(self.path)
        values = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        values["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        write_json(self.path, epochs | {str(trainer.current_epoch): values})


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


def gather(value: Any) -> list[Any]:
    """Return the value of every process, in the order of their ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _logger(name: str, folder: Path) -> Logger:
    if name == "csv":
        return CSVLogger(folder, name="csv")
    if name == "tensorboard":
        return TensorBoardLogger(folder, name="tensorboard")
    if name == "mlflow":
        return MLFlowLogger(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"file:{folder / 'mlflow'}"))
    raise ValueError(f"loggers: got {name!r}, needs some of {', '.join(LOGGERS)}")


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with atomic_file(path) as name:
        name.write_text("\n".join(lines) + "\n", "utf-8")


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lightning's advice from the user's terminal."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch.utils.data")
        yield


@contextmanager
def _interrupts(trainer: L.Trainer) -> Iterator[None]:
    """Let an interrupt leave as KeyboardInterrupt: lightning exits with 1 and ignores every further one."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)
    if trainer.interrupted:
        raise KeyboardInterrupt
