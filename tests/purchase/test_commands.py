"""The commands on a small log: what they leave, how they go on, and what they say when they cannot."""

import csv
from pathlib import Path

import pytest
import torch

from purchase import predict as predicting
from purchase.cli import app
from purchase.prepare import open_prepared
from runkit.files import read_json
from runkit.training import load_checkpoint


def lists(run: Path) -> dict[int, list[tuple[int, int, float]]]:
    found: dict[int, list[tuple[int, int, float]]] = {}
    with (run / "predictions.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(int(row["user_id"]), []).append(
                (int(row["rank"]), int(row["item_id"]), float(row["score"]))
            )
    return found


def test_a_run_leaves_its_record(trained: Path) -> None:
    epochs = read_json(trained / "epochs.json")
    assert len(epochs) == 2
    for values in epochs.values():
        shares = [values[f"gradient_share/{event}"] for event in ("view", "cart", "purchase")]
        assert sum(shares) == pytest.approx(1, abs=1e-4) and min(shares) > 0
        assert values["valid_loss"] == pytest.approx(1 - values["ndcg@10/purchase"], abs=1e-5)
    assert {path.name for path in (trained / "plots").iterdir()} >= {"ndcg.png", "gradients.png"}
    assert set(read_json(trained / "metadata.json")["commands"]) >= {"prepare", "train"}
    checkpoint = load_checkpoint(trained / "checkpoints" / "last.ckpt")
    assert len(checkpoint["optimizer_states"][0]["param_groups"]) == 4


def test_training_goes_on_to_the_same_weights(purchase, data: Path, trained: Path, tmp_path: Path) -> None:
    assert purchase("prepare", tmp_path, data) == 0
    assert purchase("train", tmp_path, data, "--max-epochs", "1") == 0
    assert purchase("train", tmp_path, data, "--resume") == 0
    whole, parts = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (trained, tmp_path))
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    assert all(torch.equal(one, parts["state_dict"][name]) for name, one in whole["state_dict"].items())
    assert read_json(trained / "epochs.json") == read_json(tmp_path / "epochs.json")


def test_everything_is_judged_on_the_same_users(purchase, data: Path, trained: Path, capsys) -> None:
    assert purchase("evaluate", trained, data) == 0
    shown = capsys.readouterr().out
    found = read_json(trained / "metrics.json")["evaluate"]
    names = {"network", "popularity", "repeat", "ials", "rerank", "rerank without network"}
    assert set(found["rankers"]) == names and all(name in shown for name in names)
    for one in found["rankers"].values():
        assert one["all"]["users"] == found["users"] > 0
        assert {"ndcg@5", "ndcg@20", "recall@10", "mrr@10"} <= set(one["all"])
        assert one["interval"]["ndcg@10"][0] <= one["all"]["ndcg@10"] <= one["interval"]["ndcg@10"][1]
    assert (trained / "compare.md").exists() and (trained / "plots" / "calibration.png").exists()


def test_every_known_user_gets_ten_items_and_unknown_ones_the_popular(
    purchase, data: Path, trained: Path, config_of, tmp_path: Path
) -> None:
    assert purchase("predict", trained, data) == 0
    found = lists(trained)
    history = open_prepared(config_of(trained)).history()
    assert set(found) == set(history.users.tolist())
    for rows in found.values():
        assert [rank for rank, _, _ in rows] == list(range(1, 11)) and len({item for _, item, _ in rows}) == 10
        assert [score for _, _, score in rows] == sorted((score for _, _, score in rows), reverse=True)
    known, users = int(history.users[5]), tmp_path / "users.csv"
    users.write_text(f"user_id\n77\n{known}\n78\n")
    assert purchase("predict", trained, data, "--users", str(users)) == 0
    asked = lists(trained)
    assert list(asked) == [77, known, 78] and asked[77] == asked[78] and len(asked[77]) == 10
    # Other users of a batch change the last digits of a score.
    assert [line[:2] for line in asked[known]] == [line[:2] for line in found[known]]
    assert [line[2] for line in asked[known]] == pytest.approx([line[2] for line in found[known]], rel=1e-4)
    assert read_json(trained / "metadata.json")["commands"]["predict"]["users_without_history"] == 2
    words = ("--users", str(users), "--event-weights", "0", "0", "0")
    assert purchase("predict", trained, data, *words) == 0
    # Nothing is popular: the catalogue in its order.
    ids = open_prepared(config_of(trained)).item_ids.to_pylist()
    assert [item for _, item, _ in lists(trained)[77]] == ids[:10]
    users.write_text("user_id\n77\n77\n")
    assert purchase("predict", trained, data, "--users", str(users)) == 1


def test_predictions_go_on_where_they_stopped(purchase, data: Path, trained: Path, monkeypatch) -> None:
    words = ("--part-users", "100")
    assert purchase("predict", trained, data, *words) == 0
    whole, written = (trained / "predictions.csv").read_bytes(), []
    write = predicting._write

    def killed(path: Path, *arguments: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arguments)

    monkeypatch.setattr(predicting, "_write", killed)
    assert purchase("predict", trained, data, *words) == 130
    assert len(list((trained / "predictions").glob("part-*.csv"))) == 2
    later: list[Path] = []
    monkeypatch.setattr(predicting, "_write", lambda path, *rest: (later.append(path), write(path, *rest)))
    assert purchase("predict", trained, data, *words, "--resume") == 0
    assert (trained / "predictions.csv").read_bytes() == whole and not (trained / "predictions").exists()
    assert len(later) == -(-len(lists(trained)) // 100) - 2


def test_what_is_prepared_is_kept_only_where_it_is_the_same(purchase, data: Path, tmp_path: Path, capsys) -> None:
    for words, says in (((), "catalogue"), (("--resume",), "kept"), (("--resume", "--brand", ""), "catalogue")):
        assert purchase("prepare", tmp_path, data, *words) == 0
        assert says in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["demo", "rees46", "retailrocket", "upstage"])
def test_presets_are_settings(preset: str) -> None:
    assert app.parse("train", ["--config", preset]).train.weights["view"] == 1


def test_tuning_ranks_its_trials(purchase, data: Path, trained: Path) -> None:
    words = ("--max-epochs", "1", "--learning-rates", "0.01", "--purchase-weights", "1", "100")
    before = (trained / "checkpoints" / "best.ckpt").stat().st_mtime_ns
    assert purchase("tune", trained, data, *words) == 0
    best = (trained / "best.yaml").read_text()
    assert "purchase_weight" in best and len(list((trained / "trials").iterdir())) == 2
    assert (trained / "checkpoints" / "best.ckpt").stat().st_mtime_ns == before


def test_what_is_missing_is_named(purchase, data: Path, trained: Path, tmp_path: Path, capsys) -> None:
    for command in ("train", "evaluate", "predict", "tune"):
        assert purchase(command, tmp_path, data) == 1
        assert "needs a prepared log; run `purchase prepare` first" in capsys.readouterr().err
    assert purchase("train", trained, data, "--cutoff", "2019-12-02") == 1
    assert "needs that of `purchase prepare`" in capsys.readouterr().err
    assert purchase("predict", trained, data, "--width", "32") == 1
    assert "needs that of `purchase train`" in capsys.readouterr().err
    for words, says in (
        (("--cutoff", "soon"), "split.cutoff: got 'soon'"),
        (("--purchase-weight", "0"), "it is the target"),
        (("--heads", "3"), "model.width: got 16, needs a multiple of heads"),
    ):
        assert purchase("train", trained, data, *words) == 2
        assert says in capsys.readouterr().err
