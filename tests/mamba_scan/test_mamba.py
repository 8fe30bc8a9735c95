"""The Mamba block and the steps it decodes with."""

import pytest
import torch
import torch.nn.functional as F

from mamba_scan import Mamba, Mamba2, causal_conv1d, selective_scan, selective_state_update


def block(**options):
    torch.manual_seed(0)
    return Mamba(**{"d_model": 12, "d_state": 5} | options)


def in_pieces(m, x):
    """The block from the public ops and torch's linear layers, nothing fused."""
    u, z = m.in_proj(x).mT.chunk(2, dim=1)
    u = causal_conv1d(u, m.conv1d.weight.squeeze(1), m.conv1d.bias, activation="silu")
    dt, B, C = m.x_proj(u.mT).split([m.dt_rank, m.d_state, m.d_state], dim=-1)
    delta = F.linear(dt, m.dt_proj.weight).mT
    y = selective_scan(u, delta, -m.A_log.exp(), B.mT, C.mT, m.D, z, m.dt_proj.bias, delta_softplus=True)
    return m.out_proj(y.mT)


def test_parameters_have_the_published_names_and_shapes():
    shapes = {name: tuple(x.shape) for name, x in Mamba(32, d_state=16, d_conv=4, expand=2).state_dict().items()}
    assert shapes == {
        "A_log": (64, 16),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 32, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }


