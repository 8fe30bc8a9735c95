"""Batches of a view for torch: worker processes, ranks, and a state that resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from seqdata.view import Batch, Gather, View


class SequenceDataset(IterableDataset):
    """The batches of a view as torch tensors, dealt out to ranks and worker processes.

    view: which events of which users.
    batch_size, max_tokens, shuffle, seed, fields, max_len, drop_empty, length_pool: as in `View.batches`.
    transform: called on every torch Batch, in the worker.
    rank, world_size: rank r gets the batches r, r + world_size, ... of the one global order, so no user is seen twice
        or left out.
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
        self.options: dict[str, Any] = {
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "shuffle": shuffle,
            "seed": seed,
            "max_len": max_len,
            "drop_empty": drop_empty,
            "length_pool": length_pool,
        }
        self.epoch = self.start = 0
        # a wrong field fails here and not in a worker
        Gather(view.store, fields)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        gather = Gather(self.view.store, self.fields)
        plan = self.view.plan(**self.options, epoch=self.epoch, start=self.start)
        for rows in islice(plan, self.rank + number * self.world_size, None, workers * self.world_size):
            batch = self.view.batch(rows, gather, self.options["max_len"]).torch()
            yield batch if self.transform is None else self.transform(batch)


class SequenceLoader:
    """Iterates one epoch of a SequenceDataset; `state_dict` says where it stands, whatever the number of workers.

    num_workers: worker processes, 0 loads here. pin_memory: for fast copies to a GPU. options: more arguments of
    torch.utils.data.DataLoader, such as prefetch_factor.
    """

    def __init__(
        self, dataset: SequenceDataset, *, num_workers: int = 0, pin_memory: bool = False, **options: Any
    ) -> None:
        self.dataset, self.epoch, self.position = dataset, 0, 0
        self._loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, pin_memory=pin_memory, **options)

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch; the next call then begins the next one."""
        self.dataset.epoch, self.dataset.start = self.epoch, self.position
        for batch in self._loader:
            self.position += self.dataset.world_size
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of global batches handed out, with what the order depends on."""
        return {"epoch": self.epoch, "position": self.position, "options": dict(self.dataset.options)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; the options that order the batches must be the same."""
        if state["options"] != self.dataset.options:
            changed = {
                key: (state["options"].get(key), value)
                for key, value in self.dataset.options.items()
                if state["options"].get(key) != value
            }
            raise ValueError(f"load_state_dict: the state was taken with other options (then, now): {changed}")
        self.epoch, self.position = state["epoch"], state["position"]
