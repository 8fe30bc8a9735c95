"""Checkpoints of the published blocks with every option of theirs: the same parameters, the same outputs."""

import math

import pytest
import torch
import torch.nn.functional as F

from mamba_scan import Mamba, Mamba2

WIDTH, STATES, HEAD = 12, 3, 4


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5


def published_mamba2(expand=2, d_ssm=None, ngroups=1, D_has_hdim=False, rmsnorm=True, bias=False, conv_bias=True, **_):
    """A state dict of the published Mamba2, with its names and shapes."""
    g = torch.Generator().manual_seed(0)
    inner = expand * WIDTH
    ssm = inner if d_ssm is None else d_ssm
    heads, mixed = ssm // HEAD, ssm + 2 * ngroups * STATES
    weights = {
        "in_proj.weight": normal(g, 2 * inner + 2 * ngroups * STATES + heads, WIDTH),
        "conv1d.weight": normal(g, mixed, 1, 4),
        "dt_bias": normal(g, heads),
        "A_log": normal(g, heads),
        "D": normal(g, ssm if D_has_hdim else heads),
        "out_proj.weight": normal(g, WIDTH, inner),
    }
    if bias:
        weights |= {"in_proj.bias": normal(g, len(weights["in_proj.weight"])), "out_proj.bias": normal(g, WIDTH)}
    if conv_bias:
        weights["conv1d.bias"] = normal(g, mixed)
    if rmsnorm:
        weights["norm.weight"] = normal(g, ssm)
    return weights


def run_mamba2(
    w, x, expand=2, d_ssm=None, ngroups=1, rmsnorm=True, norm_before_gate=False, dt_limit=(0, math.inf), **_
):
    """The published Mamba2 in plain torch, [b, l, WIDTH]."""
    inner = expand * WIDTH
    ssm = inner if d_ssm is None else d_ssm
    heads, rest, states = ssm // HEAD, inner - ssm, ngroups * STATES
    z0, x0, z, xBC, dt = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias")).split(
        [rest, rest, ssm, ssm + 2 * states, heads], dim=-1
    )
    mixed = F.conv1d(xBC.mT, w["conv1d.weight"], w.get("conv1d.bias"), padding=3, groups=xBC.shape[-1])
    mixed = F.silu(mixed[..., : x.shape[1]]).mT
    u, B, C = mixed.split([ssm, states, states], dim=-1)
    u = u.unflatten(-1, (heads, HEAD))
    B, C = (c.unflatten(-1, (ngroups, STATES)).repeat_interleave(heads // ngroups, dim=2) for c in (B, C))
    dt = F.softplus(dt + w["dt_bias"]).clamp(*dt_limit)
    h, ys = torch.zeros(len(x), heads, HEAD, STATES, dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = torch.exp(-dt[:, t] * w["A_log"].exp())[..., None, None]
        h = decay * h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    D = w["D"].view(heads, -1)
    y = (torch.stack(ys, 1) + D * u).flatten(-2)

    def normed(t):
        groups = t.unflatten(-1, (ngroups, -1))
        return (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * w["norm.weight"]

    if not rmsnorm:
        y = y * F.silu(z)
    elif norm_before_gate:
        y = normed(y) * F.silu(z)
    else:
        y = normed(y * F.silu(z))
    y = torch.cat([F.silu(z0) * x0, y], dim=-1)
    return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))


OPTIONS = [
    {},
    {"norm_before_gate": True},
    {"norm_before_gate": True, "ngroups": 2},
    {"rmsnorm": False},
    {"D_has_hdim": True},
    {"d_ssm": 16},
    {"d_ssm": 8, "ngroups": 2, "D_has_hdim": True, "norm_before_gate": True, "bias": True, "conv_bias": False},
    {"d_ssm": 8, "rmsnorm": False, "dt_limit": (0.3, 0.9), "expand": 1},
    {"layer_idx": 3, "use_mem_eff_path": False, "sequence_parallel": False, "process_group": None, "conv_init": 0.1},
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_published_mamba2_loads_and_computes_the_same(options, backend):
    weights = published_mamba2(**options)
    block = Mamba2(WIDTH, d_state=STATES, headdim=HEAD, **options, backend=backend, dtype=torch.float64)
    assert {k: x.shape for k, x in block.state_dict().items()} == {k: x.shape for k, x in weights.items()}
    block.load_state_dict(weights)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    want = run_mamba2(weights, x, **options)
    got = block(x)
    torch.testing.assert_close(got, want)
    direction = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, direction)[0] for y in (got, want)))
    packed = block(x.flatten(0, 1), torch.tensor([0, 9, 18]))
    torch.testing.assert_close(packed.unflatten(0, (2, 9)), want)
    state, outs = None, []
    with torch.no_grad():
        for t in range(9):
            out, state = block.step(x[:, t], state)
            outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), want)


