"""Training can be interrupted and resumed without a trace; the seed decides the rest."""

import json
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch

from ubt.config import Config
from ubt.prepare import Prepared
from ubt.train import UBTModule, parse_task_weights, train


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=False)["state_dict"]


def epochs(config: Config, number: int) -> Config:
    return replace(config, train=replace(config.train, num_epochs=number, patience=10))


class Killed(RuntimeError):
    pass


def test_a_run_killed_inside_an_epoch_and_resumed_ends_with_the_same_weights(
    prepared: Prepared, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Steep, so that the validation loss rises and the learning rate falls: the schedule must be resumed as well.
    tiny = replace(tiny, train=replace(tiny.train, lr_patience=0, learning_rate=0.02))
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


def test_tasks_can_be_trained_alone(prepared: Prepared, tiny: Config) -> None:
    for task in ("churn", "category_propensity"):
        config = replace(tiny, train=replace(tiny.train, task_weights=f"{task}:2", num_epochs=1, cutoffs=1))
        names = weights(train(prepared, config))
        assert any(f"heads.{task}." in name for name in names)
        assert sum("heads." in name for name in names) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("churn:1.0,foo:2", "unknown task 'foo'"),
        ("churn", "got 'churn'"),
        ("churn:-1", "got 'churn:-1'"),
        ("churn:1,churn:2", "got 'churn:2'"),
        ("", "needs at least one"),
    ],
)
def test_task_weights_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_task_weights(text)


def test_task_weights_are_read_in_their_order() -> None:
    found = parse_task_weights(" category_propensity:0.5, churn:1.0 ")
    assert list(found.items()) == [("category_propensity", 0.5), ("churn", 1.0)]
