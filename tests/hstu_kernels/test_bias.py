"""The dense bias, targets in groups, keys in pages: against what one writes down by hand, and refusals."""

import pytest
import torch
from torch.nn import functional as F

from hstu_kernels import hstu_attention
from hstu_kernels.impl import cuda

BACKENDS = ["reference", "cpu", "triton"]
LENGTHS, NEW = [4, 0, 3], [2, 0, 3]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the tensors of these tests are on the CPU")
    return request.param


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("heads", [1, 2])
def test_bias_is_added_pair_by_pair_and_its_gradient_is_zero_where_nobody_looks(backend, heads):
    torch.manual_seed(0)
    q, k, v = draw(5, 2, 3), draw(7, 2, 3), draw(7, 2, 2)
    bias = draw(heads, 2 * 4 + 3 * 3)
    out = hstu_attention(
        q, k, v, offsets_of(LENGTHS), 4, q_offsets=offsets_of(NEW), alpha=0.5, bias=bias, backend=backend
    )
    expected = []
    for rows, keys, first, m, n in ((slice(0, 2), slice(0, 4), 0, 2, 4), (slice(2, 5), slice(4, 7), 8, 3, 3)):
        line = bias[:, first : first + m * n].view(heads, m, n)
        scores = 0.5 * torch.einsum("ihd,jhd->hij", q[rows], k[keys]) + line
        seen = torch.ones(m, n).tril(n - m).bool()
        expected.append(torch.einsum("hij,jhv->ihv", F.silu(scores) * seen / 4, v[keys]))
    torch.testing.assert_close(out, torch.cat(expected))
    up = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v, bias), up)
    for a, b in zip(found, torch.autograd.grad(torch.cat(expected), (q, k, v, bias), up), strict=True):
        torch.testing.assert_close(a, b)
    # Row 0 of the first sequence, at position 2, does not see position 3.
    assert (found[3][:, 3] == 0).all() and (found[3][:, [0, 1, 2]] != 0).all()


