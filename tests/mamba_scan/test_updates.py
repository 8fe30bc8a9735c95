"""States kept in slots of a pool, steps in mixed dtypes, gradients of an update."""

import pytest
import torch

from mamba_scan import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update

BACKENDS = ["reference", "cpu"]


def step_arguments(rows=4, d=3, n=5, dtype=torch.float32):
    torch.manual_seed(0)
    return {
        "x": torch.randn(rows, d, dtype=dtype),
        "dt": torch.rand(rows, d, dtype=dtype),
        "A": -torch.rand(d, n),
        "B": torch.randn(rows, n, dtype=dtype),
        "C": torch.randn(rows, n, dtype=dtype),
        "D": torch.randn(d),
        "z": torch.randn(rows, d, dtype=dtype),
    }


def rows_of(args, which):
    return {k: x if k in ("A", "D") else x[which] for k, x in args.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [[-1, 4, -1, 0], [2, -1, -7, -1], [-1, -1, -1, -1], [3, 1, 0, -1]])
def test_a_negative_index_is_padding_in_state_updates(index, backend):
    args, pool, index = step_arguments(), torch.randn(5, 3, 5), torch.tensor(index)
    before, kept = pool.clone(), index >= 0
    # Whatever stands in a row of padding reaches nothing.
    padded = {k: x if k in ("A", "D") else torch.where(kept[:, None], x, torch.nan) for k, x in args.items()}
    out = selective_state_update(pool, **padded, state_batch_indices=index, backend=backend)
    assert torch.equal(out[~kept], torch.zeros_like(out[~kept]))
    untouched = [slot for slot in range(5) if slot not in index.tolist()]
    assert torch.equal(pool[untouched], before[untouched])
    alone = before[index[kept]].clone()
    want = selective_state_update(alone, **rows_of(args, kept), backend=backend)
    assert torch.equal(out[kept], want) and torch.equal(pool[index[kept]], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("length", [None, 1, 3])
@pytest.mark.parametrize("index", [[-1, 4, -1, 0], [2, -1, -7, -1], [-1, -1, -1, -1]])
def test_a_negative_index_is_padding_in_convolution_updates(index, length, ring, backend):
    torch.manual_seed(0)
    x = torch.randn(4, 3) if length is None else torch.randn(4, 3, length)
    weight, bias, pool, index = torch.randn(3, 4), torch.randn(3), torch.randn(5, 3, 5), torch.tensor(index)
    before, kept = pool.clone(), index >= 0
    lengths = torch.tensor([7, 2, 0, 5], dtype=torch.int32) if ring else None
    padded = torch.where(kept.view(4, *[1] * (x.dim() - 1)), x, torch.nan).requires_grad_()
    weight.requires_grad_()
    out = causal_conv1d_update(padded, pool, weight, bias, "silu", lengths, index, backend=backend)
    assert torch.equal(out[~kept], torch.zeros_like(out[~kept]))
    untouched = [slot for slot in range(5) if slot not in index.tolist()]
    assert torch.equal(pool[untouched], before[untouched])
    alone = before[index[kept]].clone()
    part = None if lengths is None else lengths[kept]
    want = causal_conv1d_update(x[kept], alone, weight, bias, "silu", part, backend=backend)
    torch.testing.assert_close(out[kept], want)
    assert torch.equal(pool[index[kept]], alone)
    grads, wanted = (torch.autograd.grad(y.sum(), weight)[0] for y in (out, want))
    torch.testing.assert_close(grads, wanted)
    # A second pass may ask for x: padding has the gradient zero.
    out = causal_conv1d_update(padded, pool, weight, bias, "silu", lengths, index, backend=backend)
    (dx,) = torch.autograd.grad(out.sum(), padded)
    assert torch.equal(dx[~kept], torch.zeros_like(dx[~kept]))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 5], r"got 5 at position 1, needs slots below 5"),
        ([2, 2], r"got slot 2 twice"),
        ([0.0, 1.0], r"got torch.float32 \[2\], needs int32 or int64 \[2\]"),
        ([[0, 1]], r"got torch.int64 \[1, 2\], needs int32 or int64 \[2\]"),
        ([0], r"got torch.int64 \[1\], needs int32 or int64 \[2\]"),
    ],
)
def test_broken_indices_are_explained(index, message):
    args, index = step_arguments(2), torch.tensor(index)
    with pytest.raises(ValueError, match=rf"^state_batch_indices: {message}"):
        selective_state_update(torch.zeros(5, 3, 5), **args, state_batch_indices=index)
    with pytest.raises(ValueError, match=rf"^conv_state_indices: {message}"):
        causal_conv1d_update(torch.zeros(2, 3), torch.zeros(5, 3, 2), torch.ones(3, 3), conv_state_indices=index)


