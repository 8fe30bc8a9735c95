"""Embeddings are an entry the challenge accepts; the score table is made of what it says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ubt.config import Config
from ubt.embed import embed
from ubt.prepare import Prepared
from ubt.score import BASELINE, OURS, load_embeddings, score
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
    assert sorted(path.name for path in tiny.embeddings.iterdir()) == ["client_ids.npy", "embeddings.npy"]


def test_rows_belong_to_their_clients_whatever_the_order(
    raw_copy: Path, prepared: Prepared, prepare_for: Callable[..., Prepared], tiny: Config, checkpoint: Path
) -> None:
    embed(prepared, checkpoint, tiny.embeddings)
    np.save(raw_copy / "input" / "relevant_clients.npy", prepared.users[::-1])
    turned = replace(prepare_for(raw_copy), fingerprint=prepared.fingerprint)
    embed(turned, checkpoint, tiny.embeddings / "turned")
    one, other = (np.load(folder / "embeddings.npy") for folder in (tiny.embeddings, tiny.embeddings / "turned"))
    np.testing.assert_allclose(one, other[::-1], rtol=2e-2, atol=2e-3)
    # Read back for the first log, the second file's rows are found by their ids.
    np.testing.assert_allclose(load_embeddings(prepared, tiny.embeddings / "turned"), one, rtol=2e-2, atol=2e-3)


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
    assert "ubt embeddings" in score(prepared, tiny.embeddings, tiny)


def test_an_embedding_that_is_not_finite_is_not_written(
    prepared: Prepared, tiny: Config, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ubt.model import UniversalBehavioralTransformer

    forward = UniversalBehavioralTransformer.forward
    monkeypatch.setattr(UniversalBehavioralTransformer, "forward", lambda *a: forward(*a) * 1e6)
    with pytest.raises(ValueError, match="is not finite in float16"):
        embed(prepared, checkpoint, tiny.embeddings)
    assert not list(tiny.embeddings.glob("*"))


def test_planted_labels_are_found_and_noise_is_not(prepared: Prepared, tiny: Config) -> None:
    from ubt.labels import window_labels

    rng = np.random.default_rng(0)
    scored = window_labels(prepared, "validation")
    vectors = rng.normal(size=(len(prepared.users), 12)).astype(np.float16)
    tiny.embeddings.mkdir(parents=True)
    np.save(tiny.embeddings / "client_ids.npy", prepared.users)
    results = []
    for truth in (np.zeros(len(vectors)), np.nan_to_num(scored.churn) * 4):
        train_truth = np.nan_to_num(window_labels(prepared, "train").churn) * 4
        vectors[:, 0], vectors[:, 1] = truth, np.where(truth.any(), train_truth, 0)
        np.save(tiny.embeddings / "embeddings.npy", vectors)
        table = score(prepared, tiny.embeddings, replace(tiny, score=replace(tiny.score, probe_epochs=30)))
        methods = json.loads((Path(tiny.run_dir) / "metrics.json").read_text())["tasks"]["churn"]["methods"]
        results.append((methods[OURS]["auroc"], methods[BASELINE]["auroc"], table))
    (noise, baseline, table), (planted, _, _) = results
    assert 0.3 < noise < baseline
    assert "LOSE against aggregates, probe" in table or "tie with aggregates, probe" in table
    assert planted > noise
    assert methods["constant"]["auroc"] == 0.5
    assert (Path(tiny.run_dir) / "plots" / "roc_churn.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, i: (v.astype(np.float32), i), "got float32"),
        (lambda v, i: (v[:-1], i[:-1]), "needs each of the"),
        (lambda v, i: (v, np.r_[i[:-1], i[0]]), "needs each of the"),
        (lambda v, i: (np.where(v == v[3, 0], np.float16(np.nan), v), i), "NaN or infinite"),
    ],
)
def test_entries_the_challenge_would_refuse_are_refused(
    prepared: Prepared, tmp_path: Path, change: Callable, message: str
) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(prepared.users), 3)).astype(np.float16)
    vectors, ids = change(vectors, prepared.users)
    np.save(tmp_path / "embeddings.npy", vectors)
    np.save(tmp_path / "client_ids.npy", ids)
    with pytest.raises(ValueError, match=message):
        load_embeddings(prepared, tmp_path)