def test_alpha_on_the_bias_is_a_product_beforehand(backend):
    q, bias = draw(3, 1, 2), draw(1, 9)
    both = hstu_attention(q, q, q, torch.tensor([0, 3]), 3, alpha=0.3, bias=0.3 * bias, backend=backend)
    scores = 0.3 * (torch.einsum("ihd,jhd->hij", q, q) + bias.view(1, 3, 3))
    expected = torch.einsum("hij,jhv->ihv", F.silu(scores) * torch.ones(3, 3).tril() / 3, q)
    torch.testing.assert_close(both, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_in_half_precision(backend, dtype):
    torch.manual_seed(1)
    wide = [draw(70, 2, 16, dtype=dtype) for _ in range(3)]
    bias = draw(2, 70 * 70, dtype=dtype)
    found = []
    for name, kind in ((backend, dtype), ("reference", torch.float64)):
        leaves = [x.detach().to(kind).requires_grad_() for x in (*wide, bias)]
        out = hstu_attention(*leaves[:3], torch.tensor([0, 70]), 70, bias=leaves[3], backend=name)
        found.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        assert float(((a.double() - b).abs().max() / b.abs().max()).detach()) < 0.02


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_target_sees_the_history_and_those_before_it_in_its_group(backend, size):
    torch.manual_seed(2)
    n, targets = 9, 5
    q, k = draw(n, 1, 2), draw(n, 1, 2)
    out = hstu_attention(
        q,
        k,
        torch.eye(n)[:, None],
        torch.tensor([0, n]),
        n,
        num_targets=torch.tensor([targets]),
        target_group_size=size,
        backend=backend,
    )
    for i in range(n):
        seen = [j for j in range(i + 1) if j < n - targets or j == i]
        if i >= n - targets:
            mates = [j for j in range(n - targets, i) if (j - n + targets) // size == (i - n + targets) // size]
            seen = sorted({*seen, *mates})
        assert out[i, 0].nonzero().flatten().tolist() == seen


def test_a_long_sequence_with_groups_across_tiles_and_pieces():
    torch.manual_seed(3)
    n, targets = 700, 300
    leaves = [torch.randn(n, 2, 8, dtype=torch.float64).requires_grad_() for _ in range(3)]
    bias = torch.randn(1, n * n, dtype=torch.float64).requires_grad_()
    found = []
    for backend in ("reference", "cpu"):
        out = hstu_attention(
            *leaves,
            torch.tensor([0, n]),
            n,
            num_targets=torch.tensor([targets]),
            target_group_size=130,
            bias=bias,
            backend=backend,
        )
        found.append([out, *torch.autograd.grad(out.cos().sum(), [*leaves, bias])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def paged(dtype, size, spare=3):
    """Three sequences in shuffled pages, what no sequence reads poisoned; and the same packed."""
    torch.manual_seed(4)
    lengths, new = [11, 0, 6], [2, 0, 6]
    needed = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(needed) + spare)
    table = torch.full((3, max(needed) + 1), 10**6)
    pools, packed = [], []
    for width in (5, 3):
        pool = torch.full((len(order), size, 2, width), torch.nan, dtype=dtype)
        rows, page = [], 0
        for b, n in enumerate(lengths):
            x = torch.randn(n, 2, width, dtype=torch.float64).to(dtype)
            rows.append(x)
            for at in range(needed[b]):
                number = int(order[page])
                part = x[at * size : (at + 1) * size]
                pool[number, : len(part)] = part
                table[b, at] = number
                page += 1
        pools.append(pool)
        packed.append(torch.cat(rows))
    q = torch.randn(sum(new), 2, 5, dtype=torch.float64).to(dtype)
    return q, pools, table, packed, {"q_offsets": offsets_of(new), "offsets": offsets_of(lengths), "max_seqlen": 12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_keys_in_pages_are_read_where_they_lie(backend, dtype, size, kind):
    q, pools, table, packed, rest = paged(dtype, size)
    stamps, times = torch.arange(17) * 1000, torch.randn(1, 40).to(dtype)
    rest |= {"timestamps": stamps, "time_weight": times, "backend": backend}
    found = hstu_attention(q, *pools, block_table=table.to(kind), **rest)
    expected = hstu_attention(q, *packed, **rest)
    assert torch.equal(found, expected) if dtype == torch.float32 else torch.allclose(found, expected, atol=0.02)


def test_pages_have_gradients_too(backend):
    q, pools, table, packed, rest = paged(torch.float32, 4)
    leaves = [x.requires_grad_() for x in (q, *(x.nan_to_num() for x in pools))]
    out = hstu_attention(*leaves, block_table=table, backend=backend, **rest)
    straight = [q, *(x.requires_grad_() for x in packed)]
    expected = hstu_attention(*straight, backend=backend, **rest)
    ours, theirs = (torch.autograd.grad(x.sin().sum(), y) for x, y in ((out, leaves), (expected, straight)))
    torch.testing.assert_close(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a[table[0, :3]].flatten(0, 1)[:11], b[:11])
        torch.testing.assert_close(a.sum(), b.sum())


def test_wrong_pages_are_named():
    q, pools, table, _, rest = paged(torch.float32, 4)
    for wrong, message in (
        (table[:2], "block_table: got 2 rows, needs one a sequence, 3"),
        (table[:, :2], "block_table: got 2 pages a sequence, needs 3 for the 11 rows of sequence 0"),
        (table.index_fill(0, torch.tensor(2), -1), "block_table: got page -1 for sequence 2, needs 0 to 7"),
        (table.float(), r"block_table: got torch.float32 \[3, 4\], needs int32 or int64"),
        ([[0]], "block_table: got a list, needs int32 or int64"),
    ):
        with pytest.raises(ValueError, match=message):
            hstu_attention(q, *pools, block_table=wrong, **rest)
    with pytest.raises(ValueError, match=r"k: got shape \[8, 8, 5\], needs \[pages, rows of a page, heads, width\]"):
        hstu_attention(q, pools[0].flatten(1, 2), pools[1], block_table=table, **rest)
    with pytest.raises(ValueError, match="timestamps: got 5 rows, needs as many as offsets say, 17"):
        hstu_attention(q, *pools, block_table=table, timestamps=torch.arange(5), **rest)
    with pytest.raises(ValueError, match="q: got 8 rows, needs as many as offsets say, 17, or q_offsets"):
        hstu_attention(q, *pools, block_table=table, **(rest | {"q_offsets": None}))


def test_cuda_refuses_what_it_lacks(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    x, offsets = torch.zeros(3, 1, 2), torch.tensor([0, 3])
    for name, lacking in (("bias", torch.zeros(1, 9)), ("target_group_size", 2)):
        with pytest.raises(ValueError, match=f'backend="cuda" cannot take these tensors: they come with {name}, which'):
            hstu_attention(x, x, x, offsets, 3, backend="cuda", **{name: lacking})
    with pytest.raises(ValueError, match="they come with block_table, which the CUDA kernels lack"):
        table = torch.zeros(1, 1, dtype=torch.int64)
        hstu_attention(x, x[None], x[None], offsets, 3, backend="cuda", block_table=table)
