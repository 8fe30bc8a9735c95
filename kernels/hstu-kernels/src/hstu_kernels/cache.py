"""Keys and values of past events, so that new events of each user are attended without computing the old ones again."""

import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hstu_kernels.problem import check_integers, check_offsets, check_tensor, check_timestamps, check_whole

_FORMAT = "hstu_kernels.RaggedKVCache 1"


class RaggedKVCache:
    """Keys and values of every layer for a batch of users, each with its own number of events.

    ``HSTU.forward(cache=cache)`` takes the new rows of each user (any number, none too) and appends them. Row b of a
    batch is user b of the cache; ``add_users`` and ``select`` add, drop and reorder users in between.
    For inference: what is stored carries no gradient. A cache belongs to the model that filled it, and to all of its
    layers at once.

    Args:
        num_users: users at the start, all without events.
        page_size: None keeps each layer packed, ready to be attended; a number (64, say) keeps pages of that many rows,
            so that appending and dropping users moves nothing; the kernels read the pages where they lie, or gather the
            rows first where there are gradients or backend="cuda".

    Raises:
        ValueError: a number is not whole or too small.
    """

    def __init__(self, num_users: int = 0, *, page_size: int | None = None) -> None:
        num_users = _at_least("num_users", num_users, 0)
        self.page_size = None if page_size is None else _at_least("page_size", page_size, 1)
        self._owner: tuple[weakref.ref[nn.Module], ...] | None = None
        self._lengths = [0] * num_users
        self._timestamps: Tensor | None = None
        self._layers: dict[int, _Packed | _Paged] = {}
        self._pages: list[list[int]] = [[] for _ in range(num_users)]
        self._free: list[int] = []
        self._num_pages = 0

    @property
    def num_users(self) -> int:
        """Number of users, those without events too."""
        return len(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Number of rows of each user."""
        return list(self._lengths)

    def add_users(self, count: int) -> None:
        """Append ``count`` users without events.

        Args:
            count: how many, 0 or more.

        Raises:
            ValueError: the count is no whole number or negative.
        """
        count = _at_least("count", count, 0)
        self._lengths += [0] * count
        self._pages += [[] for _ in range(count)]

    def select(self, users: Sequence[int] | Tensor) -> None:
        """Keep these users, in this order, and drop all others.

        Args:
            users: numbers of the users to keep, each at most once.

        Raises:
            ValueError: a user is not in the cache, or is named twice.
        """
        users = [check_whole("users", u) for u in (users.tolist() if isinstance(users, Tensor) else users)]
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file, which takes the place of another one only when it is complete.

        Args:
            path: the file; its folder must be there.

        Raises:
            OSError: the file cannot be written.
        """
        slots = self._slots(_rows(self._lengths))
        content = {
            "format": _FORMAT,
            "page_size": self.page_size,
            "lengths": self._lengths,
            "timestamps": self._timestamps,
            "layers": [self._layers[at].packed(slots) for at in range(len(self._layers))],
        }
        final = Path(path)
        with tempfile.NamedTemporaryFile(dir=final.parent, prefix=f".{final.name}-", delete=False) as handle:
            fresh = Path(handle.name)
            try:
                torch.save(content, handle)
            except BaseException:
                fresh.unlink()
                raise
        fresh.replace(final)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> "RaggedKVCache":
        """Read a cache that ``save`` wrote; tensors and numbers only, no code.

        Args:
            path: the file.
            device: where the tensors go, by default where they were.

        Returns:
            The cache; the first model that continues it is its model from then on, and must have as many layers.

        Raises:
            OSError: there is no file, or it may not be read.
            ValueError: the file holds no cache, or one that cannot be.
        """
        try:
            content = torch.load(path, map_location=device, weights_only=True)
        except OSError:
            raise
        # What torch raises depends on what it takes a broken file for.
        except Exception as error:
            raise ValueError(f"path: got {path}, which cannot be read, needs a file of RaggedKVCache.save") from error
        if reason := _not_a_cache(content):
            raise ValueError(f"path: got {path} with {reason}, needs a file of RaggedKVCache.save")
        cache = cls(len(content["lengths"]), page_size=content["page_size"])
        offsets = torch.tensor(_starts(content["lengths"]), device=device)
        layers = content["layers"]
        if layers:
            rows, stamps = layers[0][0], content["timestamps"]
            step = cache.begin(rows, offsets.to(rows.device), stamps)
            for at, (k, v) in enumerate(layers):
                step.append(at, k, v)
            step.commit()
        return cache

    def begin(
        self, x: Tensor, offsets: Tensor, timestamps: Tensor | None, layers: Sequence[nn.Module] | None = None
    ) -> "CacheStep":
        """Open a step that appends rows offsets[b]..offsets[b + 1] of x to user b; it counts when it is committed.

        Args:
            x: the new rows [T, ...] of all users.
            offsets: int32 or int64 [B + 1], one sequence, empty or not, for each user.
            timestamps: int64 seconds [T] or None, as in the steps before.
            layers: those that are going to append, in their order; None does not ask who they are.

        Returns:
            The step.

        Raises:
            ValueError: the offsets do not fit x, the batch has not as many users as the cache, timestamps do not fit or
                come in some steps only, other layers filled the cache.
        """
        check_tensor("x", x)
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
        if not sum(self._lengths):
            self._owner, self._layers = None, {}
        elif (timestamps is None) != (self._timestamps is None):
            raise ValueError("timestamps: got them in some steps only, needs them in all steps or in none")
        if layers is not None:
            self._check_owner(layers)
        return CacheStep(self, offsets, new, timestamps, layers)

    def _check_owner(self, layers: Sequence[nn.Module]) -> None:
        if self._layers and len(layers) != len(self._layers):
            raise ValueError(
                f"cache: got {len(layers)} layers to continue it, needs the {len(self._layers)} that filled it"
            )
        if self._owner is not None and any(ref() is not x for ref, x in zip(self._owner, layers, strict=True)):
            raise ValueError("cache: got other layers than those that filled it, needs one cache for each model")

    def _slots(self, rows: list[tuple[int, int]]) -> Tensor | None:
        """Where the rows (user, row of the user) lie in the pages; None where there are none."""
        size = self.page_size
        if size is None:
            return None
        return torch.tensor([self._pages[u][r // size] * size + r % size for u, r in rows], dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        # Layers are not part of a copy; who continues one is its model.
        return self.__dict__ | {"_owner": None}


class CacheStep:
    """The rows that one forward pass appends; ``offsets`` and ``timestamps`` are those of all rows, old and new."""

    def __init__(
        self,
        cache: RaggedKVCache,
        offsets: Tensor,
        new: list[int],
        timestamps: Tensor | None,
        layers: Sequence[nn.Module] | None,
    ) -> None:
        self._cache, self._layers = cache, layers
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
        self.block_table: Tensor | None = None
        if cache.page_size is not None:
            self._reserve_pages(cache.page_size)
            slots = cache._slots(_rows(self._total))
            assert slots is not None
            self.slots = slots.to(offsets.device)
            longest = max(map(len, cache._pages), default=0)
            table = [pages + [0] * (longest - len(pages)) for pages in cache._pages]
            self.block_table = torch.tensor(table, dtype=torch.int64, device=offsets.device).view(len(table), longest)

    def append(self, layer: int, k: Tensor, v: Tensor, pages: bool = False) -> tuple[Tensor, Tensor]:
        """Add the new rows of a layer and return all of its keys and values.

        Args:
            layer: number of the layer.
            k: keys of the new rows [T, H, Dqk].
            v: values of the new rows [T, H, Dv].
            pages: return the pages [., rows of a page, H, .], which ``block_table`` is for, where the cache has any.

        Returns:
            Keys and values of all rows, old and new, packed unless pages are asked for.

        Raises:
            ValueError: dtype, device, heads or widths differ from those of the old rows.
        """
        store = self._cache._layers.get(layer)
        if store is not None and any(self._old):
            _check_alike("k", k, store.k)
            _check_alike("v", v, store.v)
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
        if pages:
            page = (-1, self._cache.page_size)
            return store.k.unflatten(0, page), store.v.unflatten(0, page)
        return store.k[self.slots], store.v[self.slots]

    def commit(self) -> None:
        """Make the new rows part of the cache."""
        self._cache._lengths = self._total
        self._cache._timestamps = self.timestamps
        for layer, (k, v) in self._packed.items():
            self._cache._layers[layer] = _Packed(k, v)
        if self._layers is not None:
            self._cache._owner = tuple(weakref.ref(layer) for layer in self._layers)

    def merge(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Return old and new rows in one packed tensor.

        Args:
            old: rows of the past of all users, packed, [T_old, ...]; None where there are none.
            new: the rows of this step [T, ...].
        """
        merged = new.new_empty(len(self.old_at) + len(self.new_at), *new.shape[1:])
        if old is not None and len(self.old_at):
            merged[self.old_at] = old
        merged[self.new_at] = new
        return merged

    def _reserve_pages(self, size: int) -> None:
        """Give every user the pages it needs; without a commit they stay, and are filled by a later step."""
        cache = self._cache
        for pages, length in zip(cache._pages, self._total, strict=True):
            while len(pages) * size < length:
                if not cache._free:
                    more = max(8, cache._num_pages)
                    cache._free += range(cache._num_pages + more - 1, cache._num_pages - 1, -1)
                    cache._num_pages += more
                pages.append(cache._free.pop())


class _Packed:
    """One layer, rows of all users one after another."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.k.device)
        self.k, self.v = self.k[rows], self.v[rows]

    def packed(self, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.k, self.v


class _Paged:
    """One layer, a pool of slots that grows by whole pages."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = (x.detach().new_empty(0, *x.shape[1:]) for x in (k, v))

    def grow(self, slots: int) -> None:
        if len(self.k) < slots:
            self.k, self.v = (torch.cat([x, x.new_empty(slots - len(x), *x.shape[1:])]) for x in (self.k, self.v))

    def packed(self, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        assert slots is not None
        slots = slots.to(self.k.device)
        return self.k[slots], self.v[slots]


def _check_alike(name: str, new: Tensor, old: Tensor) -> None:
    if (new.dtype, new.device, new.shape[1:]) != (old.dtype, old.device, old.shape[1:]):
        raise ValueError(
            f"cache: got {name} {new.dtype} {list(new.shape[1:])} on {new.device}, needs {old.dtype} "
            f"{list(old.shape[1:])} on {old.device} as in its old rows (the same model, dtype and autocast)"
        )


def _at_least(name: str, x: int, least: int) -> int:
    x = check_whole(name, x)
    if isinstance(x, bool) or x < least:
        raise ValueError(f"{name}: got {x}, needs {least} or more")
    return int(x)


def _not_a_cache(content: object) -> str | None:
    """What is wrong with the content of a file, or None."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return f"another format than {_FORMAT!r}"
    lengths, page_size, layers, stamps = (content.get(x) for x in ("lengths", "page_size", "layers", "timestamps"))
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths):
        return "lengths that are no whole numbers"
    if page_size is not None and (type(page_size) is not int or page_size < 1):
        return f"page_size {page_size!r}"
    if not isinstance(layers, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in layers):
        return "layers that are no pairs of tensors"
    for x in (x for pair in layers for x in pair):
        if not isinstance(x, Tensor) or x.dim() != 3 or len(x) != sum(lengths):
            return "keys or values that do not fit its lengths"
    if sum(lengths) and not layers:
        return "lengths but no layers"
    if stamps is not None and not (isinstance(stamps, Tensor) and stamps.shape == (sum(lengths),)):
        return "timestamps that do not fit its lengths"
    return None


def _rows(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """User and row of the user for all rows."""
    return [(u, r) for u, n in enumerate(lengths) for r in range(n)]


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    return starts
