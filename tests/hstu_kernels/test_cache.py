"""Cached steps give what one full pass gives, for random schedules of appending, dropping and reordering users."""

import random

import pytest
import torch

from hstu_kernels import HSTU, HSTULayer, RaggedKVCache

WIDTH = 12


def model(dtype=torch.float64, **options):
    torch.manual_seed(0)
    built = HSTU(2, WIDTH, 2, 5, 7, max_seqlen=200, time_buckets=30, **options).to(dtype).eval()
    for layer in built.layers:
        # Tables of the usual scale hide in rounding; these do not.
        for table in (layer.position_weight, layer.time_weight):
            if table is not None:
                torch.nn.init.normal_(table)
    return built


class History:
    """All events of one user, kept by the test."""

    def __init__(self, dtype):
        self.x, self.times = torch.empty(0, WIDTH, dtype=dtype), torch.empty(0, dtype=torch.int64)

    def extend(self, count, generator):
        fresh = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(self.x.dtype)
        start = int(self.times[-1]) if len(self.times) else 10**9
        times = start + torch.randint(0, 10**5, (count,), generator=generator).cumsum(0)
        self.x, self.times = torch.cat([self.x, fresh]), torch.cat([self.times, times])
        return fresh, times


def packed(parts):
    offsets = torch.tensor([0, *(len(x) for x, _ in parts)]).cumsum(0)
    return torch.cat([x for x, _ in parts]), offsets, torch.cat([t for _, t in parts])


@pytest.mark.parametrize("page_size", [None, 64, 3])
@pytest.mark.parametrize("schedule", range(12))
@torch.no_grad()
def test_cached_steps_equal_the_full_pass(page_size, schedule):
    draw = random.Random(schedule)
    dtype, tolerance = draw.choice([(torch.float64, 1e-11), (torch.float32, 3e-5)])
    stack = model(dtype, backend=draw.choice(["cpu", "reference"]))
    generator = torch.Generator().manual_seed(schedule)
    users = [History(dtype) for _ in range(draw.randint(1, 4))]
    cache = RaggedKVCache(len(users), page_size=page_size)
    for _ in range(8):
        new = [draw.choice([0, 1, 1, 2, draw.randint(0, 30)]) for _ in users]
        parts = [user.extend(count, generator) for user, count in zip(users, new, strict=True)]
        x, offsets, times = packed(parts)
        found = stack(x, offsets, timestamps=times, cache=cache)
        full_x, full_offsets, full_times = packed([(user.x, user.times) for user in users])
        full = stack(full_x, full_offsets, timestamps=full_times)
        last = [full[int(end) - count : int(end)] for count, end in zip(new, full_offsets[1:], strict=True)]
        torch.testing.assert_close(found, torch.cat(last), rtol=tolerance, atol=tolerance)
        assert cache.lengths == [len(user.x) for user in users]
        if draw.random() < 0.6:
            kept = draw.sample(range(len(users)), draw.randint(1, len(users)))
            cache.select(kept)
            users = [users[u] for u in kept]
        if draw.random() < 0.6:
            cache.add_users(1)
            users.append(History(dtype))


@torch.no_grad()
def test_pages_of_dropped_users_are_used_again():
    stack = model()
    cache = RaggedKVCache(1, page_size=64)
    for _ in range(50):
        cache.select([])
        cache.add_users(1)
        stack(torch.randn(130, WIDTH, dtype=torch.float64), torch.tensor([0, 130]), cache=cache)
    assert cache._num_pages == 8


@pytest.mark.parametrize("page_size", [None, 64])
@torch.no_grad()
def test_a_failed_step_leaves_the_cache_as_it_was(page_size):
    stack, cache = model(), RaggedKVCache(2, page_size=page_size)
    x, offsets = torch.randn(5, WIDTH, dtype=torch.float64), torch.tensor([0, 2, 5])
    stack(x, offsets, cache=cache)
    with pytest.raises(ValueError, match="max_seqlen"):
        stack(torch.randn(300, WIDTH, dtype=torch.float64), torch.tensor([0, 300, 300]), cache=cache)
    assert cache.lengths == [2, 3]
    found = stack(x, offsets, cache=cache)
    again = torch.cat([x[:2], x[:2], x[2:], x[2:]])
    full = stack(again, torch.tensor([0, 4, 10]))
    torch.testing.assert_close(found, torch.cat([full[2:4], full[7:10]]), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_one_layer_takes_a_cache_too():
    torch.manual_seed(0)
    layer = HSTULayer(WIDTH, 2, 4, 4, max_seqlen=9, time_buckets=None)
    cache, x = RaggedKVCache(1), torch.randn(7, WIDTH)
    parts = [layer(x[a:b], torch.tensor([0, b - a]), cache=cache) for a, b in ((0, 3), (3, 3), (3, 7))]
    torch.testing.assert_close(torch.cat(parts), layer(x, torch.tensor([0, 7])))


def test_wrong_use_is_named():
    x, offsets = torch.randn(3, WIDTH, dtype=torch.float64), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="offsets: got 1 sequences, needs one for each of the 2"):
        model()(x, offsets, cache=RaggedKVCache(2))
    with pytest.raises(ValueError, match="time_shift=0"):
        model(time_shift=1)(x, offsets, cache=RaggedKVCache(1))
    cache = RaggedKVCache(1)
    model()(x, offsets, timestamps=torch.arange(3), cache=cache)
    with pytest.raises(ValueError, match="timestamps"):
        model()(x, offsets, cache=cache)
    for users, message in (([1], "got 1, needs 0 to 0"), ([0, 0], "twice")):
        with pytest.raises(ValueError, match=message):
            cache.select(users)
    with pytest.raises(ValueError, match="page_size"):
        RaggedKVCache(page_size=0)
    for wrong, message in (([0, 2], "got 2 as last element, needs the number of rows of x, 3"), ([0, 4, 3], "a fall")):
        cache = RaggedKVCache(len(wrong) - 1, page_size=2)
        with pytest.raises(ValueError, match=message):
            model()(x, torch.tensor(wrong), cache=cache)
        assert cache.lengths == [0] * (len(wrong) - 1)
    with pytest.raises(ValueError, match=r"timestamps: got shape \[2\], needs \[3\]"):
        model()(x, offsets, timestamps=torch.arange(2), cache=RaggedKVCache(1))