def test_slots_compile_into_one_graph():
    args, weight, index = step_arguments(), torch.randn(3, 4), torch.tensor([3, -1, 0, -1])

    def step(ssm, conv, **args):
        u = causal_conv1d_update(args.pop("x"), conv, weight, conv_state_indices=index)
        return selective_state_update(ssm, u, **args, state_batch_indices=index)

    states = torch.randn(5, 3, 5), torch.randn(5, 3, 3)
    plain, compiled = ([x.clone() for x in states] for _ in range(2))
    want = step(*plain, **args)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled, **args)
    for a, b in zip((got, *compiled), (want, *plain), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_float32_coefficients_are_not_rounded_to_the_dtype_of_x(low, heads, backend):
    torch.manual_seed(0)
    b, h, p, n = 3, 2, 4, 6
    shape, weights = ((b, h, p), (h, p)) if heads else ((b, h * p), (h * p,))
    x, dt, z = torch.randn(shape).to(low), torch.rand(shape), torch.randn(shape)
    A, D, bias = -torch.rand(*weights, n), torch.randn(weights), torch.randn(weights)
    B, C = torch.randn(b, 2, n), torch.randn(b, 2, n)
    state = torch.randn(*shape, n)
    wide = selective_scan(
        x.double().view(b, -1, 1), dt.double().view(b, -1, 1), A.double().view(-1, n), B.double()[..., None],
        C.double()[..., None], D.double().flatten(), z.double().view(b, -1, 1), bias.double().flatten(), True, True,
        initial_state=state.double().view(b, -1, n),
    )  # fmt: skip
    out = selective_state_update(state, x, dt, A, B, C, D, z, bias, True, backend=backend)
    assert out.dtype == low
    torch.testing.assert_close(state.double().view(b, -1, n), wide[1], rtol=2e-6, atol=2e-6)
    eps = torch.finfo(low).eps
    torch.testing.assert_close(out.double().view(b, -1, 1), wide[0], rtol=eps, atol=eps / 10)


def test_a_float64_state_is_advanced_in_float64():
    args, state = step_arguments(), torch.randn(4, 3, 5, dtype=torch.float64)
    want = state.clone()
    selective_state_update(want, **{k: x.double() for k, x in args.items()})
    out = selective_state_update(state, **args)
    assert out.dtype == torch.float32
    torch.testing.assert_close(state, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3, 4, 6])
@pytest.mark.parametrize("ring", [False, True])
def test_an_update_has_gradients(ring, size, backend):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 2).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    state, tensors = torch.randn(2, 3, size).double(), [t.requires_grad_() for t in (x, weight, bias)]
    seen = torch.tensor([5, 6]) if ring else None
    if ring:
        recent = torch.stack([s[:, torch.arange(int(k) - 3, int(k)) % size] for s, k in zip(state, seen, strict=True)])
    else:
        recent = state[:, :, -3:]
    want = causal_conv1d(x, weight, bias, initial_states=recent, activation="silu", backend=backend)
    wanted = torch.autograd.grad(want.sin().sum(), tensors)
    out = causal_conv1d_update(x, state, weight, bias, "silu", seen, backend=backend)
    assert torch.equal(out, want)
    for got, grad in zip(torch.autograd.grad(out.sin().sum(), tensors), wanted, strict=True):
        torch.testing.assert_close(got, grad)
