"""The scan with scalar decays (SSD) and the Mamba-2 block."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from mamba_scan import Mamba2, ssd_scan
from mamba_scan.problem_ssd import SSDProblem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def draw(seed, dtype=torch.float64, sizes=(0, 1, 3, 15, 16, 17, 50), heads=(1, 3), widths=(1, 4, 5), states=(1, 3, 8)):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    groups = rng.choice((1, 2))
    h, p, n = groups * rng.choice(heads), rng.choice(widths), rng.choice(states)
    if rng.random() < 0.5:
        lengths = [rng.choice(sizes) for _ in range(rng.randint(1, 4))]
        args = {"offsets": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])}
        lead, segments = (sum(lengths),), len(lengths)
    else:
        lead, args = (rng.randint(1, 2), rng.choice(sizes[1:])), {}
        segments = lead[0]
    args |= {"x": normal(*lead, h, p), "dt": normal(*lead, h), "A": -torch.rand(h, generator=generator).to(dtype)}
    args |= {k: normal(*lead, groups, n) for k in ("B", "C")}
    options = {"D": (h, p) if rng.random() < 0.5 else (h,), "z": (*lead, h, p), "dt_bias": (h,)}
    options["initial_states"] = (segments, h, p, n)
    args |= {k: normal(*shape) for k, shape in options.items() if rng.random() < 0.7}
    limit = (0.05, 0.9) if rng.random() < 0.3 else (0.0, float("inf"))
    return args | {"dt_softplus": True, "dt_limit": limit, "chunk_size": rng.choice((1, 16, 64))}


def run(args, backend):
    tensors = {k: x.detach().requires_grad_() for k, x in args.items() if k in NAMES}
    out, final = ssd_scan(**{**args, **tensors}, return_final_states=True, backend=backend)
    loss = out.double().sin().sum() + final.double().cos().sum()
    return [out.detach(), final.detach(), *torch.autograd.grad(loss, list(tensors.values()))]


@pytest.mark.parametrize("block", range(6))
def test_chunks_are_the_recurrence(block):
    for seed in range(block * 10, block * 10 + 10):
        dtype = (torch.float64, torch.float32)[seed % 2]
        tolerance = 1e-9 if dtype == torch.float64 else 2e-3
        args = draw(seed, dtype)
        for got, want in zip(run(args, "cpu"), run(args, "reference"), strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def check_triton(seed, tolerance=3e-5, **options):
    pytest.importorskip("triton")
    dtype = (torch.float32, torch.float32, torch.bfloat16)[seed % 3]
    args = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in draw(seed, dtype, **options).items()}
    args["chunk_size"] = 16 if seed % 2 else 64
    # The loss bends with the output's rounding, so half precision is held to the reference in half precision.
    exact = dtype == torch.float32
    wide = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in args.items()}
    for got, want in zip(run(args, "triton"), run(wide if exact else args, "reference"), strict=True):
        assert got.shape == want.shape and (exact or got.dtype == want.dtype)
        limit = tolerance if exact else 1e-2
        assert (got.double() - want).norm() <= limit * (want.double().norm() + want.numel() ** 0.5 * 1e-2)


@pytest.mark.parametrize("seed", range(9))
def test_triton(seed):
    check_triton(seed, sizes=(0, 1, 3, 5, 17, 40))


def test_triton_in_several_blocks_of_everything():
    check_triton(3, sizes=(17, 17), heads=(5,), widths=(65,), states=(70,))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_triton_on_many_more(block):
    for seed in range(100 + block * 4, 104 + block * 4):
        check_triton(seed, sizes=(0, 1, 16, 63, 64, 65, 130), heads=(1, 3, 5), widths=(1, 5, 33, 70), states=(1, 7, 65))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(200, 240))
def test_triton_on_a_card(seed):
    if DEVICE != "cuda":
        pytest.skip("no CUDA device is visible")
    check_triton(seed, sizes=(0, 1, 64, 65, 300), heads=(1, 5, 8), widths=(16, 64, 70), states=(16, 64, 128, 200))


def test_it_is_the_recurrence_written_down():
    args = draw(1) | {"dt_limit": (0.0, float("inf"))}
    args = {k: args[k] for k in ("dt_softplus",)}
    torch.manual_seed(0)
    x, dt, A, B, C = torch.randn(1, 7, 2, 3), torch.randn(1, 7, 2), -torch.rand(2), *torch.randn(2, 1, 7, 1, 4)
    state, want = torch.zeros(2, 3, 4), []
    for t in range(7):
        step = F.softplus(dt[0, t])[:, None, None]
        state = torch.exp(step * A[:, None, None]) * state + step * x[0, t, :, :, None] * B[0, t]
        want.append((state * C[0, t]).sum(-1))
    out, final = ssd_scan(x, dt, A, B, C, return_final_states=True, **args)
    torch.testing.assert_close(out[0], torch.stack(want))
    torch.testing.assert_close(final[0], state)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    for seed in range(8):
        args = draw(seed, sizes=(0, 1, 3, 5)) | {"chunk_size": 2}
        names = [k for k in NAMES if k in args]
        if args["x"].numel() > 80:
            continue

        def scan(*xs, args=args, names=names):
            return ssd_scan(**{**args, **dict(zip(names, xs, strict=True))}, return_final_states=True, backend=backend)

        tensors = [args[k].requires_grad_() for k in names]
        assert torch.autograd.gradcheck(scan, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_is_each_segment_alone_and_states_chain(backend):
    torch.manual_seed(0)
    lengths, h, p, n = [3, 0, 40, 1], 2, 3, 4
    x, dt, A = torch.randn(44, h, p), torch.randn(44, h), -torch.rand(h)
    B, C, start = torch.randn(44, 1, n), torch.randn(44, 1, n), torch.randn(4, h, p, n)
    options = {"dt_softplus": True, "return_final_states": True, "chunk_size": 16, "backend": backend}
    offsets = torch.tensor([0, 3, 3, 43, 44])
    out, final = ssd_scan(x, dt, A, B, C, initial_states=start, offsets=offsets, **options)
    for s, length in enumerate(lengths):
        row = slice(int(offsets[s]), int(offsets[s + 1]))
        state, middle = start[s : s + 1], (row.start + row.stop) // 2
        for part in (slice(row.start, middle), slice(middle, row.stop)):
            some, state = ssd_scan(*(t[None, part] for t in (x, dt)), A, B[None, part], C[None, part],
                initial_states=state, **options)  # fmt: skip
            torch.testing.assert_close(some[0], out[part], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[0], final[s], rtol=1e-5, atol=1e-5)
        assert length or torch.equal(final[s], start[s])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    for seed in (0, 3):
        args = draw(seed, torch.float32, sizes=(1, 3, 5))
        limits, softplus, chunk = args.pop("dt_limit"), args.pop("dt_softplus"), args.pop("chunk_size")
        fields = {"offsets": None, "seq_idx": None, **dict.fromkeys(NAMES), **args}
        p = SSDProblem(**fields, dt_softplus=softplus, dt_min=limits[0], dt_max=limits[1], chunk_size=chunk)
        for name in args:
            if name in NAMES:
                fields[name].requires_grad_()
        opcheck(torch.ops.mamba_scan.ssd.default, (*vars(p).values(), True, backend))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.ones(2, 3, 4)}),
        ("dt", {"dt": torch.ones(2, 3, 1)}),
        ("A", {"A": torch.ones(4, 1)}),
        ("B", {"B": torch.ones(2, 3, 3, 5)}),
        ("C", {"C": torch.ones(2, 3, 1, 6)}),
        ("D", {"D": torch.ones(5)}),
        ("dt_bias", {"dt_bias": torch.ones(5)}),
        ("initial_states", {"initial_states": torch.ones(2, 4, 5, 2)}),
        ("chunk_size", {"chunk_size": 0}),
    ],
)
def test_a_broken_argument_is_named(name, change):
    args = {"x": torch.ones(2, 3, 4, 2), "dt": torch.ones(2, 3, 4), "A": -torch.ones(4), "B": torch.ones(2, 3, 1, 5)}
    with pytest.raises(ValueError, match=rf"^{name}: got .*, needs "):
        ssd_scan(**args | {"C": torch.ones(2, 3, 1, 5)} | change)


def block(**options):
    torch.manual_seed(0)
    return Mamba2(**{"d_model": 12, "d_state": 5, "headdim": 4, "ngroups": 2} | options)


def test_parameters_have_the_published_names_and_shapes():
    shapes = {k: tuple(x.shape) for k, x in Mamba2(32, d_state=16, headdim=16, ngroups=2).state_dict().items()}
    assert shapes == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (2 * 64 + 2 * 2 * 16 + 4, 32),
        "conv1d.weight": (64 + 2 * 2 * 16, 1, 4),
        "conv1d.bias": (64 + 2 * 2 * 16,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }


@pytest.mark.parametrize("options", [{}, {"dt_limit": (0.01, 0.5), "bias": True, "ngroups": 1}])
def test_stepping_and_packing_are_the_forward_pass(options):
    m, x = block(**options), torch.randn(3, 19, 12)
    with torch.no_grad():
        want, last = m(x, state=m.init_state(3))
        torch.testing.assert_close(m(x), want)
        torch.testing.assert_close(m(x.flatten(0, 1), torch.tensor([0, 19, 38, 57])).view(3, 19, 12), want)
        state, outs = None, []
        for t in range(19):
            out, state = m.step(x[:, t], state)
            outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tuple(state), tuple(last), rtol=1e-4, atol=1e-5)


def test_the_block_learns_and_compiles():
    m, x = block(), torch.randn(2, 9, 12)
    torch.compile(m, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    got = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    m(x).square().sum().backward()
    for grad, p in zip(got, m.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)
        assert p.grad.any()