def test_first_step_sizes_lie_in_their_range():
    dt = F.softplus(Mamba(64, dt_min=0.002, dt_max=0.05).dt_proj.bias)
    assert dt.min() * 1.01 >= 0.002 and dt.max() <= 0.05 * 1.01 and dt.max() / dt.min() > 5


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False, "expand": 1, "d_conv": 2}])
def test_the_fused_inside_is_the_sum_of_its_parts(backend, options):
    m = block(**options, backend=backend, dtype=torch.float64)
    x = torch.randn(3, 70, 12, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    results = []
    for forward in (m, lambda x: in_pieces(m, x)):
        out = forward(x)
        grads = torch.autograd.grad(out, [x, *m.parameters()], direction)
        results.append((out, *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck_through_both_states():
    m = block(d_model=3, d_state=2, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 2, 2, 5])
    states = [torch.randn(3, 6, k, dtype=torch.float64, requires_grad=True) for k in (3, 2)]

    def forward(x, conv, ssm):
        out, state = m(x, offsets, (conv, ssm))
        return out, *state

    assert torch.autograd.gradcheck(forward, (x, *states))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_is_each_sequence_alone(backend):
    m, lengths = block(backend=backend), [4, 0, 1, 66, 9]
    x = torch.randn(sum(lengths), 12)
    out = m(x, torch.tensor([0, 4, 4, 5, 71, 80]))
    for got, part in zip(out.split(lengths), x.split(lengths), strict=True):
        torch.testing.assert_close(got, m(part[None])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_stepping_is_the_forward_pass(backend):
    m, x = block(backend=backend), torch.randn(3, 9, 12)
    with torch.no_grad():
        want, last = m(x, state=m.init_state(3))
        torch.testing.assert_close(want, m(x))
        state, outs = None, []
        for t in range(9):
            out, state = m.step(x[:, t], state)
            outs.append(out)
        torch.testing.assert_close(torch.stack(outs, 1), want)
        torch.testing.assert_close(tuple(state), tuple(last))
        _, state = m(x[:, :4], state=m.init_state(3))
        rest, state = m(x[:, 4:], state=state)
        torch.testing.assert_close(rest, want[:, 4:])
        torch.testing.assert_close(tuple(state), tuple(last))


def test_a_step_leaves_the_state_it_was_given():
    m = block()
    state = m.init_state(2)
    m.step(torch.randn(2, 12), state)
    assert not state.conv.any() and not state.ssm.any()


def test_autocast_and_low_precision():
    m, x = block(), torch.randn(2, 8, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = m(x)
        assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in m.parameters())
    torch.testing.assert_close(out.float(), m(x), rtol=5e-2, atol=2e-2)


def test_the_block_compiles_into_one_graph():
    m, x, offsets = block(), torch.randn(14, 12), torch.tensor([0, 5, 14])
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    compiled(x, offsets).square().sum().backward()
    got = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    m(x, offsets).square().sum().backward()
    for grad, p in zip(got, m.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


@pytest.mark.parametrize("make", [block, lambda: Mamba2(12, d_state=5, headdim=4)])
def test_one_compilation_serves_all_lengths(make):
    m = make()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9, 70):
        x = torch.randn(2, length, 12)
        torch.testing.assert_close(compiled(x), m(x))


def test_opcheck_of_the_inside():
    from mamba_scan.ops import InnerProblem

    def normal(*shape):
        return torch.randn(*shape).requires_grad_()

    for packed in (False, True):
        xz, offsets = (normal(7, 12), torch.tensor([0, 3, 7])) if packed else (normal(2, 5, 12), None)
        p = InnerProblem(
            xz, normal(6, 4), normal(6), normal(8, 6), normal(6, 2), normal(6), -torch.rand(6, 3), normal(6),
            normal(4, 6), normal(4), normal(2, 6, 3), normal(2, 6, 3), offsets,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.mamba_scan.inner.default, (*vars(p).values(), True, True, "cpu"))


@pytest.mark.parametrize("name", ["x", "offsets", "state.conv", "state.ssm"])
def test_a_broken_argument_is_named(name):
    m = block()
    x, offsets, state = torch.randn(2, 3, 12), None, m.init_state(2)
    if name == "x":
        x = x[..., :-1]
    elif name == "offsets":
        x, offsets = x.flatten(0, 1), torch.tensor([0.0, 3.0, 6.0])
    elif name == "state.conv":
        state = state._replace(conv=state.conv[:, :, 1:])
    else:
        state = state._replace(ssm=state.ssm[:1])
    with pytest.raises(ValueError, match=rf"^{name}: got .*, needs "):
        m(x, offsets, state)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_updates_are_the_scan(backend, heads, dtype):
    torch.manual_seed(0)
    b, h, p, n, length = 3, 4, 5, 7, 6
    d = h * p
    u, delta, z = (torch.randn(b, d, length, dtype=torch.float64) for _ in range(3))
    A, D, bias = -torch.rand(d, n).double(), torch.randn(d).double(), torch.randn(d).double()
    B, C = (torch.randn(b, 2, n, length, dtype=torch.float64) for _ in range(2))
    want, last = selective_scan(u, delta, A, B, C, D, z, bias, True, True)
    state = torch.zeros(b, d, n, dtype=dtype)
    shape, weights = ((b, h, p), (h, p)) if heads else ((b, d), (d,))
    state = state.view(*shape, n)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    for t in range(length):
        x, dt, gate = (s[:, :, t].to(dtype).view(shape) for s in (u, delta, z))
        out = selective_state_update(
            state, x, dt, A.view(*weights, n), B[..., t].to(dtype), C[..., t].to(dtype), D.view(weights), gate,
            bias.view(weights), dt_softplus=True, backend=backend,
        )  # fmt: skip
        assert out.dtype == dtype and out.shape == shape
        torch.testing.assert_close(out.double().view(b, d), want[:, :, t], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.double().view(b, d, n), last, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck_of_the_update(backend):
    torch.manual_seed(0)
    x, dt, z, B = torch.randn(2, 3, 1), torch.rand(2, 3, 1), torch.randn(2, 3, 1), torch.randn(2, 1, 4, 1)
    state, A, D = torch.randn(2, 3, 4), -torch.rand(3, 4), torch.randn(3)
    torch.library.opcheck(
        torch.ops.mamba_scan.state_update.default, (x, dt, A, B, B, D, z, D, state, None, True, backend)
    )


def test_state_updates_through_indices_touch_only_their_rows():
    pool = torch.randn(5, 3, 4)
    before, index = pool.clone(), torch.tensor([3, 0])
    x, dt, A, B = torch.randn(2, 3), torch.rand(2, 3), -torch.rand(3, 4), torch.randn(2, 4)
    out = selective_state_update(pool, x, dt, A, B, B, state_batch_indices=index)
    alone = before[index].clone()
    assert torch.equal(out, selective_state_update(alone, x, dt, A, B, B)) and torch.equal(pool[index], alone)
    assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])
    with pytest.raises(ValueError, match=r"^state: got \[5, 3, 4\], needs \[2, 3, 4\]"):
        selective_state_update(pool, x, dt, A, B, B)
