"""Embeddings are an entry the challenge accepts; the score table is made of what it says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ubt.blocks import BASELINE
from ubt.config import Config
from ubt.embed import embed
from ubt.labels import window_labels
from ubt.official import Result, Task, judged
from ubt.prepare import Prepared
from ubt.score import TASKS, TREES, score
from ubt.train import train


@pytest.fixture
def checkpoint(prepared: Prepared, tiny: Config) -> Path:
    return train(prepared, replace(tiny, train=replace(tiny.train, num_epochs=1)))


def test_every_relevant_client_has_one_finite_row(prepared: Prepared, tiny: Config, checkpoint: Path) -> None:
    embed(prepared, checkpoint, tiny.embeddings)
    vectors, ids = np.load(tiny.embeddings / "embeddings.npy"), np.load(tiny.embeddings / "client_ids.npy")
    assert vectors.dtype == np.float16 and vectors.shape == (len(prepared.users), 12)
    assert ids.dtype == np.int64 and sorted(ids) == sorted(prepared.users)
    assert np.isfinite(vectors).all()
    assert len(np.unique(vectors, axis=0)) > 0.9 * len(vectors)
    names = ["client_ids.npy", "embeddings.npy", "made_of.json"]
    assert sorted(path.name for path in tiny.embeddings.iterdir()) == names


def test_rows_belong_to_their_clients_whatever_the_order(
    raw_copy: Path, prepared: Prepared, prepare_for: Callable[..., Prepared], tiny: Config, checkpoint: Path
) -> None:
    embed(prepared, checkpoint, tiny.embeddings)
    np.save(raw_copy / "input" / "relevant_clients.npy", prepared.users[::-1])
    turned = replace(prepare_for(raw_copy), fingerprint=prepared.fingerprint)
    embed(turned, checkpoint, tiny.embeddings / "turned")
    one, other = (np.load(folder / "embeddings.npy") for folder in (tiny.embeddings, tiny.embeddings / "turned"))
    np.testing.assert_allclose(one, other[::-1], rtol=2e-2, atol=2e-3)


def test_clients_without_events_are_embedded_alike(
    raw_copy: Path, prepare_for: Callable[..., Prepared], tiny: Config
) -> None:
    users = np.load(raw_copy / "input" / "relevant_clients.npy")
    np.save(raw_copy / "input" / "relevant_clients.npy", np.r_[[-7], users, [-8]])
    prepared = prepare_for(raw_copy)
    checkpoint = train(prepared, replace(tiny, train=replace(tiny.train, num_epochs=1)))
    number, width, without = embed(prepared, checkpoint, tiny.embeddings)
    vectors = np.load(tiny.embeddings / "embeddings.npy")
    assert (number, width) == vectors.shape and without == 2
    np.testing.assert_array_equal(vectors[0], vectors[-1])
    assert np.isfinite(vectors).all() and np.abs(vectors[0]).sum() > 0
    assert "hstu" in score(prepared, replace(tiny, blocks="hstu"))


def test_an_embedding_that_is_not_finite_is_not_written(
    prepared: Prepared, tiny: Config, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ubt.model import UniversalBehavioralTransformer

    forward = UniversalBehavioralTransformer.forward
    monkeypatch.setattr(UniversalBehavioralTransformer, "forward", lambda *a: forward(*a) * 1e6)
    with pytest.raises(ValueError, match="is not finite in float16"):
        embed(prepared, checkpoint, tiny.embeddings)
    assert not list(tiny.embeddings.glob("*"))


def entry(config: Config, vectors: np.ndarray, ids: np.ndarray) -> None:
    config.embeddings.mkdir(parents=True, exist_ok=True)
    np.save(config.embeddings / "embeddings.npy", vectors)
    np.save(config.embeddings / "client_ids.npy", ids)


def metrics(config: Config) -> dict:
    return json.loads((Path(config.run_dir) / "metrics.json").read_text())


def test_planted_labels_are_found_and_noise_is_not(prepared: Prepared, tiny: Config) -> None:
    rng = np.random.default_rng(0)
    labels = [window_labels(prepared, window).conversion * 4 for window in ("train", "validation")]
    noise = rng.normal(size=(len(prepared.users), 12)).astype(np.float16)
    planted = noise.copy()
    planted[:, :2] = np.stack(labels, 1)
    config = replace(tiny, blocks="hstu,aggregates", score=replace(tiny.score, width=64, trees=0))
    tables, scores = [], []
    for vectors in (noise, planted):
        entry(config, vectors, prepared.users)
        tables.append(score(prepared, config))
        methods = metrics(config)["tasks"]["conversion"]["methods"]
        scores.append({name: one["score"] for name, one in methods.items()})
    assert scores[0]["hstu"] < 0.65 < 0.9 < scores[1]["hstu"]
    assert scores[1]["all"] > scores[1]["aggregates"] + 0.02
    # What does not depend on the embeddings is what it was.
    assert scores[0]["aggregates"] == scores[1]["aggregates"] and scores[0]["constant"] == 0.5
    assert "win" in tables[1].split("all - aggregates")[1].splitlines()[0]
    assert (Path(tiny.run_dir) / "plots" / "roc_churn.png").stat().st_size > 1000


def test_all_six_tasks_are_scored_and_written_as_the_official_tool_does(prepared: Prepared, tiny: Config) -> None:
    entry(tiny, np.random.default_rng(0).normal(size=(len(prepared.users), 5)).astype(np.float16), prepared.users)
    table = score(prepared, tiny)
    tasks = metrics(tiny)["tasks"]
    left_out = metrics(tiny)["left_out"]
    assert {*tasks, *left_out} == set(TASKS) and {"churn", "conversion", "propensity_category"} <= set(tasks)
    methods = list(tasks["churn"]["methods"])
    blocks = ["hstu", "aggregates", "cf"]
    assert methods == ["constant", BASELINE, TREES, *blocks, "all", *(f"all but {name}" for name in blocks)]
    for name in methods:
        folder = Path(tiny.run_dir) / "scores" / name.replace(" ", "_")
        scores, epochs = (json.loads((folder / f"{file}.json").read_text()) for file in ("scores", "epochs"))
        assert set(scores) == set(epochs) == set(tasks) and set(epochs.values()) <= {0, 1, 2}
        for task, value in scores.items():
            found = tasks[task]["methods"][name]
            assert found["score"] == pytest.approx(value, abs=1e-5)
            if task.startswith("propensity"):
                parts = 0.8 * found["auroc"] + 0.1 * found["novelty"] + 0.1 * found["diversity"]
                assert parts == pytest.approx(value, abs=1e-4)
    assert tasks["churn"]["clients"] == prepared.active.sum() < tasks["conversion"]["clients"] == len(prepared.users)
    for part in ("scorer sampled: all clients", "all - official baseline", "all - all but cf", "not comparable"):
        assert part in table


def test_training_follows_the_order_of_the_entrys_client_ids(prepared: Prepared, tiny: Config) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(prepared.users), 5)).astype(np.float16)
    config = replace(tiny, blocks="hstu", score=replace(tiny.score, trees=0))
    scores = []
    for order in (slice(None), slice(None, None, -1)):
        entry(config, vectors[order], prepared.users[order])
        score(prepared, config)
        scores.append({n: m["score"] for n, m in metrics(config)["tasks"]["conversion"]["methods"].items()})
    assert scores[0]["hstu"] != scores[1]["hstu"] and scores[0][BASELINE] != scores[1][BASELINE]


def test_a_sample_is_scored_by_the_same_code(prepared: Prepared, tiny: Config) -> None:
    entry(tiny, np.zeros((len(prepared.users), 2), np.float16), prepared.users)
    config = replace(tiny, blocks="hstu,cf", score=replace(tiny.score, sample=250, seeds=2, trees=0))
    table = score(prepared, config)
    assert "sampled: at most 250 clients" in table and "mean of 2 networks" in table
    assert metrics(config)["tasks"]["conversion"]["clients"] == 250
    assert list(metrics(config)["tasks"]["churn"]["methods"]) == ["constant", BASELINE, "hstu", "cf", "all"]


def test_official_means_the_official_network_and_everybody(
    prepared: Prepared, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry(tiny, np.zeros((len(prepared.users), 2), np.float16), prepared.users)
    used = []

    def fit(features: Callable, task: Task, width: int, blocks: int) -> Result:
        used.append((task.name, len(task.rows), width, blocks))
        return judged(task, np.zeros(task.scored.shape, np.float32))

    monkeypatch.setattr("ubt.official.fit", fit)
    config = replace(tiny, blocks="hstu", score=replace(tiny.score, scorer="official", sample=10, trees=0))
    assert "scorer official: all clients, network 2048 wide with 3 blocks" in score(prepared, config)
    assert ("conversion", len(prepared.users), 2048, 3) in used and {one[2:] for one in used} == {(2048, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, i: (v.astype(np.float32), i), "got float32"),
        (lambda v, i: (v[:, 0], i), "needs float16"),
        (lambda v, i: (np.zeros((len(i), 2049), np.float16), i), r"needs float16 \[users, 1..2048\]"),
        (lambda v, i: (v[:-1], i[:-1]), "1 are missing, 0 are unknown"),
        (lambda v, i: (v[:-1], i), "needs each of the"),
        (lambda v, i: (v, np.r_[i[:-1], i[0]]), "needs each of the"),
        (lambda v, i: (v, np.r_[i[:-1], [-99]]), "1 are missing, 1 are unknown"),
        (lambda v, i: (v, i.astype(float)), "got float64"),
        (lambda v, i: (np.where(v == v[3, 0], np.float16(np.nan), v), i), "NaN or infinite in the row of client"),
        (lambda v, i: (np.where(v == v[3, 0], np.float16(np.inf), v), i), "NaN or infinite in the row of client"),
    ],
)
def test_entries_the_challenge_would_refuse_are_refused(
    prepared: Prepared, tiny: Config, change: Callable, message: str
) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(prepared.users), 3)).astype(np.float16)
    entry(tiny, *change(vectors, prepared.users))
    with pytest.raises(ValueError, match=message):
        score(prepared, tiny)
    assert not (tiny.embeddings / "all").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"scorer": "real"}, "needs one of official, sampled"), ({"width": 0}, "width: got 0"), ({"seeds": 0}, "seeds")],
)
def test_wrong_scorers_are_refused(prepared: Prepared, tiny: Config, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(prepared, replace(tiny, score=replace(tiny.score, **settings)))
