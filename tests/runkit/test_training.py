"""Training goes on to the same weights, and a checkpoint is data that is whole."""

import os
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from runkit.files import read_json
from runkit.training import ResumableModule, fit, gather, load_checkpoint, save_checkpoint, trainer


class Line(ResumableModule):
    """A line with dropout, so that an epoch draws."""

    def __init__(self, rate: float = 0.1, stop: BaseException | None = None) -> None:
        super().__init__(seed=3, spec={"train": {"rate": rate}, "seed": 3})
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        self.rate, self.stop = rate, stop
        drawn = torch.Generator().manual_seed(1)
        self.rows = TensorDataset(torch.randn(24, 4, generator=drawn), torch.randn(24, 1, generator=drawn))
        self.orders: list[list[int]] = []

    def train_dataloader(self) -> DataLoader:
        self.orders.append(self.epoch_order(24))
        return DataLoader(self.rows, 8, sampler=self.orders[-1])

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, 24)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.stop is not None and self.current_epoch == 2 and index == 1:
            raise self.stop
        return self.layers(batch[0]).sub(batch[1]).square().mean()

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("valid_loss", self.layers(batch[0]).sub(batch[1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.rate)


def run(folder: Path, epochs: int = 4, resume: bool = False, **settings: Any) -> Path:
    flags = {"loggers": settings.pop("loggers", ()), "patience": settings.pop("patience", None)}
    one = trainer(folder, epochs, progress=False, accelerator="cpu", **flags)
    line = Line(**settings)
    best = fit(one, line, folder, resume)
    assert all(sorted(order) == list(range(24)) for order in line.orders)
    assert len(set(map(tuple, line.orders))) == len(line.orders)
    return best


def weights(folder: Path, name: str = "last") -> torch.Tensor:
    return load_checkpoint(folder / "checkpoints" / f"{name}.ckpt")["state_dict"]["layers.1.weight"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, loggers=["csv"]) == folder / "checkpoints" / "best.ckpt"
    return folder


def test_a_run_leaves_checkpoints_and_history(whole: Path) -> None:
    epochs = read_json(whole / "epochs.json")
    assert list(epochs) == ["0", "1", "2", "3"] and set(epochs["3"]) == {"valid_loss", "learning_rate"}
    losses = {number: values["valid_loss"] for number, values in epochs.items()}
    best = load_checkpoint(whole / "checkpoints" / "best.ckpt")
    assert str(best["epoch"]) == min(losses, key=lambda number: losses[number])
    assert best["spec"] == {"train": {"rate": 0.1}, "seed": 3}
    assert list((whole / "logs" / "csv").rglob("metrics.csv"))
    assert not [path for path in whole.rglob(".*")]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("boom")])
def test_an_interrupted_run_goes_on_to_the_same_weights(whole: Path, tmp_path: Path, stop: BaseException) -> None:
    with pytest.raises(type(stop)):
        run(tmp_path, stop=stop)
    assert set(read_json(tmp_path / "epochs.json")) == {"0", "1"}
    run(tmp_path, resume=True)
    for name in ("best", "last"):
        assert torch.equal(weights(tmp_path, name), weights(whole, name))
    assert read_json(tmp_path / "epochs.json") == read_json(whole / "epochs.json")
    assert read_json(tmp_path / "checkpoints" / "finished.json")["epochs"] == 4


def test_what_is_finished_is_kept_and_other_settings_are_refused(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, epochs=2)
    before = (tmp_path / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    run(tmp_path, epochs=2, resume=True)
    assert (tmp_path / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    for epochs in (2, 4):
        with pytest.raises(ValueError, match=r"resume: the run was started with train\.rate 0\.1, now it is 0\.2"):
            run(tmp_path, epochs=epochs, resume=True, rate=0.2)
    run(tmp_path, epochs=4, resume=True)
    assert torch.equal(weights(tmp_path), weights(whole))


def test_a_new_run_starts_anew_and_keeps_what_is_not_ours(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, epochs=1, rate=0.3)
    (tmp_path / "checkpoints" / "mine.ckpt").write_text("mine")
    run(tmp_path, epochs=4)
    assert torch.equal(weights(tmp_path), weights(whole))
    assert (tmp_path / "checkpoints" / "mine.ckpt").read_text() == "mine"
    (tmp_path / "checkpoints" / "best.ckpt.sha256").unlink()
    with pytest.raises(FileExistsError, match=r"best\.ckpt: was not written here"):
        run(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    run(tmp_path, epochs=1)
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": content[:-9], "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"last\.ckpt: damaged, needs the bytes"):
        run(tmp_path, resume=True)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil",)


def test_a_checkpoint_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint({"x": Evil()}, "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt: got .*, needs a checkpoint of tensors and plain values"):
        load_checkpoint("a.ckpt")
    assert not Path("evil").exists() and pickle.dumps(Evil())
    Path("b.ckpt").write_bytes(Path("a.ckpt").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"b\.ckpt\.sha256: not found, needs to lie beside"):
        load_checkpoint("b.ckpt")


def test_a_kill_while_saving_leaves_a_checkpoint_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "a.ckpt", os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)

    save_checkpoint({"x": 1}, path)
    monkeypatch.setattr(os, "replace", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint({"x": 2}, path)
        assert load_checkpoint(path) == {"x": 1}
    monkeypatch.setattr(os, "replace", replace)
    save_checkpoint({"x": 3}, path)
    assert load_checkpoint(path) == {"x": 3}


def test_loggers_that_are_not_known_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loggers: got 'paper', needs some of csv, tensorboard, mlflow"):
        trainer(tmp_path, 1, loggers=["paper"])
    assert isinstance(trainer(tmp_path, 1, gradient_clip_val=0.5, num_sanity_val_steps=1, progress=False), L.Trainer)
    assert gather(3) == [3]
