"""Training can be interrupted and resumed without a trace; the seed decides the rest."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import timezone
from pathlib import Path
from typing import get_args, get_type_hints

import lightning as L
import numpy as np
import pytest
import torch
import yaml

from mtl_heads import UniformSampler
from runkit.training import load_checkpoint
from seqdata import Batch
from ubt.batches import Reader, UserBatches
from ubt.config import TASKS, Config, TrainConfig
from ubt.encoder import Sequences
from ubt.labels import earlier_labels, window_labels
from ubt.prepare import Prepared
from ubt.train import UBTModule, _task_weights, train

WEIGHTINGS = get_args(get_type_hints(TrainConfig)["weighting"])
ALL_TASKS = "churn:1.0,category_propensity:0.5,product_propensity:0.5,price:1.0,name:0.3"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoint)["state_dict"]


def epochs(config: Config, number: int) -> Config:
    return replace(config, train=replace(config.train, num_epochs=number, patience=10))


class Killed(RuntimeError):
    pass


def test_a_run_killed_inside_an_epoch_and_resumed_ends_with_the_same_weights(
    prepared: Prepared, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Steep, so that the validation loss rises and the learning rate falls: the schedule must be resumed as well.
    settings = replace(tiny.train, lr_patience=0, learning_rate=0.02, task_weights=ALL_TASKS, weighting="dwa")
    tiny = replace(tiny, train=settings)
    whole = epochs(replace(tiny, run_dir=tiny.run_dir + "-whole"), 4)
    train(prepared, whole)
    parts = epochs(tiny, 4)
    step = UBTModule.training_step

    def dies(self: UBTModule, example: object, index: int) -> torch.Tensor:
        if self.current_epoch == 1 and index == 3:
            raise Killed
        return step(self, example, index)

    monkeypatch.setattr(UBTModule, "training_step", dies)
    with pytest.raises(Killed):
        train(prepared, parts)
    monkeypatch.undo()
    # Whatever the process drew meanwhile must not matter.
    torch.rand(17)
    train(prepared, replace(parts, resume=True))
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (weights(Path(run.run_dir) / "checkpoints" / name) for run in (whole, parts))
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), (name, key)
    histories = [json.loads((Path(run.run_dir) / "epochs.json").read_text()) for run in (whole, parts)]
    assert histories[0] == histories[1] and len(histories[0]) == 4


def test_a_finished_run_is_not_trained_again_but_goes_on_when_asked_for_more(
    prepared: Prepared, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(prepared, epochs(tiny, 1))
    more = Path(train(prepared, replace(epochs(tiny, 2), resume=True)))
    whole = train(prepared, epochs(replace(tiny, run_dir=tiny.run_dir + "-whole"), 2))
    for key, value in weights(whole.with_name("last.ckpt")).items():
        assert torch.equal(value, weights(more.with_name("last.ckpt"))[key]), key
    monkeypatch.setattr(L.Trainer, "fit", lambda *a, **k: pytest.fail("trained again"))
    train(prepared, replace(epochs(tiny, 2), resume=True))


def test_a_resumed_run_keeps_its_sizes(prepared: Prepared, tiny: Config) -> None:
    train(prepared, epochs(tiny, 1))
    other = replace(epochs(tiny, 2), resume=True, model=replace(tiny.model, hidden_size=8))
    with pytest.raises(ValueError, match="resume: the run was started with model"):
        train(prepared, other)


def trained(prepared: Prepared, config: Config, **settings: object) -> dict[str, torch.Tensor]:
    config = replace(config, train=replace(config.train, **({"num_epochs": 1} | settings)))
    return weights(train(prepared, config))


@pytest.mark.parametrize("task", TASKS)
def test_tasks_can_be_trained_alone(prepared: Prepared, tiny: Config, task: str) -> None:
    names = trained(prepared, tiny, task_weights=f"{task}:2, churn:0" if task != "churn" else "churn:2", cutoffs=1)
    assert {name.split("heads.heads.")[1].split(".")[0] for name in names if "heads.heads." in name} == {task}
    epoch = json.loads((Path(tiny.run_dir) / "epochs.json").read_text())["0"]
    assert epoch["valid_loss"] == pytest.approx(2 * epoch[f"valid_loss_{task}"], rel=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_five_tasks_train_together_with_every_weighting(prepared: Prepared, tiny: Config, weighting: str) -> None:
    state = trained(prepared, tiny, task_weights=ALL_TASKS, weighting=weighting, num_epochs=3, patience=10)
    epochs = json.loads((Path(tiny.run_dir) / "epochs.json").read_text())
    assert {name for name in epochs["0"] if name.startswith("valid_loss_")} == {f"valid_loss_{task}" for task in TASKS}
    assert epochs["2"]["train_loss"] != epochs["0"]["train_loss"]
    if weighting == "uncertainty":
        assert state["weighting.log_variance"].abs().min() > 0
    if weighting == "gradnorm":
        assert (state["weighting.weights"] - 1).abs().max() > 0


@pytest.mark.parametrize("task", TASKS)
def test_every_task_learns(prepared: Prepared, tiny: Config, task: str) -> None:
    trained(prepared, tiny, task_weights=f"{task}:1", learning_rate=5e-3, num_epochs=4, patience=10)
    epochs = json.loads((Path(tiny.run_dir) / "epochs.json").read_text())
    assert epochs["3"]["train_loss"] < epochs["0"]["train_loss"]


@pytest.mark.parametrize("change", [{"loss": "bce"}, {"balance": 0.0}, {"novelty_weight": 0.5}, {"num_negatives": 7}])
def test_every_setting_of_the_losses_changes_the_weights(prepared: Prepared, tiny: Config, change: dict) -> None:
    tiny = replace(tiny, train=replace(tiny.train, task_weights=ALL_TASKS))
    one = trained(prepared, tiny)
    other = trained(prepared, replace(tiny, run_dir=tiny.run_dir + "-other"), **change)
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_negatives_are_drawn_anew_for_every_batch(
    prepared: Prepared, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    sample = UniformSampler.sample

    def watched(self: UniformSampler, *args: object) -> torch.Tensor:
        drawn.append(sample(self, *args))
        return drawn[-1]

    monkeypatch.setattr(UniformSampler, "sample", watched)
    trained(prepared, tiny, task_weights="product_propensity:1", valid_share=0.01)
    assert len(drawn) > 5 and all(len(items) == 400 for items in drawn)
    assert len({tuple(items.tolist()) for items in drawn[:-1]}) == len(drawn) - 1
    assert torch.cat(drawn).min() >= 2


def test_losing_the_name_vectors_changes_the_name_task(
    prepared: Prepared, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name_loss(run: str) -> float:
        config = replace(tiny, run_dir=tiny.run_dir + run)
        trained(prepared, config, task_weights="name:1", learning_rate=5e-3, num_epochs=4, patience=10)
        epochs = json.loads((Path(config.run_dir) / "epochs.json").read_text())
        return min(values["valid_loss_name"] for values in epochs.values())

    with_names = name_loss("-with")
    sequences = Reader.sequences

    def without_names(self: Reader, batch: Batch) -> Sequences:
        found = sequences(self, batch)
        found.features["name"].zero_()
        return found

    monkeypatch.setattr(Reader, "sequences", without_names)
    assert with_names != pytest.approx(name_loss("-without"), rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("churn:1.0,foo:2", "unknown task 'foo'"),
        ("churn", "got 'churn'"),
        ("churn:-1", "got '-1'"),
        ("churn:1,churn:2", "'churn' appears twice"),
        ("", "must look like"),
        ("churn:0", "at least one above 0"),
    ],
)
def test_task_weights_that_make_no_sense_are_refused(prepared: Prepared, tiny: Config, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(prepared, tiny, task_weights=text)


def test_the_newest_labels_can_be_held_out(prepared: Prepared, tiny: Config) -> None:
    config = replace(tiny, train=replace(tiny.train, hold_out_newest=True))
    labels = [window_labels(prepared, "train"), *earlier_labels(prepared, 2, 2)][::-1]
    data = UserBatches(Reader(prepared, 500), labels, config, ["churn"])
    starts = [int(one.start.replace(tzinfo=timezone.utc).timestamp()) for one in labels]
    for example in data.train(0):
        assert example.cutoffs.tolist() == starts[:2] and example.targets["churn"].shape[1] == 2
        assert (example.sequences.timestamps < starts[1]).all()
    for example in data.valid():
        assert example.cutoffs.tolist() == starts[2:]
    trained(prepared, config)
    with pytest.raises(ValueError, match="hold_out_newest: needs train"):
        trained(prepared, config, cutoffs=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("num_epochs", 0), ("cutoffs", 0), ("num_negatives", 0), ("patience", 0), ("valid_share", 1.0),
     ("gradient_clip", -1.0), ("focal_alpha", 2.0), ("learning_rate", 0.0)],
)  # fmt: skip
def test_settings_without_sense_are_refused(prepared: Prepared, tiny: Config, name: str, value: float) -> None:
    setattr(tiny.train, name, value)
    with pytest.raises(ValueError, match=f"train.{name}: got"):
        train(prepared, tiny)


def test_a_run_goes_on_with_the_settings_it_was_started_with(prepared: Prepared, tiny: Config) -> None:
    train(prepared, tiny)
    tiny.resume = True
    train(prepared, tiny)
    for section, name, value in (
        (tiny.train, "learning_rate", 0.5),
        (tiny, "seed", 7),
        (tiny.model, "hidden_size", 24),
    ):
        before = getattr(section, name)
        for epochs in (tiny.train.num_epochs, tiny.train.num_epochs + 1):
            tiny.train.num_epochs, kept = epochs, tiny.train.num_epochs
            setattr(section, name, value)
            with pytest.raises(ValueError, match=f"resume: the run was started with .*{name} {before}"):
                train(prepared, tiny)
            setattr(section, name, before)
            tiny.train.num_epochs = kept


@pytest.mark.parametrize("name", ["weighting", "loss", "precision"])
def test_choices_that_do_not_exist_are_named(prepared: Prepared, tiny: Config, name: str) -> None:
    with pytest.raises(ValueError, match=rf"train.{name}: got 'foo', needs one of"):
        trained(prepared, tiny, **{name: "foo"})


def test_nobody_left_to_train_on_is_named(prepared: Prepared, tiny: Config) -> None:
    with pytest.raises(ValueError, match=r"train.valid_share: 0.9999 of the .* leaves nobody to train on"):
        trained(prepared, tiny, valid_share=0.9999)
    alone = replace(prepared, users=prepared.users[:1], known=prepared.known[:1])
    alone = replace(alone, active=np.ones(1, bool), asked=np.ones(1, bool))
    with pytest.raises(ValueError, match=r"of the 1 relevant clients with a history leaves nobody .* more clients"):
        trained(alone, tiny, task_weights="churn:1")


def test_two_processes_train_as_one_does(prepared: Prepared, tiny: Config, tmp_path: Path) -> None:
    # 481 users in batches of 60: the second process has nobody in the last one. Without dropout and drawn negatives
    # nothing depends on who sees a user.
    tasks = "churn:1.0,category_propensity:0.5,price:1.0,name:0.3"
    settings = replace(tiny.train, task_weights=tasks, valid_share=119 / 600, batch_size=60)
    assert len(prepared.known) == 600
    tiny = replace(tiny, model=replace(tiny.model, dropout=0.0, id_dropout=0.0), train=settings)
    one = weights(train(prepared, tiny).with_name("last.ckpt"))
    two = replace(tiny, run_dir=str(tmp_path / "two"), train=replace(settings, processes=2))
    shutil.copytree(prepared.folder, tmp_path / "two" / "prepared")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(asdict(two)))
    command = [sys.executable, "-m", "ubt", "train", "--config", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "find_unused_parameters" not in done.stderr
    assert done.stdout.count("train: best of 2 epochs") == 1
    both = weights(tmp_path / "two" / "checkpoints" / "last.ckpt")
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=2e-3, atol=2e-4, msg=name)
    histories = [json.loads((Path(run.run_dir) / "epochs.json").read_text()) for run in (tiny, two)]
    for name, value in histories[0]["1"].items():
        assert histories[1]["1"][name] == pytest.approx(value, rel=2e-2), name


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("tasks", [ALL_TASKS, "churn:1", "product_propensity:1", "name:1"])
def test_every_weight_has_a_gradient_whoever_is_in_a_share(
    prepared: Prepared, tiny: Config, tasks: str, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processes wait for the gradient of every weight, also those whose share of a last batch is nobody.
    settings = replace(tiny.train, task_weights=tasks, weighting=weighting, novelty_weight=0.0, cutoffs=1, batch_size=7)
    monkeypatch.setattr(UBTModule, "log", lambda *a, **k: None)
    weights = _task_weights(settings)
    module = UBTModule(
        Reader(prepared, 500), [window_labels(prepared, "train")], replace(tiny, train=settings), weights
    )
    shares = next(iter(module.data.train(0, 7, 8))), next(iter(module.data.train(0, 6, 7)))
    for example, number in zip(shares, (0, 1), strict=True):
        assert len(example.sequences.offsets) - 1 == number
        module.zero_grad()
        module.training_step(example, 0).backward()
        assert [name for name, value in module.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_user_is_in_one_batch_of_one_process(prepared: Prepared, tiny: Config, processes: int) -> None:
    reader = Reader(prepared, 500)
    data = UserBatches(reader, [window_labels(prepared, "train")], tiny, ["churn"])
    everybody, orders = set(prepared.users[prepared.known]), []
    for epoch in (0, 1):
        shares = [data.train(epoch, rank, processes) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1
        found = []
        for share in shares:
            plan = share.view.plan(64, shuffle=True, seed=42, epoch=epoch)
            rows = [rows[share.rank :: processes] for rows in plan]
            assert [len(example.sequences.offsets) - 1 for example in share] == [len(one) for one in rows]
            found.append(share.view.users[np.concatenate(rows)])
        users = np.concatenate(found)
        assert len(users) == len(set(users))
        assert set(users) | set(data.valid_view.users) == everybody and not set(users) & set(data.valid_view.users)
        orders.append(users)
    assert not np.array_equal(*orders)


def test_bfloat16_trains(prepared: Prepared, tiny: Config) -> None:
    one, other = (
        trained(prepared, replace(tiny, run_dir=tiny.run_dir + name), task_weights=ALL_TASKS, precision=name)
        for name in ("32", "bf16")
    )
    for name, value in one.items():
        assert other[name].dtype == value.dtype and torch.isfinite(other[name]).all()
        torch.testing.assert_close(other[name], value, rtol=0.1, atol=0.03, msg=name)
    assert any(not torch.equal(value, other[name]) for name, value in one.items())
