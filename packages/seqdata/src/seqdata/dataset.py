"""Batches of a view for torch: worker processes, ranks, and a state that resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from seqdata.batching import Batching
from seqdata.gather import Batch, Gather
from seqdata.jagged import Jagged
from seqdata.view import View

# Handing a batch from a worker to this process takes as long as gathering some ten thousand events.
MESSAGE_EVENTS, MESSAGE_BATCHES = 100_000, 64


class SequenceDataset(IterableDataset):
    """The batches of a view as torch tensors, dealt out to ranks and worker processes.

    `SequenceLoader` is the loader to use. A plain `torch.utils.data.DataLoader(dataset)` gives the same batches; it
    repeats the epoch that `set_epoch` named, as torch's DistributedSampler does.

    Args:
        view: which events of which users
        batch_size, max_tokens, shuffle, seed, fields, max_len, drop_empty, length_pool: as in `View.batches`
        transform: called on every torch Batch, in the worker
        rank, world_size: rank r gets the batches r, r + world_size, ... of the one global order, so no user is seen
            twice or left out
    """

    def __init__(
        self,
        view: View,
        batch_size: int | None = None,
        *,
        max_tokens: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        fields: Sequence[str] | None = None,
        max_len: int | None = None,
        drop_empty: bool = False,
        length_pool: int | None = None,
        transform: Callable[[Batch], Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size is None and max_tokens is None:
            raise ValueError("SequenceDataset: needs batch_size (users) or max_tokens (events)")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}: needs 0 <= rank < world_size")
        self.view, self.fields, self.transform = view, fields, transform
        self.rank, self.world_size = rank, world_size
        self.batching = Batching(batch_size, max_tokens, shuffle, seed, max_len, drop_empty, length_pool)
        # in shared memory, because workers that live for many epochs have to see what changes here
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._counted: dict[int, int] = {}
        # a wrong field fails here and not in a worker
        Gather(view.store, fields)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch that the next iteration gives, and the number of global batches that it skips.

        Args:
            epoch: number of the epoch, which the order of a shuffling dataset depends on
            start: global batches to skip, those of all ranks counted
        """
        self._state[0], self._state[1] = epoch, start

    @property
    def options(self) -> dict[str, Any]:
        """What the order of the batches depends on."""
        return asdict(self.batching)

    def __len__(self) -> int:
        """Batches of this rank in the whole epoch."""
        return self.count(int(self._state[0]))

    def count(self, epoch: int) -> int:
        """Batches of this rank in an epoch."""
        epoch = epoch if self.batching.shuffle else 0
        if epoch not in self._counted:
            self._counted = {epoch: self.batching.count(self.view.lengths(), epoch)}
        return len(range(self.rank, self._counted[epoch], self.world_size))

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        gather = Gather(self.view.store, self.fields)
        for rows in islice(self.rows(), number, None, workers):
            batch = self.view.batch(rows, gather, self.batching.max_len).torch()
            yield batch if self.transform is None else self.transform(batch)

    def rows(self) -> Iterator[np.ndarray]:
        """Rows of the view that make each of this rank's batches, in the epoch and from the start that were set."""
        epoch, start = self._state.tolist()
        return islice(self.view.rows(self.batching, epoch, start), self.rank, None, self.world_size)


class SequenceLoader:
    """Iterates a SequenceDataset epoch by epoch; `state_dict` says where it stands, whatever the number of workers.

    Every epoch has its own order where the dataset shuffles, with persistent workers too.

    Args:
        dataset: the batches
        num_workers: worker processes, 0 loads here
        pin_memory: for fast copies to a GPU
        options: more arguments of torch.utils.data.DataLoader, such as persistent_workers or prefetch_factor
    """

    def __init__(
        self, dataset: SequenceDataset, *, num_workers: int = 0, pin_memory: bool = False, **options: Any
    ) -> None:
        self.dataset, self.epoch, self.position = dataset, 0, 0
        self._grouped = num_workers > 0 and dataset.transform is None
        self._loader = DataLoader(
            _Messages(dataset) if self._grouped else dataset,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            **options,
        )

    def __len__(self) -> int:
        """Batches of this rank in the current epoch, those already given among them."""
        return self.dataset.count(self.epoch)

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch; the next call then begins the next one."""
        self.dataset.set_epoch(self.epoch, self.position)
        for batch in chain.from_iterable(map(_split, self._loader)) if self._grouped else self._loader:
            self.position += self.dataset.world_size
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of global batches handed out, with what the order depends on."""
        return {"epoch": self.epoch, "position": self.position, "options": self.dataset.options}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; the options that order the batches must be the same.

        Args:
            state: what `state_dict` gave

        Raises:
            ValueError: the dataset has other options than the one the state was taken of; names them
        """
        if state["options"] != self.dataset.options:
            changed = {
                key: (state["options"].get(key), value)
                for key, value in self.dataset.options.items()
                if state["options"].get(key) != value
            }
            raise ValueError(f"load_state_dict: the state was taken with other options (then, now): {changed}")
        self.epoch, self.position = state["epoch"], state["position"]


class _Messages(IterableDataset):
    """The batches of a dataset, several at once as one Batch with their numbers of users, so that workers pay."""

    def __init__(self, dataset: SequenceDataset) -> None:
        self.dataset = dataset
        batching, view = dataset.batching, dataset.view
        each = view.num_events / max(len(view), 1) * (batching.batch_size or np.inf)
        each = max(min(each, batching.max_tokens or np.inf), 1)
        self.size = int(min(max(MESSAGE_EVENTS // each, 1), MESSAGE_BATCHES))

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        view, most = self.dataset.view, self.dataset.batching.max_len
        gather, rows, turn = Gather(view.store, self.dataset.fields), self.dataset.rows(), 0
        while group := list(islice(rows, self.size)):
            if turn % workers == number:
                yield view.batch(np.concatenate(group), gather, most).torch(), [len(one) for one in group]
            turn += 1


def _split(message: tuple[Batch, list[int]]) -> Iterator[Batch]:
    batch, sizes = message
    values, offsets, low = batch.jagged.values, batch.jagged.offsets, 0
    for size in sizes:
        high = low + size
        begin, end = int(offsets[low]), int(offsets[high])
        jagged = Jagged({name: one[begin:end] for name, one in values.items()}, offsets[low : high + 1] - begin)
        yield Batch(batch.users[low:high], batch.user_index[low:high], jagged)
        low = high


def _joined(batches: Sequence[Batch], **_: Any) -> Batch:
    """Batches one after the other as one, which is how torch's DataLoader puts samples together."""
    if len(batches) == 1:
        return batches[0]
    lengths = torch.cat([torch.as_tensor(one.jagged.lengths) for one in batches])
    values = {name: torch.cat([one.jagged[name] for one in batches]) for name in batches[0].jagged.values}
    users = [one.users for one in batches]
    return Batch(
        torch.cat(users) if isinstance(users[0], torch.Tensor) else np.concatenate(users),
        torch.cat([one.user_index for one in batches]),
        Jagged(values, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))),
    )


default_collate_fn_map[Batch] = _joined
