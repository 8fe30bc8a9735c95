"""Write one vector per user asked for, streamed to disk, in the form the challenge accepts."""

from __future__ import annotations

from datetime import timezone
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ubt.data import Reader
from ubt.model import Sequences, UniversalBehavioralTransformer
from ubt.prepare import Prepared
from ubt.progress import progress
from ubt.rundir import temporary_file
from ubt.train import load

BATCH_EVENTS = 16_384


def embed(prepared: Prepared, checkpoint: str | Path, folder: str | Path) -> tuple[int, int, int]:
    """Write ``embeddings.npy`` float16 [U, D] and ``client_ids.npy`` [U] from every user's events before train_start.

    Rows stand in the order of relevant_clients.npy. A user without any event before train_start gets the one vector
    that the network learned for an empty history, so no user is left out. Memory does not grow with the users.

    Returns:
        Users, width of the vectors, users without an event.

    Raises:
        ValueError: if a vector is not finite in float16; names the first such user
    """
    folder = Path(folder)
    network, reader = load(checkpoint, prepared)
    cutoff = torch.tensor([int(prepared.train_start.replace(tzinfo=timezone.utc).timestamp())])
    view = prepared.history(prepared.train_start)
    nobody = _vectors(network, _no_events(reader), cutoff)
    shape = (len(prepared.users), nobody.shape[1])
    with temporary_file(folder / "embeddings.npy") as name:
        out = np.lib.format.open_memmap(name, mode="w+", dtype=np.float16, shape=shape)
        without = np.ones(len(prepared.users), bool)
        row = 0
        batches = view.batches(
            max_tokens=max(BATCH_EVENTS, network.max_seq_length), fields=reader.fields, max_len=network.max_seq_length
        )
        with progress(len(view), "embed", unit="user") as bar:
            for batch in batches:
                vectors = _vectors(network, reader.sequences(batch), cutoff)
                rows = prepared.known[row : row + len(batch)]
                finite = np.isfinite(vectors).all(1)
                if not finite.all():
                    raise ValueError(f"embedding of client {prepared.users[rows[~finite][0]]} is not finite in float16")
                out[rows] = vectors
                without[rows] = batch.jagged.lengths == 0
                row += len(batch)
                bar.update(len(batch))
        for start in range(0, len(without), 1 << 16):
            lost = start + np.flatnonzero(without[start : start + (1 << 16)])
            out[lost] = nobody
        out.flush()
        del out
    with temporary_file(folder / "client_ids.npy") as name:
        np.save(name, prepared.users)
    return (*shape, int(without.sum()))


def _vectors(
    network: UniversalBehavioralTransformer, sequences: Sequences, cutoff: torch.Tensor
) -> NDArray[np.float16]:
    # What does not fit float16 becomes infinite and is reported by the caller.
    with torch.inference_mode(), np.errstate(over="ignore"):
        return network(sequences, cutoff)[:, 0].numpy().astype(np.float16)


def _no_events(reader: Reader) -> Sequences:
    features = {}
    for name, family in reader.families.items():
        none = torch.zeros(0, dtype=torch.int64) if family.kind == "id" else torch.zeros(0, family.size)
        features[name] = none
    return Sequences(features, torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
