"""The reference against the contract's formulas written out one number at a time."""

import math
import random

import pytest
import torch

from hstu_kernels import available_backends, hstu_attention
from hstu_kernels.time_buckets import bucket_edges


def visible(i, j, n, causal, targets, contextual, window, full):
    """The published mask for one pair, in words: ids are positions, contextual rows share one, targets share one."""
    first = max(contextual - 1, 0)
    last_id = n - first - targets

    def id_of(x):
        return min(max(x - first, 0), last_id)

    row, col = id_of(i), id_of(j)
    distance = row - col if causal else abs(row - col)
    seen = distance > 0 and j < n - targets
    if window:
        seen = seen and (distance <= window or (full > 0 and row >= last_id - full))
    return i == j or seen or (contextual > 0 and row == 0 and col < last_id)


def by_hand(q, k, v, lengths, new, options, position, stamps, times, shift, targets, contextual):
    heads, out, q_row, start = q.shape[1], torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64), 0, 0
    for b, (n, m) in enumerate(zip(lengths, new, strict=True)):
        for i in range(n - m, n):
            for h in range(heads):
                for j in range(n):
                    if not visible(i, j, n, options["causal"], targets[b], contextual[b], *options["window"]):
                        continue
                    score = options["alpha"] * sum(
                        float(x * y) for x, y in zip(q[q_row, h], k[start + j, h], strict=True)
                    )
                    score += float(position[h % len(position), position.shape[1] // 2 + j - i])
                    dt = abs(int(stamps[start + min(i + shift, n - 1)]) - int(stamps[start + j]))
                    bucket = min(math.floor(math.log(max(dt, 1)) / 0.301), times.shape[1] - 1)
                    score += float(times[h % len(times), bucket])
                    out[q_row, h] += score / (1 + math.exp(-score)) / options["divisor"] * v[start + j, h]
            q_row += 1
        start += n
    return out


@pytest.mark.parametrize("seed", range(12))
def test_formulas_one_number_at_a_time(seed):
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = [draw.choice([0, 1, 2, 5, 9]) for _ in range(3)]
    new = [draw.randint(0, n) for n in lengths] if seed % 3 == 0 else lengths
    heads = draw.choice([1, 2])

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(sum(new), heads, 3), normal(sum(lengths), heads, 3), normal(sum(lengths), heads, 2)
    position, times = normal(draw.choice([1, heads]), 19), normal(1, 25)
    stamps = torch.randint(0, draw.choice([5, 10**4, 10**7]), (sum(lengths),), generator=generator)
    options = {
        "causal": draw.random() < 0.7,
        "alpha": draw.choice([0.5, 2.0]),
        "divisor": 7.0,
        "window": draw.choice([(0, 0), (2, 0), (2, 3), (0, 3)]),
    }
    targets, contextual = [draw.randint(0, min(n, 3)) for n in lengths], [draw.randint(0, 3) for _ in lengths]
    shift = draw.choice([0, 1])
    expected = by_hand(q, k, v, lengths, new, options, position, stamps, times, shift, targets, contextual)
    for backend in ("reference", "cpu"):
        found = hstu_attention(
            q,
            k,
            v,
            torch.tensor([0, *lengths]).cumsum(0),
            10,
            q_offsets=torch.tensor([0, *new]).cumsum(0),
            alpha=options["alpha"],
            divisor=options["divisor"],
            causal=options["causal"],
            num_targets=torch.tensor(targets),
            num_contextual=torch.tensor(contextual),
            max_attn_len=options["window"][0],
            min_full_attn_len=options["window"][1],
            position_weight=position,
            timestamps=stamps,
            time_weight=times,
            time_shift=shift,
            backend=backend,
        )
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_bucket_edges_are_the_published_formula():
    edges = bucket_edges(150, torch.device("cpu"))
    values = [0, 1, 2, 3, 10, 59, 60, 3600, 86400, 10**9, 2**31, 2**40 + 1, 2**62]
    for edge in edges.tolist():
        if 1 < edge < 2**52:
            values += [edge - 1, edge, edge + 1]
    found = torch.bucketize(torch.tensor(values), edges, right=True).tolist()
    assert found == [math.floor(math.log(max(x, 1)) / 0.301) for x in values]
    # 2**63 - 1 seconds are 145.1 bucket widths: no time difference reaches the buckets beyond.
    assert edges[145:].tolist() == [2**63 - 1] * 5


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_edge_falls_on_the_same_side_on_all_backends(backend):
    edges = bucket_edges(72, torch.device("cpu"))
    edges = edges[edges < 2**31 - 2]
    # One row beside each edge, seen from time 0; the table tells the bucket.
    stamps = torch.cat([edges - 1, edges, edges + 1])
    q = torch.zeros(2 * len(stamps), 1, 1, dtype=torch.float64)
    times = torch.arange(1.0, 74.0, dtype=torch.float64)[None]
    stamps = torch.stack([stamps, torch.zeros_like(stamps)], 1).flatten()
    out = hstu_attention(
        q,
        q,
        torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(q) // 2)[:, None, None],
        torch.arange(0, len(q) + 1, 2),
        2,
        divisor=1.0,
        timestamps=stamps,
        time_weight=times,
        backend=backend,
    )[1::2, 0, 0]
    buckets = torch.tensor([math.floor(math.log(max(int(x), 1)) / 0.301) for x in stamps[::2]])
    torch.testing.assert_close(out, torch.nn.functional.silu(buckets + 1.0).double())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_no_row_but_itself_sees_a_target(backend, causal):
    if (status := available_backends()[backend]) != "ok":
        pytest.skip(status)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(10, 2, 8, generator=generator) for _ in range(3))
    offsets, targets = torch.tensor([0, 6, 6, 10]), torch.tensor([2, 0, 1])

    def attend(k, v):
        tensors = (x.to(device) for x in (q, k, v, offsets))
        return hstu_attention(*tensors, 6, causal=causal, num_targets=targets.to(device), backend=backend).cpu()

    before = attend(k, v)
    for target in (4, 5, 9):
        k_now, v_now = k.clone(), v.clone()
        k_now[target], v_now[target] = 3 - k[target], 3 - v[target]
        changed = (attend(k_now, v_now) != before).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [target]
    if not causal:
        k_now = k.clone()
        k_now[3] += 1
        assert (attend(k_now, v) != before).flatten(1).any(1).tolist() == [True] * 6 + [False] * 4
