"""New days of a log: only users with new events are embedded, from the cache, and as a full run would embed them."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import seqdata
import ubt.update
from runkit.files import file_hash
from runkit.training import load_checkpoint, save_checkpoint
from synthlogs.shop import TABLES
from ubt.config import Config, EmbedConfig, LogConfig, UpdateConfig
from ubt.embed import cache_writer, check_made_of, embed, embed_users
from ubt.model import UniversalBehavioralTransformer
from ubt.prepare import Prepared
from ubt.train import load, train
from ubt.update import append_days, update

CUTOFF = "2022-10-13 00:00:00"


@pytest.fixture
def config(tiny: Config) -> Config:
    return replace(tiny, train=replace(tiny.train, num_epochs=1), embed=EmbedConfig(1.0))


@pytest.fixture
def checkpoint(prepared: Prepared, config: Config) -> Path:
    return train(prepared, config)


def embedded(prepared: Prepared, config: Config, checkpoint: Path) -> np.ndarray:
    embed(prepared, checkpoint, config.embeddings, Path(config.run_dir) / "cache", config.embed)
    return np.load(config.embeddings / "embeddings.npy")


def updated(prepared: Prepared, config: Config, checkpoint: Path, until: str | None = None) -> tuple[np.ndarray, tuple]:
    config = replace(config, update=UpdateConfig(until=until))
    facts = update(prepared, checkpoint, config.embeddings, Path(config.run_dir) / "cache", config)
    return np.load(config.embeddings / "embeddings.npy"), facts


def in_full(prepared: Prepared, checkpoint: Path, until: str) -> np.ndarray:
    """What `embed` computes from all events before a moment, in float32."""
    network, reader = load(checkpoint, prepared)
    moment = int(pd.Timestamp(until, tz="UTC").timestamp())
    result = np.zeros((len(prepared.users), 12), np.float32)
    with cache_writer(None, EmbedConfig()) as nothing:
        view = prepared.store.as_of(until).select(prepared.users[prepared.known])
        for rows, vectors in embed_users(network, reader, view, prepared.known, moment, nothing):
            result[rows] = vectors
    return result


def lengths(prepared: Prepared, until: str) -> np.ndarray:
    counts = np.zeros(len(prepared.users), np.int64)
    counts[prepared.known] = prepared.store.as_of(until).select(prepared.users[prepared.known]).lengths()
    return counts


def test_users_with_new_events_get_the_row_of_a_full_run_and_the_others_keep_theirs(
    prepared: Prepared, config: Config, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = embedded(prepared, config, checkpoint)
    attended = []
    advance = UniversalBehavioralTransformer.advance

    def watched(self: object, state: object, events: object, moment: int) -> tuple:
        found = advance(self, state, events, moment)
        attended.append((len(events.timestamps), found[0]))
        return found

    monkeypatch.setattr(UniversalBehavioralTransformer, "advance", watched)
    moments = [CUTOFF, "2022-10-16 07:00:00", "2022-10-16 07:00:00", "2022-10-29 00:00:00"]
    longest = config.model.max_seq_length
    for last, until in pairwise(moments):
        attended.clear()
        after, (number, reused, moment) = updated(prepared, config, checkpoint, until)
        then, now = lengths(prepared, last), lengths(prepared, until)
        new = then != now
        assert moment == until and number == new.sum()
        assert reused == (new & (now <= longest) & (then > 0)).sum()
        np.testing.assert_array_equal(after[~new], before[~new])
        full = in_full(prepared, checkpoint, until)
        np.testing.assert_allclose(after[new], full[new], rtol=2e-3, atol=2e-3)
        if new.any():
            assert (new & (now > longest)).any() and (new & (then > 0) & (now <= longest)).any()
            # Cached users bring their new events only, the others all that count.
            alone = now[new & ((now > longest) | (then == 0))].clip(max=longest).sum()
            assert sum(events for events, _ in attended) <= (now - then)[new & (now <= longest)].sum() + alone
        before = after


def test_the_cache_gives_the_vectors_of_a_full_run(prepared: Prepared, config: Config, checkpoint: Path) -> None:
    network, reader = load(checkpoint, prepared)
    days = pd.to_datetime(["2022-08-01", "2022-09-11", "2022-09-12", "2022-10-13", "2022-11-01"])
    users = prepared.users[(lengths(prepared, "2022-11-01") <= config.model.max_seq_length)]
    state, last = network.start(len(users), int(days[0].timestamp())), "2000-01-01"
    with torch.inference_mode():
        for day in days:
            moment = int(day.timestamp())
            window = prepared.store.all().window(last, str(day)).select(users)
            (batch,) = window.batches(len(users), fields=reader.fields)
            vectors, state = network.advance(state, reader.sequences(batch), moment)
            full = prepared.store.as_of(str(day)).select(users)
            (batch,) = full.batches(len(users), fields=reader.fields)
            expected = network(reader.sequences(batch), torch.tensor([moment]))[:, 0]
            torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-4)
            last = str(day)


def test_users_beyond_the_limit_of_the_cache_are_embedded_in_full(
    prepared: Prepared, config: Config, checkpoint: Path
) -> None:
    config = replace(config, embed=EmbedConfig(0.0))
    embedded(prepared, config, checkpoint)
    until = "2022-10-20 00:00:00"
    after, (number, reused, _) = updated(prepared, config, checkpoint, until)
    assert number > 0 and reused == 0
    new = lengths(prepared, CUTOFF) != lengths(prepared, until)
    np.testing.assert_allclose(after[new], in_full(prepared, checkpoint, until)[new], rtol=2e-3, atol=2e-3)


def days_of(raw: Path, out: Path, start: str, end: str) -> Path:
    """The rows of every table with start <= time < end, in a folder of their own."""
    out.mkdir(parents=True)
    for table in TABLES:
        frame = pd.read_parquet(raw / f"{table}.parquet")
        inside = (frame["timestamp"] >= start) & (frame["timestamp"] < end)
        frame[inside].to_parquet(out / f"{table}.parquet", index=False)
    return out


def test_new_days_are_added_to_the_log_once_and_late_events_count(
    raw_log: Path,
    raw_copy: Path,
    tmp_path: Path,
    prepared: Prepared,
    prepare_for: Callable[..., Prepared],
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A log without the days 1-5 October and without all after the 12th, but for the purchase that places the windows.
    for table in TABLES:
        frame = pd.read_parquet(raw_copy / f"{table}.parquet")
        time = frame["timestamp"]
        keep = (time < CUTOFF) & ~((time >= "2022-10-01") & (time < "2022-10-06"))
        keep |= frame.index == time.idxmax() if table == "product_buy" else False
        frame[keep].to_parquet(raw_copy / f"{table}.parquet", index=False)
    short = replace(prepare_for(raw_copy), fingerprint=prepared.fingerprint)
    # Its vocabularies are smaller, so it has a network of its own.
    config = replace(config, run_dir=config.run_dir + "-short")
    own = train(short, config)
    embedded(short, config, own)
    late = days_of(raw_log, tmp_path / "late", "2022-10-01", "2022-10-06")
    new = days_of(raw_log, tmp_path / "new", CUTOFF, "2022-10-20")
    (late / "search_query.parquet").unlink()
    monkeypatch.setattr(ubt.update, "MOST_SHARDS", 2)
    shards = []
    # Files that were added before, or prepared in the first place, are not added again.
    for folder in (late, new, new, raw_copy):
        short = append_days(short, raw_copy, folder, config.log)
        shards.append(len(short.store.schema["shards"]))
    assert shards == [2, 1, 1, 1]
    until = "2022-10-20 00:00:00"
    after, (number, reused, _) = updated(short, config, own, until)
    # (late events make the cache of their users worthless)
    assert number > reused > 0
    expected = in_full(short, own, until)
    changed = np.isin(short.users, np.concatenate([events(late), events(new)]))
    assert changed.sum() == number
    np.testing.assert_allclose(after[changed], expected[changed], rtol=2e-3, atol=2e-3)
    assert (lengths(short, until) <= lengths(prepared, until)).all()


def new_day(raw: Path, folder: Path) -> Path:
    """A file with ten visits on a later day."""
    folder.mkdir(exist_ok=True)
    rows = pd.read_parquet(raw / "page_visit.parquet")[:10]
    rows.assign(timestamp="2022-11-20 10:00:00").to_parquet(folder / "page_visit.parquet", index=False)
    return folder


def test_a_file_that_nobody_has_read_is_new_wherever_it_lies(
    tmp_path: Path, prepare_for: Callable[..., Prepared], config: Config
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    moment = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(100), unit="h")
    frame = pd.DataFrame({"user_id": np.arange(100) % 7, "event_time": moment, "event_type": "view"})
    frame.to_parquet(folder / "a.parquet", index=False)
    log = LogConfig(files=["*.parquet"], train_start="2024-01-02", valid_start="2024-01-03")
    prepared = prepare_for(folder, files=log.files, train_start=log.train_start, valid_start=log.valid_start)
    assert prepared.store.num_events == 100
    later = frame.assign(event_time=moment + pd.Timedelta(days=30))
    later.to_parquet(folder / "b.parquet", index=False)
    for _ in range(2):
        prepared = append_days(prepared, folder, folder, log)
        assert prepared.store.num_events == 200


def test_an_append_whose_process_died_before_it_was_noted_is_not_done_again(
    prepare_for: Callable[..., Prepared],
    raw_log: Path,
    tmp_path: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared, days = prepare_for(raw_log), new_day(raw_log, tmp_path / "days")
    events = prepared.store.num_events

    append = seqdata.append

    def dies(*args: object, after: bool, **options: object) -> None:
        if after:
            append(*args, **options)
        raise KeyboardInterrupt

    for after in (False, True):
        monkeypatch.setattr(seqdata, "append", partial(dies, after=after))
        with pytest.raises(KeyboardInterrupt):
            append_days(prepared, raw_log, days, config.log)
        monkeypatch.undo()
        prepared = replace(prepared, store=seqdata.open_store(prepared.store.path))
        assert prepared.store.num_events == events + 10 * after
    assert append_days(prepared, raw_log, days, config.log).store.num_events == events + 10


def test_only_new_days_are_read_and_changed_old_ones_are_named(
    prepare_for: Callable[..., Prepared],
    raw_copy: Path,
    tmp_path: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared, days = prepare_for(raw_copy), new_day(raw_copy, tmp_path / "days")
    read = []

    def watched(path: Path) -> str:
        read.append(Path(path))
        return file_hash(path)

    monkeypatch.setattr("ubt.prepare.file_hash", watched)
    old = raw_copy / "page_visit.parquet"
    (raw_copy / "search_query.parquet").unlink()
    assert append_days(prepared, raw_copy, days, config.log).store.num_events == prepared.store.num_events + 10
    assert read == [days / "page_visit.parquet"]
    # The same content at a later time is the same file.
    os.utime(old, (1, 1))
    append_days(prepared, raw_copy, days, config.log)
    assert old in read
    pd.read_parquet(old)[1:].to_parquet(old, index=False)
    with pytest.raises(ValueError, match=r"page_visit\.parquet: has changed since `ubt prepare` read it; needs"):
        append_days(prepared, raw_copy, days, config.log)


def test_a_new_file_without_a_column_is_named(
    prepared: Prepared, config: Config, raw_copy: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    new.mkdir()
    frame = pd.read_parquet(raw_copy / "page_visit.parquet")
    frame.drop(columns="url").to_parquet(new / "page_visit.parquet", index=False)
    with pytest.raises(ValueError, match=r"page_visit\.parquet: no column 'url'"):
        append_days(prepared, raw_copy, new, config.log)


def events(folder: Path) -> np.ndarray:
    return pd.concat([pd.read_parquet(path)["client_id"] for path in folder.glob("*.parquet")]).unique()


def test_an_update_without_a_cache_or_into_the_past_says_what_helps(
    prepared: Prepared, config: Config, checkpoint: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="run `ubt embed`"):
        updated(prepared, config, checkpoint)
    embedded(prepared, config, checkpoint)
    with pytest.raises(ValueError, match="needs 2022-10-13 00:00:00 or later"):
        updated(prepared, config, checkpoint, "2022-10-12")
    with pytest.raises(ValueError, match="got 'soon'"):
        updated(prepared, config, checkpoint, "soon")
    save_checkpoint(load_checkpoint(checkpoint) | {"more": 1}, checkpoint)
    with pytest.raises(ValueError, match="with another network"):
        updated(prepared, config, checkpoint)


class Planted:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('ran')",)


def test_no_file_of_a_run_runs_code(prepared: Prepared, config: Config, checkpoint: Path) -> None:
    embedded(prepared, config, checkpoint)
    chunk = sorted((Path(config.run_dir) / "cache").glob("*.pt"))[0]
    kept = chunk.read_bytes()
    for content in (Planted(), {"rows": 1}):
        torch.save(content, chunk)
        with pytest.raises(ValueError, match=r"000001\.pt: got .* needs what `ubt embed` kept; run it again"):
            updated(prepared, config, checkpoint, "2022-10-20")
    chunk.write_bytes(kept)
    torch.save({"state_dict": Planted()}, checkpoint)
    with pytest.raises(ValueError, match=r"best\.ckpt"):
        load(checkpoint, prepared)


def test_folders_of_others_are_never_replaced(prepared: Prepared, config: Config, checkpoint: Path) -> None:
    cache = Path(config.run_dir) / "cache"
    cache.mkdir()
    (cache / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="needs another name or to be moved away"):
        embedded(prepared, config, checkpoint)
    assert (cache / "thesis.txt").read_text() == "mine"


def test_a_cache_serves_the_embeddings_it_was_kept_for(
    prepared: Prepared, config: Config, checkpoint: Path, tmp_path: Path
) -> None:
    embedded(prepared, config, checkpoint)
    other = replace(config, embeddings_dir=str(tmp_path / "other"))
    embedded(prepared, other, checkpoint)
    updated(prepared, other, checkpoint, "2022-10-20")
    with pytest.raises(ValueError, match=r"was not kept for the embeddings in .*run `ubt embed`"):
        updated(prepared, config, checkpoint, "2022-10-27")


def test_embeddings_of_another_log_network_or_moment_are_not_scored(
    prepared: Prepared, config: Config, checkpoint: Path
) -> None:
    embedded(prepared, config, checkpoint)
    check_made_of(config.embeddings, prepared, checkpoint)
    with pytest.raises(ValueError, match="of another log or other settings of it; run `ubt embed` again"):
        check_made_of(config.embeddings, replace(prepared, fingerprint="x"), checkpoint)
    updated(prepared, config, checkpoint, "2022-10-20")
    with pytest.raises(ValueError, match="brought the embeddings to 2022-10-20 00:00:00"):
        check_made_of(config.embeddings, prepared, checkpoint)
    save_checkpoint(load_checkpoint(checkpoint) | {"more": 1}, checkpoint)
    with pytest.raises(ValueError, match=r"made with another network than .*; run `ubt embed` again"):
        check_made_of(config.embeddings, prepared, checkpoint)
    # Embeddings from elsewhere come without a note.
    (config.embeddings / "made_of.json").unlink()
    check_made_of(config.embeddings, prepared, checkpoint)


def test_an_update_that_fails_leaves_everything_as_it_was(
    prepared: Prepared, config: Config, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = embedded(prepared, config, checkpoint)
    advance = UniversalBehavioralTransformer.advance

    def breaks(*arguments: object) -> tuple:
        vectors, state = advance(*arguments)
        return vectors * 1e6, state

    monkeypatch.setattr(UniversalBehavioralTransformer, "advance", breaks)
    with pytest.raises(ValueError, match="is not finite in float16"):
        updated(prepared, config, checkpoint)
    monkeypatch.undo()
    np.testing.assert_array_equal(np.load(config.embeddings / "embeddings.npy"), before)
    assert updated(prepared, config, checkpoint)[1][0] > 0
    assert sorted(path.name for path in config.embeddings.iterdir()) == [
        "client_ids.npy",
        "embeddings.npy",
        "made_of.json",
    ]
