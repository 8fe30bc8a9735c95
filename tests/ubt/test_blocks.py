"""Blocks on disk: an entry each, standardised, made of the history alone; what the collaborative one finds."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from synthlogs.shop import generate
from ubt.blocks import BASELINE, check_entry, open_entry, parse_blocks, write_blocks
from ubt.cf import collaborative
from ubt.config import Config, FeaturesConfig, GenerateConfig
from ubt.features import official_features
from ubt.prepare import Prepared


@pytest.fixture
def written(prepared: Prepared, tiny: Config) -> Config:
    tiny.embeddings.mkdir(parents=True)
    vectors = np.random.default_rng(1).normal(3, 2, (len(prepared.users), 4)).astype(np.float16)
    np.save(tiny.embeddings / "embeddings.npy", vectors[::-1])
    np.save(tiny.embeddings / "client_ids.npy", prepared.users[::-1])
    return tiny


def test_every_block_is_an_entry_and_the_whole_is_their_concatenation(prepared: Prepared, written: Config) -> None:
    folders = write_blocks(prepared, written)
    vectors = {}
    for name, folder in folders.items():
        vectors[name], ids = open_entry(folder, prepared.users)
        np.testing.assert_array_equal(ids, prepared.users)
    names = ["hstu", "aggregates", "cf"]
    np.testing.assert_array_equal(vectors["all"], np.concatenate([vectors[name] for name in names], 1))
    widths = json.loads((folders["all"] / "block.json").read_text())["blocks"]
    assert widths == {name: vectors[name].shape[1] for name in names} and list(widths) == names
    for name in names:
        block = vectors[name].astype(np.float64)
        np.testing.assert_allclose(block.mean(0), 0, atol=0.03)
        spread = block.std(0)
        whole = np.abs(block).max(0) < 9.9
        assert ((np.abs(spread - 1) < 0.02) | (spread == 0))[whole].all() and whole.mean() > 0.2
        assert np.abs(block).max() <= 10 and (spread < 1.05).all()
        names_of = (folders[name] / "features.txt").read_text().splitlines()
        assert len(names_of) == block.shape[1] == len(set(names_of))
    # The network's rows were found by their ids.
    entry = np.load(written.embeddings / "embeddings.npy")[::-1].astype(np.float64)
    np.testing.assert_allclose(vectors["hstu"], (entry - entry.mean(0)) / entry.std(0), atol=4e-3)
    raw = np.zeros(vectors[BASELINE].shape, np.float32)
    for part in official_features(prepared, prepared.train_start, written.features.windows_days):
        raw[part.rows] = part.values
    np.testing.assert_array_equal(vectors[BASELINE], raw.astype(np.float16))


def test_what_is_on_disk_is_kept_until_something_it_is_made_of_changes(prepared: Prepared, written: Config) -> None:
    def made(config: Config) -> dict[str, int]:
        folders = write_blocks(prepared, config)
        return {name: os.stat(folder / "embeddings.npy").st_ino for name, folder in folders.items() if name != "all"}

    first = made(written)
    assert made(written) == first
    np.save(written.embeddings / "embeddings.npy", np.ones((len(prepared.users), 2), np.float16))
    second = made(written)
    assert {name for name in first if first[name] != second[name]} == {"hstu"}
    third = made(replace(written, features=replace(written.features, cf_size=5)))
    assert "cf" in {name for name in second if second[name] != third[name]}


def test_users_without_events_are_the_average_user(
    raw_copy: Path, prepare_for: Callable[..., Prepared], tiny: Config
) -> None:
    users = np.load(raw_copy / "input" / "relevant_clients.npy")
    np.save(raw_copy / "input" / "relevant_clients.npy", np.r_[[10**12 + 1], users])
    visits = pd.read_parquet(raw_copy / "page_visit.parquet")
    # One is not in the log at all, the other only after the cutoff.
    late = pd.DataFrame({"client_id": [10**12 + 2], "timestamp": ["2022-10-20 00:00:00"], "url": visits["url"][:1]})
    pd.concat([visits, late]).to_parquet(raw_copy / "page_visit.parquet", index=False)
    np.save(raw_copy / "input" / "relevant_clients.npy", np.r_[[10**12 + 1], users, [10**12 + 2]])
    prepared = prepare_for(raw_copy)
    assert (10**12 + 2 in prepared.users[prepared.known]) and (10**12 + 1 not in prepared.users[prepared.known])
    folders = write_blocks(prepared, replace(tiny, blocks="aggregates,cf"))
    for name in ("aggregates", "cf", BASELINE, "all"):
        vectors = np.load(folders[name] / "embeddings.npy")
        assert not vectors[[0, -1]].any() and vectors[1:-1].any(1).all(), name


def test_more_than_2048_dims_are_refused(prepared: Prepared, written: Config) -> None:
    np.save(written.embeddings / "embeddings.npy", np.ones((len(prepared.users), 2000), np.float16))
    with pytest.raises(ValueError, match=r"2000 \(hstu\) .* the challenge accepts 2048"):
        write_blocks(prepared, written)
    with pytest.raises(ValueError, match="got float16"):
        check_entry(np.ones((3, 2049), np.float16), np.arange(3), np.arange(3))


def test_missing_embeddings_say_what_to_do(prepared: Prepared, tiny: Config) -> None:
    with pytest.raises(FileNotFoundError, match="run `ubt embed`"):
        write_blocks(prepared, tiny)


@pytest.mark.parametrize("text", ["", "hstu,hstu", "hstu,gru", "all"])
def test_unknown_blocks_are_named(text: str) -> None:
    assert parse_blocks(" cf, hstu ") == ["cf", "hstu"]
    with pytest.raises(ValueError, match="needs some of hstu, aggregates, cf"):
        parse_blocks(text)


def two_camps(folder: Path, camps: int = 2, users: int = 60) -> Path:
    """A log in which user u visits 8 of the 12 URLs of camp u % camps; nobody crosses."""
    generate(folder, GenerateConfig(clients=200, relevant_share=0.5, target_categories=2, target_skus=2))
    rng = np.random.default_rng(0)
    rows = [(user, 1000 * (user % camps) + url) for user in range(users) for url in rng.choice(12, 8, replace=False)]
    frame = pd.DataFrame(rows, columns=["client_id", "url"]).assign(timestamp="2022-09-20 10:00:00")
    frame[["client_id", "timestamp", "url"]].to_parquet(folder / "page_visit.parquet", index=False)
    for table in ("add_to_cart", "remove_from_cart", "search_query"):
        path = folder / f"{table}.parquet"
        pd.read_parquet(path).iloc[:0].to_parquet(path, index=False)
    buys = pd.read_parquet(folder / "product_buy.parquet").iloc[-1:]
    buys.assign(client_id=10**6).to_parquet(folder / "product_buy.parquet", index=False)
    for path in (folder / "target").glob("*propensity*"):
        path.unlink()
    np.save(folder / "input" / "relevant_clients.npy", np.arange(users))
    np.save(folder / "target" / "active_clients.npy", np.arange(users))
    return folder


def test_the_collaborative_block_tells_camps_apart(tmp_path: Path, prepare_for: Callable[..., Prepared]) -> None:
    prepared = prepare_for(two_camps(tmp_path / "log"))
    settings = FeaturesConfig(cf_size=2)
    (part,) = collaborative(prepared, prepared.train_start, settings, seed=0)
    unit = part.values / np.linalg.norm(part.values, axis=1, keepdims=True)
    camp = prepared.users[part.rows] % 2
    alike = unit @ unit.T
    same = camp[:, None] == camp[None, :]
    # Users of one camp share two thirds of their URLs at best, and their vectors still agree.
    assert alike[same].min() > 0.9 and np.abs(alike[~same]).max() < 0.3
    (again,) = collaborative(prepared, prepared.train_start, settings, seed=0)
    np.testing.assert_array_equal(part.values, again.values)
    (few,) = collaborative(prepared, prepared.train_start, replace(settings, cf_users=30), seed=0)
    assert few.values.shape == part.values.shape and not np.array_equal(few.values, part.values)
