"""Which users make each batch, by number, by events or by like lengths, in an order that is computed and not stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from seqdata.order import Order

CHUNK = 1 << 16


@dataclass(frozen=True)
class Batching:
    """How users are put into batches; see `View.batches` for the arguments."""

    batch_size: int | None = None
    max_tokens: int | None = None
    shuffle: bool = False
    seed: int = 0
    max_len: int | None = None
    drop_empty: bool = False
    length_pool: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens", "max_len", "length_pool"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | np.integer) or value < 1):
                raise ValueError(f"{name}={value!r}: needs an integer >= 1")
        if self.batch_size is None and self.max_tokens is None:
            raise ValueError("batches: needs batch_size (users) or max_tokens (events)")

    def rows(self, lengths: np.ndarray, epoch: int = 0, start: int = 0) -> Iterator[np.ndarray]:
        """Yields the rows [b] of each batch, out of sequences of these lengths [U]; `start` batches are left out.

        Args:
            lengths: int64 [U] events of each sequence
            epoch: which the order depends on
            start: batches to leave out
        """
        rows = np.flatnonzero(lengths) if self.drop_empty else np.arange(len(lengths))
        order = Order(len(rows), self.seed, epoch, self.shuffle)
        if self.max_tokens is None and self.length_pool is None:
            yield from self._by_count(order, rows, start)
            return
        lengths = lengths if self.max_len is None else np.minimum(lengths, self.max_len)
        pieces = self._by_tokens if self.length_pool is None else self._by_length
        yield from islice(pieces(order, rows, lengths, epoch), start, None)

    def count(self, lengths: np.ndarray, epoch: int = 0) -> int:
        """Number of batches of an epoch.

        Args:
            lengths: int64 [U] events of each sequence
            epoch: which the order depends on
        """
        if self.max_tokens is None and self.length_pool is None:
            users = np.count_nonzero(lengths) if self.drop_empty else len(lengths)
            return -(-users // (self.batch_size or 1))
        return sum(1 for _ in self.rows(lengths, epoch))

    def _by_count(self, order: Order, rows: np.ndarray, start: int) -> Iterator[np.ndarray]:
        size = self.batch_size or 1
        for begin in range(start * size, len(order), size):
            yield rows[order(begin, min(begin + size, len(order)))]

    def _by_tokens(self, order: Order, rows: np.ndarray, lengths: np.ndarray, epoch: int) -> Iterator[np.ndarray]:
        held = np.zeros(0, np.int64)
        for begin in range(0, len(order), CHUNK):
            held = np.concatenate([held, rows[order(begin, min(begin + CHUNK, len(order)))]])
            final = begin + CHUNK >= len(order)
            at = 0
            for stop in self._cuts(lengths[held]):
                if stop == len(held) and not final:
                    break
                yield held[at:stop]
                at = stop
            held = held[at:]

    def _by_length(self, order: Order, rows: np.ndarray, lengths: np.ndarray, epoch: int) -> Iterator[np.ndarray]:
        pool = self.length_pool or 1
        for number, begin in enumerate(range(0, len(order), pool)):
            held = rows[order(begin, min(begin + pool, len(order)))]
            held = held[np.argsort(lengths[held], kind="stable")]
            stops = list(self._cuts(lengths[held]))
            pieces = [held[low:high] for low, high in zip([0, *stops], stops, strict=False)]
            for place in Order(len(pieces), self.seed + 1_000_003 * number, epoch, self.shuffle)(0, len(pieces)):
                yield pieces[place]

    def _cuts(self, lengths: np.ndarray) -> Iterator[int]:
        """Ends of successive batches that hold as many sequences as fit."""
        ends = np.cumsum(lengths)
        at = 0
        while at < len(lengths):
            stop = len(lengths)
            if self.max_tokens is not None:
                stop = int(np.searchsorted(ends, (ends[at - 1] if at else 0) + self.max_tokens, "right"))
            if self.batch_size is not None:
                stop = min(stop, at + self.batch_size)
            yield stop
            at = stop
