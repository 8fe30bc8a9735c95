"""Write one vector per user asked for, streamed to disk, in the form the challenge accepts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from runkit.files import atomic_file, file_hash, read_json, write_json
from runkit.progress import progress
from seqdata import View
from ubt.batches import Reader
from ubt.config import EmbedConfig
from ubt.encoder import no_events
from ubt.model import UniversalBehavioralTransformer
from ubt.prepare import Prepared, seconds
from ubt.states import CacheWriter, cache_writer
from ubt.train import load

BATCH_EVENTS = 16_384
BATCH_USERS = 1024


def embed(
    prepared: Prepared,
    checkpoint: str | Path,
    folder: str | Path,
    cache: str | Path | None = None,
    config: EmbedConfig | None = None,
) -> tuple[int, int, int]:
    """Write ``embeddings.npy`` float16 [U, D] and ``client_ids.npy`` [U] from every user's events before train_start.

    Rows stand in the order of relevant_clients.npy. A user without any event before train_start gets the
    network's one vector of an empty history, so no user is left out. Memory does not grow with the users.

    Args:
        prepared: the log
        checkpoint: trained network
        folder: where the two files go
        cache: folder in which keys, values and sums of the users' events are kept for `update`; None keeps nothing
        config: how much is kept

    Returns:
        Users, width of the vectors, users without an event.

    Raises:
        ValueError: if a vector is not finite in float16; names the first such user
    """
    folder = Path(folder)
    network, reader = load(checkpoint, prepared)
    made_of = Made(prepared.fingerprint, file_hash(checkpoint), seconds(prepared.train_start))
    view = prepared.history(prepared.train_start)
    moment = seconds(prepared.train_start)
    with torch.inference_mode():
        nobody = network(no_events(reader.families, 1), torch.tensor([moment]))[0].numpy()
    nobody = finite(nobody, np.array(["without events"]))
    shape = (len(prepared.users), nobody.shape[1])
    counts = np.zeros(len(prepared.users), np.int64)
    counts[prepared.known] = view.lengths()
    rows = prepared.known
    if cache is not None:
        # Who was seen lately comes back soonest: with such users side by side, an update touches few chunks.
        order = np.argsort(_newest(view), kind="stable")
        rows, view = rows[order], view.at(order)
    with cache_writer(cache, config or EmbedConfig()) as writer:
        with atomic_file(folder / "embeddings.npy") as name:
            out = np.lib.format.open_memmap(name, mode="w+", dtype=np.float16, shape=shape)
            with progress(len(view), "embed", unit="user") as bar:
                for some, vectors in embed_users(network, reader, view, rows, moment, writer):
                    out[some] = finite(vectors, prepared.users[some])
                    bar.update(len(some))
            for start in range(0, len(counts), 1 << 16):
                lost = start + np.flatnonzero(counts[start : start + (1 << 16)] == 0)
                out[lost] = nobody
            out.flush()
            del out
        with atomic_file(folder / "client_ids.npy") as name:
            np.save(name, prepared.users)
        made_of.write(folder)
        if cache is not None:
            writer.finish(counts, moment, checkpoint, folder, cache)
    return (*shape, int((counts == 0).sum()))


def embed_users(
    network: UniversalBehavioralTransformer,
    reader: Reader,
    view: View,
    rows: NDArray[np.int64],
    moment: int,
    writer: CacheWriter,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield rows [b] and vectors [b, D] of the users of a view, batch by batch, from their events alone.

    Args:
        network: trained network
        reader: what feeds it
        view: events before `moment`
        rows: number of each of the view's users [n], which is handed back
        moment: the time of the vectors, seconds since 1970
        writer: keeps the states of users whose events the network reads in full
    """
    limit = network.max_seq_length
    batches = view.batches(BATCH_USERS, max_tokens=max(BATCH_EVENTS, limit), fields=reader.fields, max_len=limit)
    whole, at = view.lengths() <= limit, 0
    with torch.inference_mode():
        for batch in batches:
            mine = slice(at, at + len(batch))
            at += len(batch)
            if writer.full:
                vectors = network(reader.sequences(batch), torch.tensor([moment]))[:, 0]
            else:
                vectors, state = network.advance(network.start(len(batch), moment), reader.sequences(batch), moment)
                kept = np.flatnonzero(whole[mine])
                writer.add(rows[mine][kept], state.select(torch.from_numpy(kept)))
            yield rows[mine], vectors.numpy()


@dataclass
class Made:
    """What embeddings were made of, noted beside them.

    Args:
        log: fingerprint of the prepared log
        checkpoint: hash of the network
        moment: events before it count, seconds since 1970
    """

    log: str
    checkpoint: str
    moment: int

    def write(self, folder: Path) -> None:
        """Note it in the folder of the embeddings."""
        write_json(folder / "made_of.json", asdict(self))


def check_made_of(folder: str | Path, prepared: Prepared, checkpoint: str | Path) -> None:
    """Raise ValueError if embeddings are not those of this log and network at train_start, and say what helps.

    Embeddings that came without ``made_of.json``, from somewhere else, are taken as they are.
    """
    found = read_json(Path(folder) / "made_of.json")
    if not found:
        return
    made_of, again = Made(**found), "run `ubt embed` again"
    if made_of.log != prepared.fingerprint:
        raise ValueError(f"{folder}: the embeddings are of another log or other settings of it; {again}")
    if Path(checkpoint).exists() and made_of.checkpoint != file_hash(checkpoint):
        raise ValueError(f"{folder}: the embeddings were made with another network than {checkpoint}; {again}")
    if made_of.moment != seconds(prepared.train_start):
        moment = datetime.fromtimestamp(made_of.moment, timezone.utc).replace(tzinfo=None)
        raise ValueError(
            f"{folder}: `ubt update` brought the embeddings to {moment}, and what is scored is made of events before "
            f"{prepared.train_start}; {again}"
        )


def _newest(view: View) -> NDArray[np.int64]:
    """Time of the newest event of every user of a view, 0 without events [n]."""
    first, last = view.bounds
    return np.where(last > first, view.store.time[np.maximum(last - 1, 0)], 0)


def finite(vectors: NDArray[np.float32], users: NDArray) -> NDArray[np.float16]:
    """Return vectors as they are written; a ValueError names the first of the `users` whose vector does not fit."""
    # What does not fit float16 becomes infinite here.
    with np.errstate(over="ignore"):
        narrow = vectors.astype(np.float16)
    fits = np.isfinite(narrow).all(1)
    if not fits.all():
        raise ValueError(f"embedding of client {users[~fits][0]} is not finite in float16")
    return narrow
