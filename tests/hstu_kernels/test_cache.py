"""Cached steps give what one full pass gives, for random schedules of appending, dropping and reordering users."""

import copy
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


PAGES = pytest.mark.parametrize("page_size", [None, 4])


def small(layers=1, **options):
    return HSTU(layers, WIDTH, 2, 4, 4, max_seqlen=40, time_buckets=None, **options).eval()


@PAGES
@torch.no_grad()
def test_two_layers_sharing_a_cache_are_refused(page_size):
    first, second = (HSTULayer(WIDTH, 2, 4, 4, max_seqlen=40, time_buckets=None) for _ in range(2))
    cache, x, offsets = RaggedKVCache(1, page_size=page_size), torch.randn(3, WIDTH), torch.tensor([0, 3])
    rows = first(x, offsets, cache=cache)
    with pytest.raises(ValueError, match="cache: got other layers than those that filled it, needs one cache for each"):
        second(rows, offsets, cache=cache)
    assert cache.lengths == [3]
    # The layer itself goes on, and an empty cache is anybody's.
    first(x, offsets, cache=cache)
    cache.select([])
    cache.add_users(1)
    second(x, offsets, cache=cache)


@PAGES
@pytest.mark.parametrize("layers", [(1, 2), (2, 1)])
@torch.no_grad()
def test_a_model_of_another_depth_is_refused(page_size, layers):
    cache, x, offsets = RaggedKVCache(1, page_size=page_size), torch.randn(3, WIDTH), torch.tensor([0, 3])
    small(layers[0])(x, offsets, cache=cache)
    with pytest.raises(ValueError, match=f"cache: got {layers[1]} layers to continue it, needs the {layers[0]} that"):
        small(layers[1])(x, offsets, cache=cache)


@PAGES
@torch.no_grad()
def test_a_cache_filled_in_another_dtype_is_refused(page_size):
    model, cache = small(2), RaggedKVCache(1, page_size=page_size)
    x, offsets = torch.randn(3, WIDTH), torch.tensor([0, 3])
    with torch.autocast("cpu", torch.bfloat16):
        model(x, offsets, cache=cache)
    with pytest.raises(ValueError, match=r"cache: got k torch.float32 .*, needs torch.bfloat16 .* autocast"):
        model(x, offsets, cache=cache)
    with torch.autocast("cpu", torch.bfloat16):
        model(x, offsets, cache=cache)
    assert cache.lengths == [6]


@PAGES
@pytest.mark.parametrize("grad", [True, False])
def test_candidates_are_scored_without_becoming_events(page_size, grad):
    torch.manual_seed(0)
    model, cache = small(2, position_bias=False), RaggedKVCache(2, page_size=page_size)
    history, old = torch.randn(5, WIDTH), torch.tensor([0, 2, 5])
    candidates, new = torch.randn(7, WIDTH), torch.tensor([0, 3, 7])
    targets = torch.tensor([3, 4])
    with torch.set_grad_enabled(grad):
        model(history, old, cache=cache)
        everything = torch.cat([history[:2], candidates[:3], history[2:], candidates[3:]])
        full = model(everything, torch.tensor([0, 5, 12]), num_targets=targets)
        for _ in range(2):
            found = model(candidates, new, cache=cache, num_targets=targets, commit=False)
            torch.testing.assert_close(found, torch.cat([full[2:5], full[8:]]))
            assert cache.lengths == [2, 3]
        # One by one they have the same scores, since no target sees another one (positions apart, which are off here).
        one = model(candidates[[1, 3]], torch.tensor([0, 1, 2]), cache=cache, commit=False)
        torch.testing.assert_close(one, torch.cat([full[3:4], full[8:9]]))
        # Events go on where they were.
        later = model(history, old, cache=cache)
        twice = torch.cat([history[:2], history[:2], history[2:], history[2:]])
        expected = model(twice, torch.tensor([0, 4, 10]))
        torch.testing.assert_close(later, torch.cat([expected[2:4], expected[7:]]))
    with pytest.raises(ValueError, match="num_targets: got some rows to commit to the cache, needs commit=False"):
        model(candidates, new, cache=cache, num_targets=targets)
    with pytest.raises(ValueError, match="num_contextual: got some with a cache, needs 0"):
        model(candidates, new, cache=cache, num_contextual=1)


