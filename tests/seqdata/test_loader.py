"""Loading for torch: workers, ranks and resuming."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

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


@pytest.mark.parametrize("workers", [{"multiprocessing_context": "fork"}, {"multiprocessing_context": "spawn"}])
def test_persistent_workers_shuffle_anew_and_resume(view, workers):
    options = {"shuffle": True, "seed": 2, "max_tokens": 150}
    alone = SequenceLoader(SequenceDataset(view, **options))
    epochs = [seen(alone) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    loader = SequenceLoader(SequenceDataset(view, **options), num_workers=2, persistent_workers=True, **workers)
    assert [seen(loader) for _ in range(2)] == epochs[:2]
    loader.load_state_dict({"epoch": 0, "position": 5, "options": loader.dataset.options})
    assert [seen(loader) for _ in range(3)] == [epochs[0][5:], *epochs[1:]]
    # given up in the middle, and on from there
    loader.load_state_dict({"epoch": 0, "position": 0, "options": loader.dataset.options})
    some = [batch.users.tolist() for _, batch in zip(range(3), loader, strict=False)]
    assert some + seen(loader) + seen(loader) == epochs[0] + epochs[1]


def test_workers_read_the_store_that_the_view_was_made_of(view, oracle):
    dataset = SequenceDataset(view, 7, fields=["item", "row"])
    before = [batch.jagged["row"].tolist() for batch in SequenceLoader(dataset)]
    loader = SequenceLoader(dataset, num_workers=2, multiprocessing_context="spawn")
    for seed in (1, 2):
        seqdata.append(seqdata.open_store(view.store.path), oracle.log(seed), progress=False)
    assert [batch.jagged["row"].tolist() for batch in loader] == before


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"max_tokens": 120}, {"batch_size": 7, "length_pool": 30}])
@pytest.mark.parametrize("world", [1, 3])
def test_lengths_are_known(view, options, world):
    for rank in range(world):
        dataset = SequenceDataset(view, shuffle=True, rank=rank, world_size=world, **options)
        loader = SequenceLoader(dataset)
        for _ in range(2):
            expected = len(loader)
            assert len(seen(loader)) == expected
        assert len(dataset) == len(DataLoader(dataset)) == len(list(DataLoader(dataset)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_dataloader_gives_the_same_batches(view, workers):
    dataset = SequenceDataset(view, 7, shuffle=True, seed=5)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected = [batch.users.tolist() for batch in view.batches(7, shuffle=True, seed=5, epoch=epoch)]
        assert seen(DataLoader(dataset, num_workers=workers)) == expected
        assert seen(DataLoader(dataset, batch_size=None, num_workers=workers)) == expected
    # samples put together are one longer batch
    pairs = list(DataLoader(dataset, batch_size=2))
    assert [one.users.tolist() for one in pairs] == [[*chain(*expected[i : i + 2])] for i in range(0, len(expected), 2)]
    whole = view.select(pairs[0].users.numpy()).gather(["item"])
    assert torch.equal(pairs[0].jagged["item"], torch.as_tensor(whole["item"]))
    assert torch.equal(pairs[0].jagged.offsets, torch.as_tensor(whole.offsets))


def test_batches_of_workers_equal_those_made_here(view):
    dataset = SequenceDataset(view, 7, shuffle=True, max_len=5)
    for one, other in zip(SequenceLoader(dataset), SequenceLoader(dataset, num_workers=2), strict=True):
        assert torch.equal(one.users, other.users) and torch.equal(one.user_index, other.user_index)
        assert torch.equal(one.jagged.offsets, other.jagged.offsets)
        for name, values in one.jagged.values.items():
            assert torch.equal(values.nan_to_num(-1), other.jagged[name].nan_to_num(-1))


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
