"""Loading for torch: workers, ranks and resuming."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

import seqdata
from seqdata import SequenceDataset, SequenceLoader


@pytest.fixture
def view(tmp_path, oracle):
    store = seqdata.build(oracle.log(), tmp_path / "s", user="user", time="time", time_unit="s", progress=False)
    return store.as_of(500 * 1_000_000)


def seen(loader) -> list[list[int]]:
    return [batch.users.tolist() for batch in loader]


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"max_tokens": 120}])
def test_workers_change_nothing(view, options):
    dataset = SequenceDataset(view, shuffle=True, seed=4, **options)
    alone = seen(SequenceLoader(dataset))
    assert alone == seen(SequenceLoader(dataset, num_workers=2))
    assert alone == [batch.users.tolist() for batch in view.batches(shuffle=True, seed=4, **options)]
    batch = next(iter(SequenceLoader(dataset)))
    assert isinstance(batch.jagged["item"], torch.Tensor)
    assert batch.jagged.offsets.dtype == torch.int64


def test_epochs_differ(view):
    loader = SequenceLoader(SequenceDataset(view, 7, shuffle=True))
    first, second = seen(loader), seen(loader)
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second))


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (1, 2)])
def test_resume_is_exact_whatever_the_workers(view, workers):
    options = {"shuffle": True, "seed": 9, "max_tokens": 100}
    loader = SequenceLoader(SequenceDataset(view, **options), num_workers=workers[0])
    whole = seen(loader) + seen(loader)
    loader = SequenceLoader(SequenceDataset(view, **options), num_workers=workers[0])
    done = seen(loader)
    rest = iter(loader)
    for _ in range(5):
        done.append(next(rest).users.tolist())
    state = loader.state_dict()
    again = SequenceLoader(SequenceDataset(view, **options), num_workers=workers[1])
    again.load_state_dict(state)
    assert done + seen(again) == whole
    assert again.state_dict()["epoch"] == 2
    other = SequenceLoader(SequenceDataset(view, 3, shuffle=True))
    with pytest.raises(ValueError, match="other options"):
        other.load_state_dict(state)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_without_duplicates_or_losses(view, world, workers):
    pieces = []
    for rank in range(world):
        dataset = SequenceDataset(view, 7, shuffle=True, rank=rank, world_size=world)
        pieces.append(list(chain(*seen(SequenceLoader(dataset, num_workers=workers)))))
    assert sorted(chain(*pieces)) == view.users.tolist()
    assert len({len(piece) for piece in pieces}) <= 2


def test_transform_runs_in_the_worker(view):
    dataset = SequenceDataset(view, 7, transform=lambda batch: batch.jagged.offsets[-1])
    assert sum(int(n) for n in SequenceLoader(dataset)) == view.num_events


def test_bad_arguments(view):
    with pytest.raises(ValueError, match="needs batch_size"):
        SequenceDataset(view)
    with pytest.raises(ValueError, match="rank=2"):
        SequenceDataset(view, 3, rank=2, world_size=2)
    with pytest.raises(KeyError, match="no field 'x'"):
        SequenceDataset(view, 3, fields=["x"])


def test_values_equal_the_store(view):
    for batch in SequenceLoader(SequenceDataset(view, 11, fields=["item"])):
        for i, index in enumerate(batch.user_index.tolist()):
            first, last = view.bounds[0][index], view.bounds[1][index]
            piece = batch.jagged["item"][batch.jagged.offsets[i] : batch.jagged.offsets[i + 1]]
            assert np.array_equal(piece.numpy(), view.store.column("item")[first:last])


def test_batches_move_and_pin(view):
    batch = next(iter(SequenceLoader(SequenceDataset(view, 7))))
    moved = batch.to("meta")
    assert moved.jagged["item"].device.type == "meta"
    assert moved.jagged.offsets.device.type == "meta"
    assert moved.users.tolist() == batch.users.tolist()


@pytest.mark.gpu
def test_pinned_loading(view):
    loader = SequenceLoader(SequenceDataset(view, 7), num_workers=2, pin_memory=True)
    for batch in loader:
        assert batch.jagged["item"].is_pinned()
        assert batch.to("cuda", non_blocking=True).jagged["item"].is_cuda
