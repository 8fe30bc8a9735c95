"""What must hold of a scan whatever its numbers: exact packing, states that chain, gradients, determinism, memory."""

import pytest
import torch
from torch.library import opcheck

from mamba_scan import selective_scan
from mamba_scan.problem import CHUNK, ScanProblem, canonical


def packed_problem(lengths, d=6, n=5, groups=2, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    rows, segments = sum(lengths), len(lengths)
    args = {
        "u": torch.randn(rows, d, dtype=dtype),
        "delta": torch.randn(rows, d, dtype=dtype),
        "A": -torch.rand(d, n, dtype=dtype),
        "B": torch.randn(rows, groups, n, dtype=dtype),
        "C": torch.randn(rows, groups, n, dtype=dtype),
        "D": torch.randn(d, dtype=dtype),
        "z": torch.randn(rows, d, dtype=dtype),
        "delta_bias": torch.randn(d, dtype=dtype),
        "initial_state": torch.randn(segments, d, n, dtype=dtype),
    }
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return args, offsets


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("complex_A", [False, True])
def test_gradcheck(backend, complex_A, drawn):
    for seed in range(6):
        args = drawn(seed + 50 * complex_A, torch.float64, complex_A=complex_A, small=True)
        if args["u"].numel() * args["A"].shape[1] > 600:
            continue
        names = [k for k, x in args.items() if isinstance(x, torch.Tensor) and k != "offsets"]
        tensors = [args[k].detach().requires_grad_() for k in names]

        def scan(*xs, args=args, names=names):
            return selective_scan(
                **{**args, **dict(zip(names, xs, strict=True))}, return_last_state=True, backend=backend
            )

        assert torch.autograd.gradcheck(scan, tensors, fast_mode=seed % 2 == 0)


def test_packed_is_exactly_the_segments_alone(results):
    lengths = [3, 0, 1, 65, 17, 0, 130, 2]
    args, offsets = packed_problem(lengths, d=40, n=16, groups=1)
    whole = results({**args, "offsets": offsets, "delta_softplus": True})
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.randn(whole[k].shape, generator=generator, dtype=torch.float64).float() for k in ("out", "last_state")
    ]
    for s, length in enumerate(lengths):
        rows = slice(int(offsets[s]), int(offsets[s + 1]))
        part = {k: x[rows] if x.shape[:1] == args["u"].shape[:1] else x for k, x in args.items()}
        part["initial_state"] = args["initial_state"][s : s + 1]
        part = {k: x.detach().requires_grad_() for k, x in part.items()}
        one = torch.tensor([0, length])
        out, last = selective_scan(**part, offsets=one, delta_softplus=True, return_last_state=True)
        assert torch.equal(out, whole["out"][rows])
        assert torch.equal(last[0], whole["last_state"][s])
        grads = torch.autograd.grad((out, last), list(part.values()), (directions[0][rows], directions[1][s : s + 1]))
        for name, grad in zip(part, grads, strict=True):
            if name in ("u", "delta", "z", "B", "C"):
                assert torch.equal(grad, whole[f"d{name}"][rows]), name
            elif name == "initial_state":
                assert torch.equal(grad[0], whole["dinitial_state"][s])


