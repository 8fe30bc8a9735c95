"""Nothing at or after the cutoff reaches a vocabulary, a feature, a weight or an embedding."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from synthlogs.shop import TABLES
from ubt.blocks import BASELINE, write_blocks
from ubt.config import Config
from ubt.embed import embed
from ubt.prepare import Prepared
from ubt.train import train

CUTOFF, SCORED = "2022-10-13 00:00:00", "2022-10-27 00:00:00"


def tamper(raw: Path, start: str, how: str) -> None:
    """Change every event at or after a moment; the last purchase stays where it is, it places the windows."""
    rng = np.random.default_rng(3)
    for table in TABLES:
        frame = pd.read_parquet(raw / f"{table}.parquet")
        later = (frame["timestamp"] >= start).to_numpy()
        last = frame.index == frame["timestamp"].idxmax()
        if how == "delete":
            frame = frame[~later | last]
        elif how == "newcomer":
            # Somebody who is asked for and was never seen before comes, in the place of nobody.
            relevant = np.load(raw / "input" / "relevant_clients.npy")
            frame = pd.concat([frame, frame[later].head(3).assign(client_id=relevant[-1])])
        else:
            rows = np.flatnonzero(later)
            value = frame.columns[2]
            frame.loc[rows, value] = frame[value].to_numpy()[rng.permutation(rows)]
            frame.loc[rows, "client_id"] = frame["client_id"].to_numpy()[rng.permutation(rows)]
        frame.to_parquet(raw / f"{table}.parquet", index=False)


@pytest.fixture
def later_changed(raw_copy: Path, prepare_for: Callable[..., Prepared], request: pytest.FixtureRequest) -> Prepared:
    start, how = request.param
    tamper(raw_copy, start, how)
    return prepare_for(raw_copy)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def vectors(prepared: Prepared, config: Config, checkpoint: Path) -> np.ndarray:
    embed(prepared, checkpoint, config.embeddings)
    return np.load(config.embeddings / "embeddings.npy")


@pytest.mark.parametrize("later_changed", [(CUTOFF, "delete"), (CUTOFF, "permute")], indirect=True, ids=str)
def test_events_from_the_cutoff_on_change_no_feature_and_no_embedding(
    prepared: Prepared, later_changed: Prepared, tiny: Config
) -> None:
    checkpoint = train(prepared, replace(tiny, train=replace(tiny.train, num_epochs=1)))
    before = vectors(prepared, tiny, checkpoint)
    # The checkpoint refuses another log, and must: so it is told that this one is its own.
    after = vectors(replace(later_changed, fingerprint=prepared.fingerprint), tiny, checkpoint)
    np.testing.assert_array_equal(before, after)
    # Vocabularies may hold later values at their end, so the folders are compared, not their settings.
    folders = []
    for i, log in enumerate((prepared, later_changed)):
        config = replace(tiny, run_dir=f"{tiny.run_dir}{i}", embeddings_dir=None)
        np.save(_made(config.embeddings) / "embeddings.npy", before)
        np.save(config.embeddings / "client_ids.npy", log.users)
        folders.append(write_blocks(log, config))
    assert set(folders[0]) == {"hstu", "aggregates", "cf", "all", BASELINE}
    for name, folder in folders[0].items():
        one, other = (np.load(found / "embeddings.npy") for found in (folder, folders[1][name]))
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("how", ["delete", "permute", "newcomer"])
def test_the_scored_window_changes_no_weight(
    raw_copy: Path, prepare_for: Callable[..., Prepared], tiny: Config, how: str
) -> None:
    # Two clients without a history: one comes in the scored window, one never does.
    relevant = np.load(raw_copy / "input" / "relevant_clients.npy")
    np.save(raw_copy / "input" / "relevant_clients.npy", np.r_[relevant, 10**9, 10**9 + 1])
    visits = pd.read_parquet(raw_copy / "page_visit.parquet")
    late = visits[visits["timestamp"] >= SCORED].head(3)
    pd.concat([visits, late.assign(client_id=10**9)]).to_parquet(raw_copy / "page_visit.parquet", index=False)
    prepared = prepare_for(raw_copy)
    tamper(raw_copy, SCORED, how)
    later_changed = prepare_for(raw_copy)
    assert len(prepared.known) != len(later_changed.known) or how == "permute"
    config = replace(tiny, train=replace(tiny.train, num_epochs=1))
    states = []
    for i, log in enumerate((prepared, later_changed)):
        checkpoint = train(log, replace(config, run_dir=f"{config.run_dir}{i}"))
        states.append(torch.load(checkpoint, weights_only=False)["state_dict"])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_training_and_embedding_do_not_open_the_scored_window(
    raw_log: Path, prepare_for: Callable[..., Prepared], tiny: Config
) -> None:
    prepared = prepare_for(raw_log)
    (prepared.folder / "target" / "validation_target.parquet").unlink()
    config = replace(tiny, train=replace(tiny.train, num_epochs=1))
    assert len(vectors(prepared, config, train(prepared, config))) == len(prepared.users)


def test_labels_of_users_kept_apart_do_not_train(prepared: Prepared, tiny: Config) -> None:
    from ubt.batches import Reader, UserBatches
    from ubt.labels import window_labels

    batches = UserBatches(Reader(prepared, 500), [window_labels(prepared, "train")], tiny, ["churn"])
    training, apart = set(batches.train_view.users), set(batches.valid_view.users)
    assert not training & apart
    assert training | apart == set(prepared.users[prepared.seen(prepared.train_start)])
    assert len(apart) == round(0.1 * prepared.seen(prepared.train_start).sum())