def run_mamba(w, x, rank):
    """The published Mamba in plain torch."""
    u, z = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, dim=-1)
    u = F.conv1d(u.mT, w["conv1d.weight"], w.get("conv1d.bias"), padding=3, groups=u.shape[-1])
    u = F.silu(u[..., : x.shape[1]]).mT
    dt, B, C = F.linear(u, w["x_proj.weight"]).split([rank, STATES, STATES], dim=-1)
    dt = F.softplus(F.linear(dt, w["dt_proj.weight"], w["dt_proj.bias"]))
    h, ys = torch.zeros(*u.shape[::2], STATES, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(-dt[:, t, :, None] * w["A_log"].exp()) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    y = (torch.stack(ys, 1) + w["D"] * u) * F.silu(z)
    return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_idx": 0, "use_fast_path": False, "dt_init": "constant"},
        {"dt_rank": 5, "bias": True, "conv_bias": False, "use_fast_path": True, "dt_init": "random"},
    ],
)
def test_a_published_mamba_loads_and_computes_the_same(options):
    g, rank, inner = torch.Generator().manual_seed(0), options.get("dt_rank", 1), 2 * WIDTH
    shapes = {
        "A_log": (inner, STATES), "D": (inner,), "in_proj.weight": (2 * inner, WIDTH), "conv1d.weight": (inner, 1, 4),
        "x_proj.weight": (rank + 2 * STATES, inner), "dt_proj.weight": (inner, rank), "dt_proj.bias": (inner,),
        "out_proj.weight": (WIDTH, inner),
    }  # fmt: skip
    if options.get("bias"):
        shapes |= {"in_proj.bias": (2 * inner,), "out_proj.bias": (WIDTH,)}
    if options.get("conv_bias", True):
        shapes["conv1d.bias"] = (inner,)
    weights = {name: normal(g, *shape) for name, shape in shapes.items()}
    block = Mamba(WIDTH, STATES, **options, dtype=torch.float64)
    block.load_state_dict(weights)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(block(x), run_mamba(weights, x, rank))
    assert block.layer_idx == options.get("layer_idx")


def test_initial_weights_follow_the_options():
    constant = Mamba(32, dt_rank=4, dt_init="constant", dt_scale=2.0).dt_proj.weight
    assert torch.equal(constant, torch.ones_like(constant))
    random = Mamba(32, dt_rank=4, dt_scale=2.0).dt_proj.weight
    assert random.abs().max() <= 1 and random.std() > 0.4
    weight = Mamba2(32, headdim=8, conv_init=0.01).conv1d.weight
    assert 0.005 < weight.abs().max() <= 0.01


def test_positions_are_the_published_ones():
    assert Mamba(8, 4, 3, 1, 2, 0.01, 0.2, "constant", 1.0, 1e-4, False, True, False, 7).layer_idx == 7
    block = Mamba2(8, 4, 3, None, 2, 4, 8, 1, (1, 2), True, False, False, 0.01, 0.2, 1e-4, (0.0, 1.0), True, False, 32)
    assert block.in_proj.bias is not None and block.conv1d.bias is None and block.D.shape == (8,)
    assert block.chunk_size == 32 and block.norm is None


@pytest.mark.parametrize(
    ("make", "name", "options"),
    [
        (Mamba2, "process_group", {"process_group": object()}),
        (Mamba2, "d_ssm", {"d_ssm": 17}),
        (Mamba2, "d_ssm", {"d_ssm": 64}),
        (Mamba2, "headdim", {"headdim": 5}),
        (Mamba2, "ngroups", {"ngroups": 5}),
        (Mamba2, "dt_limit", {"dt_limit": (1.0, 0.1)}),
        (Mamba2, "dt_limit", {"dt_limit": (math.nan, 1.0)}),
        (Mamba2, "A_init_range", {"A_init_range": (0.0, 1.0)}),
        (Mamba2, "A_init_range", {"A_init_range": (2.0, 1.0)}),
        (Mamba2, "conv_init", {"conv_init": -1.0}),
        (Mamba2, "rmsnorm", {"rmsnorm": "yes"}),
        (Mamba2, "chunk_size", {"chunk_size": 2.5}),
        (Mamba2, "dt_min", {"dt_min": 0.2, "dt_max": 0.1}),
        (Mamba, "dt_init", {"dt_init": "zeros"}),
        (Mamba, "dt_rank", {"dt_rank": "all"}),
        (Mamba, "dt_rank", {"dt_rank": 0}),
        (Mamba, "d_model", {"d_model": 12.0}),
        (Mamba, "d_state", {"d_state": 0}),
        (Mamba, "d_conv", {"d_conv": True}),
        (Mamba, "expand", {"expand": 0.3}),
        (Mamba, "use_fast_path", {"use_fast_path": "yes"}),
        (Mamba, "backend", {"backend": "gpu"}),
    ],
)
def test_an_option_without_sense_is_named(make, name, options):
    common = {"d_model": WIDTH} | ({"headdim": HEAD} if make is Mamba2 else {})
    with pytest.raises(ValueError, match=rf"^{name}: got .*, needs "):
        make(**common | options)


def test_a_fraction_of_expand_may_give_a_whole_number():
    assert Mamba(12, expand=1.5).d_inner == 18