def test_both_layouts_are_exactly_the_same(results):
    args, offsets = packed_problem([37, 37], d=20, n=7)
    packed = results({**args, "offsets": offsets, "delta_softplus": True})
    signals = {k: args[k].unflatten(0, (2, 37)).mT for k in ("u", "delta", "z")}
    coefficients = {k: args[k].unflatten(0, (2, 37)).permute(0, 2, 3, 1) for k in ("B", "C")}
    batch = results({**args, **signals, **coefficients, "delta_softplus": True})
    assert torch.equal(batch["out"].mT.flatten(0, 1), packed["out"])
    assert torch.equal(batch["last_state"], packed["last_state"])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_scan_continues_where_another_stopped(backend):
    args, _ = packed_problem([99], d=10, n=6)
    args["initial_state"] = args["initial_state"][:1]

    def scan(begin, end, state):
        part = {k: x[begin:end] if x.shape[0] == 99 else x for k, x in args.items()}
        part["initial_state"] = state
        offsets = torch.tensor([0, end - begin])
        return selective_scan(**part, offsets=offsets, delta_softplus=True, return_last_state=True, backend=backend)

    whole, last = scan(0, 99, args["initial_state"])
    state, outs = args["initial_state"], []
    for begin, end in ((0, 1), (1, 2), (2, 40), (40, 40), (40, 99)):
        out, state = scan(begin, end, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_a_segment_hears_nothing_of_the_others():
    args, offsets = packed_problem([5, 7, 4])
    args["u"] = args["u"].clone().requires_grad_()
    selective_scan(**args, offsets=offsets)[5:12].sum().backward()
    assert torch.equal(args["u"].grad[:5], torch.zeros(5, 6)) and torch.equal(args["u"].grad[12:], torch.zeros(4, 6))
    assert args["u"].grad[5:12].abs().min() > 0


def test_threads_change_no_bit(results):
    args, offsets = packed_problem([300, 200, 0, 411], d=70, n=16, groups=1)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(results({**args, "offsets": offsets, "delta_softplus": True}))
    for other in runs[1:]:
        for name, x in runs[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("variable", [True, False])
def test_a_few_long_segments_are_cut_into_spans(variable, results, close):
    args, offsets = packed_problem([4200, 1500], d=5, n=3, groups=1, dtype=torch.float64)
    if variable:
        args["offsets"] = offsets
    else:
        for k in ("u", "delta", "z"):
            args[k] = args[k][:4200].mT[None]
        args["B"], args["C"] = torch.randn(5, 3).double(), torch.randn(5, 3).double()
        args["initial_state"] = args["initial_state"][:1]
    args["delta"] = args["delta"] - 4
    torch.set_num_threads(1)
    want = results({**args, "delta_softplus": True})
    torch.set_num_threads(6)
    once, twice = (results({**args, "delta_softplus": True}) for _ in range(2))
    close(once, want, 1e-12)
    assert not torch.equal(once["out"], want["out"])
    for name, x in once.items():
        assert torch.equal(x, twice[name]), name


@pytest.mark.parametrize(("b", "d", "n", "length"), [(2, 64, 16, 51), (1, 32, 16, 1024), (1, 16, 64, 512)])
def test_memory_kept_for_the_backward_pass_is_within_twice_the_inputs(b, d, n, length):
    u, delta, z = (torch.randn(b, d, length).requires_grad_() for _ in range(3))
    A, B, C = -torch.rand(d, n), torch.randn(b, n, length), torch.randn(b, n, length)
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(u, delta, A, B, C, z=z)
    inputs = sum(x.nbytes for x in (u, delta, z, A, B, C))
    assert inputs <= sum(kept.values()) <= 2 * inputs


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_opcheck(backend, seed, drawn):
    args = drawn(seed, torch.float32, complex_A=seed == 4, small=True)
    fields = list(vars(canonical(ScanProblem(**{"offsets": None, **args}))).values())
    opcheck(torch.ops.mamba_scan.scan.default, (*fields, True, False, backend))
    for x in fields:
        if torch.is_tensor(x) and (x.is_floating_point() or x.is_complex()):
            x.requires_grad_()
    opcheck(torch.ops.mamba_scan.scan.default, (*fields, True, True, backend))


def test_compiles_into_one_graph():
    args, offsets = packed_problem([5, 0, 9])
    args = {k: x.requires_grad_() for k, x in args.items()}

    def loss(offsets, **args):
        out, last = selective_scan(**args, offsets=offsets, delta_softplus=True, return_last_state=True)
        return out.square().sum() + last.sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(offsets, **args), list(args.values()))
    got = torch.autograd.grad(compiled(offsets, **args), list(args.values()))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_at_all(lengths, results):
    args, offsets = packed_problem(lengths)
    got = results({**args, "offsets": offsets})
    assert got["out"].shape == (0, 6)
    assert torch.equal(got["last_state"], args["initial_state"])
    assert not got["dA"].any()


def test_infinite_and_missing_numbers_stay_what_they_are():
    u = torch.ones(1, 1, 4)
    delta = torch.tensor([[[0.0, float("inf"), float("nan"), 1.0]]])
    out = selective_scan(u, delta, -torch.ones(1, 1), torch.zeros(1, 1, 4) + 1, torch.ones(1, 1, 4), backend="cpu")
    assert out[0, 0, 0] == 0 and out[0, 0, 1] == float("inf") and out[0, 0, 2:].isnan().all()
    # A decay too small for a float is zero, and one step of zero leaves the state alone exactly.
    args = (
        torch.zeros(1, 1, 2),
        torch.tensor([[[1000.0, 0.0]]]),
        -torch.ones(1, 1),
        torch.ones(1, 1, 2),
        torch.ones(1, 1, 2),
    )
    out, last = selective_scan(*args, initial_state=torch.full((1, 1, 1), 3.0), return_last_state=True)
    assert not out.any() and not last.any()


def test_chunks_are_those_of_the_kernels():
    from mamba_scan.impl import cpu

    assert cpu._module().scan_chunk() == CHUNK
