"""What the network knows of users whose events it has read, kept on disk in chunks so that an update can go on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_kernels.cache import RaggedKVCache, _Packed
from runkit.files import atomic_folder, file_hash, write_json
from ubt.config import EmbedConfig
from ubt.model import State, Summary


@dataclass
class Chunk:
    """The states of some users.

    Args:
        rows: numbers of the users [b]
        state: what the network knows of them
    """

    rows: Tensor
    state: State


def read_chunk(path: Path) -> tuple[NDArray[np.int64], State]:
    """Return the rows and states of a chunk; a file is data and runs no code.

    Raises:
        ValueError: if it holds anything else
    """
    try:
        with torch.serialization.safe_globals([Chunk, State, Summary, RaggedKVCache, _Packed]):
            chunk = torch.load(path, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: got {reason}, needs what `ubt embed` kept; run it again") from None
    if not isinstance(chunk, Chunk):
        raise ValueError(f"{path}: got {type(chunk).__name__}, needs what `ubt embed` kept; run it again")
    return chunk.rows.numpy(), chunk.state


class CacheWriter:
    """Writes chunks of states to a new folder, which replaces the old one when all is well.

    Args:
        folder: where the chunks go; None keeps nothing
        limit: bytes that may be kept; users beyond are not kept
    """

    def __init__(self, folder: Path | None, limit: float):
        self.folder, self.limit, self.bytes, self.chunks = folder, limit, 0, 0

    @property
    def full(self) -> bool:
        """Whether nothing more is kept."""
        return self.folder is None or self.bytes >= self.limit

    def add(self, rows: NDArray[np.int64], state: State) -> None:
        """Keep the states of users, unless the limit is reached."""
        if self.full or not len(rows):
            return
        path = self._next()
        torch.save(Chunk(torch.from_numpy(rows), state), path)
        self.bytes += path.stat().st_size

    def keep(self, path: Path) -> None:
        """Take over a chunk of the old folder as it is."""
        os.link(path, self._next())
        self.bytes += path.stat().st_size

    def finish(
        self, counts: NDArray[np.int64], moment: int, checkpoint: str | Path, embeddings: Path, cache: str | Path
    ) -> None:
        """Note what the embeddings were made of: events of every user [U], time and network, and where they lie."""
        assert self.folder is not None
        np.save(self.folder / "counts.npy", counts)
        state = {"moment": moment, "checkpoint": file_hash(checkpoint), "embeddings": place(embeddings, cache)}
        write_json(self.folder / "state.json", state)

    def _next(self) -> Path:
        assert self.folder is not None
        self.chunks += 1
        return self.folder / f"{self.chunks:06d}.pt"


@contextmanager
def cache_writer(folder: str | Path | None, config: EmbedConfig) -> Iterator[CacheWriter]:
    """Give a writer to a new folder that takes the place of `folder` when the block ends well."""
    if folder is None:
        yield CacheWriter(None, 0)
        return
    with atomic_folder(folder, "ubt cache") as new:
        yield CacheWriter(new, config.cache_gb * 1e9)


def place(embeddings: str | Path, cache: str | Path) -> str:
    """Return where embeddings lie as seen from their cache, which a run that moves as a whole keeps."""
    return os.path.relpath(Path(embeddings).resolve(), Path(cache).resolve())