@PAGES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_cache_survives_a_file(page_size, dtype, tmp_path):
    torch.manual_seed(0)
    model = HSTU(2, WIDTH, 2, 4, 4, max_seqlen=40, time_buckets=9, dtype=dtype).eval()
    cache, x, offsets = RaggedKVCache(3, page_size=page_size), torch.randn(9, WIDTH, dtype=dtype), [0, 2, 2, 9]
    model(x, torch.tensor(offsets), timestamps=torch.arange(9), cache=cache)
    cache.select([2, 0])
    path = tmp_path / "users.cache"
    cache.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["users.cache"]
    read = RaggedKVCache.load(path)
    assert read.lengths == cache.lengths == [7, 2] and read.page_size == page_size
    more, stamps = (torch.randn(3, WIDTH, dtype=dtype), torch.tensor([0, 1, 3])), torch.arange(3) + 20
    assert torch.equal(model(*more, timestamps=stamps, cache=read), model(*more, timestamps=stamps, cache=cache))
    with pytest.raises(ValueError, match="cache: got 1 layers to continue it, needs the 2 that filled it"):
        HSTU(1, WIDTH, 2, 4, 4, max_seqlen=40)(*more, timestamps=stamps, cache=RaggedKVCache.load(path))
    RaggedKVCache(2).save(path)
    assert RaggedKVCache.load(path).lengths == [0, 0]


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def test_files_that_hold_no_cache_are_named_and_run_nothing(tmp_path, capsys):
    path = tmp_path / "file"
    good = {"format": "hstu_kernels.RaggedKVCache 1", "page_size": None, "lengths": [2], "timestamps": None}
    pair = (torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))
    contents = {
        "format": {"lengths": [1]},
        "no whole numbers": {**good, "lengths": [2.5], "layers": [pair]},
        "lengths that": {**good, "lengths": [-2], "layers": [pair]},
        "page_size -1": {**good, "page_size": -1, "layers": [pair]},
        "keys or values that do not fit": {**good, "lengths": [3], "layers": [pair]},
        "lengths but no layers": {**good, "layers": []},
        "timestamps that do not fit": {**good, "layers": [pair], "timestamps": torch.arange(5)},
        "cannot be read": {**good, "layers": [pair], "more": Evil()},
    }
    for message, content in contents.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            RaggedKVCache.load(path)
    for junk in (b"", b"root:x:0:0", b"PK\x03\x04"):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="cannot be read"):
            RaggedKVCache.load(path)
    assert "this ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        RaggedKVCache.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RaggedKVCache(-1), "num_users: got -1, needs 0 or more"),
        (lambda: RaggedKVCache(1.5), "num_users: got 1.5, needs an integer"),
        (lambda: RaggedKVCache(1, page_size=2.5), "page_size: got 2.5, needs an integer"),
        (lambda: RaggedKVCache(1).add_users(-1), "count: got -1, needs 0 or more"),
        (lambda: RaggedKVCache(1).select([0.5]), "users: got 0.5, needs an integer"),
        (lambda: small()([[0.0]], torch.tensor([0, 1]), cache=RaggedKVCache(1)), "x: got a list, needs a tensor"),
        (lambda: small()(torch.zeros(1, WIDTH), [0, 1], cache=RaggedKVCache(1)), "offsets: got a list, needs a tensor"),
    ],
)
def test_wrong_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@torch.no_grad()
def test_a_copy_of_a_cache_goes_its_own_way():
    model, cache = small(2), RaggedKVCache(1, page_size=4)
    x, offsets = torch.randn(3, WIDTH), torch.tensor([0, 3])
    model(x, offsets, cache=cache)
    branch = copy.deepcopy(cache)
    model(x, offsets, cache=branch)
    assert (cache.lengths, branch.lengths) == ([3], [6])
    torch.testing.assert_close(model(x, offsets, cache=cache), model(torch.cat([x, x]), torch.tensor([0, 6]))[3:])


@pytest.mark.parametrize("users", [0, 2])
@PAGES
@torch.no_grad()
def test_a_step_of_nobody_and_nothing(page_size, users):
    model, cache, offsets = small(2), RaggedKVCache(users, page_size=page_size), torch.zeros(users + 1).long()
    assert model(torch.zeros(0, WIDTH), offsets, cache=cache).shape == (0, WIDTH)
    assert cache.lengths == [0] * users
