"""Keys and values of past events, so that new events of each user are attended without computing the old ones again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_kernels.problem import check_integers, check_offsets, check_timestamps


class RaggedKVCache:
    """Keys and values of every layer for a batch of users, each with its own number of events.

    ``HSTU.forward(cache=cache)`` takes the new rows of each user (any number, none too) and appends them. Row b of a
    batch is user b of the cache; ``add_users`` and ``select`` add, drop and reorder users in between.
    For inference: what is stored carries no gradient.

    Args:
        num_users: users at the start, all without events.
        page_size: None keeps each layer packed, ready to be attended; a number (64, say) keeps pages of that many rows,
            so that appending and dropping users moves nothing, and gathers the rows when they are attended.
    """

    def __init__(self, num_users: int = 0, *, page_size: int | None = None) -> None:
        if page_size is not None and page_size < 1:
            raise ValueError(f"page_size: got {page_size}, needs None or 1 and more")
        self.page_size = page_size
        self._lengths = [0] * num_users
        self._timestamps: Tensor | None = None
        self._layers: dict[int, _Packed | _Paged] = {}
        self._pages: list[list[int]] = [[] for _ in range(num_users)]
        self._free: list[int] = []
        self._num_pages = 0

    @property
    def num_users(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Number of rows of each user."""
        return list(self._lengths)

    def add_users(self, count: int) -> None:
        """Append ``count`` users without events."""
        self._lengths += [0] * count
        self._pages += [[] for _ in range(count)]

    def select(self, users: Sequence[int] | Tensor) -> None:
        """Keep these users, in this order, and drop all others.

        Raises:
            ValueError: a user is not in the cache, or is named twice.
        """
        users = [int(u) for u in users]
        for u in users:
            if not 0 <= u < self.num_users:
                raise ValueError(f"users: got {u}, needs 0 to {self.num_users - 1}")
        if len(set(users)) != len(users):
            raise ValueError("users: got a user twice, needs each at most once")
        starts = _starts(self._lengths)
        rows = torch.tensor([r for u in users for r in range(starts[u], starts[u + 1])], dtype=torch.int64)
        if self._timestamps is not None:
            self._timestamps = self._timestamps[rows.to(self._timestamps.device)]
        for layer in self._layers.values():
            if isinstance(layer, _Packed):
                layer.select(rows)
        kept = set(users)
        for u, pages in enumerate(self._pages):
            if u not in kept:
                self._free += pages
        self._pages = [self._pages[u] for u in users]
        self._lengths = [self._lengths[u] for u in users]

    def begin(self, x: Tensor, offsets: Tensor, timestamps: Tensor | None) -> "CacheStep":
        """Open a step that appends rows offsets[b]..offsets[b + 1] of x to user b; it counts when it is committed.

        Raises:
            ValueError: the offsets do not fit x, the batch has not as many users as the cache, timestamps do not fit or
                come in some steps only.
        """
        check_integers("offsets", offsets, x.device)
        if not len(offsets):
            raise ValueError("offsets: got no element, needs batch + 1 elements")
        new = check_offsets("offsets", offsets.tolist(), len(x), "x")
        if timestamps is not None:
            check_timestamps(timestamps, len(x), x.device)
        if len(new) != self.num_users:
            raise ValueError(
                f"offsets: got {len(new)} sequences, needs one for each of the {self.num_users} cached users"
            )
        if sum(self._lengths) and (timestamps is None) != (self._timestamps is None):
            raise ValueError("timestamps: got them in some steps only, needs them in all steps or in none")
        return CacheStep(self, offsets, new, timestamps)


class CacheStep:
    """The rows that one forward pass appends; ``offsets`` and ``timestamps`` are those of all rows, old and new."""

    def __init__(self, cache: RaggedKVCache, offsets: Tensor, new: list[int], timestamps: Tensor | None) -> None:
        self._cache = cache
        self._old = cache._lengths
        self._total = [a + b for a, b in zip(self._old, new, strict=True)]
        self.q_offsets = offsets
        starts = _starts(self._total)
        self.offsets = torch.tensor(starts, dtype=torch.int64, device=offsets.device)
        # Where old and new rows go in the packed order of all rows.
        old = [starts[b] + r for b, n in enumerate(self._old) for r in range(n)]
        fresh = [starts[b] + self._old[b] + r for b, n in enumerate(new) for r in range(n)]
        self.old_at = torch.tensor(old, dtype=torch.int64, device=offsets.device)
        self.new_at = torch.tensor(fresh, dtype=torch.int64, device=offsets.device)
        self.timestamps = None
        if timestamps is not None:
            self.timestamps = self.merge(cache._timestamps, timestamps)
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots: Tensor | None = None
        if cache.page_size is not None:
            self.slots = self._reserve_pages(cache.page_size).to(offsets.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new rows of a layer and return all of its keys and values, packed."""
        store = self._cache._layers.get(layer)
        if self.slots is None:
            assert store is None or isinstance(store, _Packed)
            old = (None, None) if store is None else (store.k, store.v)
            both = (self.merge(old[0], k.detach()), self.merge(old[1], v.detach()))
            self._packed[layer] = both
            return both
        if store is None:
            store = self._cache._layers[layer] = _Paged(k, v)
        assert isinstance(store, _Paged) and self._cache.page_size is not None
        store.grow(self._cache._num_pages * self._cache.page_size)
        store.k[self.slots[self.new_at]] = k.detach()
        store.v[self.slots[self.new_at]] = v.detach()
        return store.k[self.slots], store.v[self.slots]

    def commit(self) -> None:
        """Make the new rows part of the cache."""
        self._cache._lengths = self._total
        self._cache._timestamps = self.timestamps
        for layer, (k, v) in self._packed.items():
            self._cache._layers[layer] = _Packed(k, v)

    def merge(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Return old and new rows in one packed tensor."""
        merged = new.new_empty(len(self.old_at) + len(self.new_at), *new.shape[1:])
        if old is not None and len(self.old_at):
            merged[self.old_at] = old
        merged[self.new_at] = new
        return merged

    def _reserve_pages(self, size: int) -> Tensor:
        """Give every user the pages it needs and return the slot of each row."""
        cache, slots = self._cache, []
        for pages, length in zip(cache._pages, self._total, strict=True):
            while len(pages) * size < length:
                if not cache._free:
                    more = max(8, cache._num_pages)
                    cache._free += range(cache._num_pages + more - 1, cache._num_pages - 1, -1)
                    cache._num_pages += more
                pages.append(cache._free.pop())
            table = torch.tensor(pages, dtype=torch.int64)
            row = torch.arange(length)
            slots.append(table[row // size] * size + row % size)
        return torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64)


class _Packed:
    """One layer, rows of all users one after another."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.k.device)
        self.k, self.v = self.k[rows], self.v[rows]


class _Paged:
    """One layer, a pool of slots that grows by whole pages."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = (x.detach().new_empty(0, *x.shape[1:]) for x in (k, v))

    def grow(self, slots: int) -> None:
        if len(self.k) < slots:
            self.k, self.v = (torch.cat([x, x.new_empty(slots - len(x), *x.shape[1:])]) for x in (self.k, self.v))


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    return starts
