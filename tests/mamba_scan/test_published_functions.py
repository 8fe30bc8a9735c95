"""Functions of the published packages: states of packed rows, documents in a scan of Mamba-2, the inside of a block."""

import pytest
import torch
import torch.nn.functional as F

from mamba_scan import causal_conv1d, causal_conv1d_varlen_states, mamba_inner_fn, selective_scan, ssd_scan

BACKENDS = ["reference", "cpu"]


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_len", [1, 3, 8])
def test_states_of_packed_rows_are_their_last_ones(state_len, dtype):
    torch.manual_seed(0)
    lengths = [4, 0, 1, 9, 3]
    x, offsets = normal(17, 5, dtype=dtype), torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    states = causal_conv1d_varlen_states(x, offsets.int(), state_len)
    assert states.shape == (5, 5, state_len) and states.dtype == dtype
    for state, part in zip(states, x.split(lengths), strict=True):
        assert torch.equal(state, F.pad(part.T, (state_len, 0))[:, -state_len:])
    assert causal_conv1d_varlen_states(x[:0], torch.tensor([0, 0]), state_len).eq(0).all()


def test_states_of_packed_rows_continue_the_convolution():
    x, weight, offsets = normal(12, 3), normal(3, 4), torch.tensor([0, 5, 12])
    _, final = causal_conv1d(x, weight, offsets=offsets, return_final_states=True)
    assert torch.equal(causal_conv1d_varlen_states(x, offsets, 3), final)


def documents(packed):
    """Arguments of a scan in which documents lie one after the other, and the lengths of these documents."""
    torch.manual_seed(0)
    lengths = [[3, 70, 1], [20, 50, 4]]
    index = torch.stack([torch.repeat_interleave(torch.tensor([4, 7, 2]), torch.tensor(row)) for row in lengths])
    args = {
        "x": normal(2, 74, 4, 3), "dt": normal(2, 74, 4), "A": -torch.rand(4).double(), "B": normal(2, 74, 2, 5),
        "C": normal(2, 74, 2, 5), "D": normal(4), "z": normal(2, 74, 4, 3), "dt_bias": normal(4),
        "initial_states": normal(2, 4, 3, 5),
    }  # fmt: skip
    if packed:
        args = {k: t.flatten(0, 1) if t.shape[:2] == (2, 74) else t for k, t in args.items()}
        # An empty sequence among them.
        args["initial_states"] = normal(3, 4, 3, 5)
    return args, index, lengths


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_documents_in_a_scan_are_scans_of_their_own(packed, backend):
    args, index, lengths = documents(packed)
    tensors = {k: t.requires_grad_() for k, t in args.items()}
    options = {"dt_softplus": True, "return_final_states": True, "backend": backend}
    if packed:
        # The same number at the end of one sequence and at the start of the next does not join them.
        index = torch.cat([index[0], index[0].flip(0)])
        lengths = [lengths[0], [], lengths[0][::-1]]
        offsets = torch.tensor([0, 74, 74, 148])
        out, final = ssd_scan(**tensors, seq_idx=index, offsets=offsets, **options)
    else:
        out, final = ssd_scan(**tensors, seq_idx=index.int(), **options)
    outs, finals, row = [], [], 0
    whole = {k: t if packed or t.shape[:2] != (2, 74) else t.flatten(0, 1) for k, t in tensors.items()}
    for sequence, parts in enumerate(lengths):
        state = whole["initial_states"][sequence : sequence + 1]
        for number, length in enumerate(parts):
            part = {k: t[None, row : row + length] if t.shape[0] == 148 else t for k, t in whole.items()}
            part["initial_states"] = state if number == 0 else None
            y, state = ssd_scan(**part, **options)
            outs.append(y[0])
            row += length
        finals.append(state)
    want, wanted = torch.cat(outs).view(out.shape), torch.cat(finals)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(final, wanted)
    directions = normal(*out.shape), normal(*final.shape)
    got = torch.autograd.grad((out, final), list(tensors.values()), directions)
    expected = torch.autograd.grad((want, wanted), list(tensors.values()), directions)
    for name, a, b in zip(tensors, got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_scan_of_documents_compiles_and_passes_opcheck():
    from mamba_scan.problem_ssd import SSDProblem

    args, index, _ = documents(packed=False)
    args = {k: t.float().requires_grad_() for k, t in args.items()}
    scan = torch.compile(ssd_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(scan(**args, seq_idx=index), ssd_scan(**args, seq_idx=index))
    p = SSDProblem(**args, offsets=None, seq_idx=index, dt_softplus=True, dt_min=0.0, dt_max=1.0, chunk_size=64)
    torch.library.opcheck(torch.ops.mamba_scan.ssd.default, (*vars(p).values(), True, "cpu"))


def inner_arguments(complex_A=False, given=(), dtype=torch.float64):
    """Arguments of the inside of a block; B or C given, [d, n] or [b, n, l], or computed from the rows."""
    torch.manual_seed(0)
    b, d, length, rank, n, width = 2, 6, 70, 3, 4, 5
    parts = 2 * n if complex_A else n
    A = -torch.rand(d, n).to(dtype)
    if complex_A:
        A = torch.complex(A, normal(d, n, dtype=dtype))
    args = {
        "xz": normal(b, 2 * d, length, dtype=dtype), "conv1d_weight": normal(d, 1, 4, dtype=dtype),
        "conv1d_bias": normal(d, dtype=dtype),
        "x_proj_weight": normal(rank + parts * (2 - len(given)), d, dtype=dtype) * 0.5,
        "delta_proj_weight": normal(d, rank, dtype=dtype), "out_proj_weight": normal(width, d, dtype=dtype),
        "out_proj_bias": normal(width, dtype=dtype), "A": A, "D": normal(d, dtype=dtype),
        "delta_bias": normal(d, dtype=dtype),
    }  # fmt: skip
    constant = torch.complex128 if complex_A else dtype
    for name, shape in {"B": (d, n), "C": (b, n, length * (2 if complex_A else 1))}.items():
        if name in given:
            args[name] = normal(*shape, dtype=constant if len(shape) == 2 else dtype)
    return args


def composed(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
             B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
             b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6):  # fmt: skip
    """The inside of a block from the ops, one after the other."""
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    projected = u.mT @ x_proj_weight.T
    rank, parts = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)

    def normed(rows, weight):
        if weight is None:
            return rows
        return rows / (rows.square().mean(-1, keepdim=True) + b_c_dt_rms_eps).sqrt() * weight

    def coefficient(rows, bias, weight):
        rows = normed(rows if bias is None else rows + bias, weight)
        return rows.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2) if A.is_complex() else rows.mT

    delta = normed(projected[..., :rank] @ delta_proj_weight.T, dt_rms_weight).mT
    B = coefficient(projected[..., rank : rank + parts], B_proj_bias, b_rms_weight) if B is None else B
    C = coefficient(projected[..., -parts:], C_proj_bias, c_rms_weight) if C is None else C
    y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("given", [(), ("B",), ("C",), ("B", "C")])
@pytest.mark.parametrize("extra", [False, True])
def test_the_inside_of_a_block_is_the_sum_of_its_parts(extra, given, complex_A):
    args = inner_arguments(complex_A, given)
    if extra:
        n = 8 if complex_A else 4
        args |= {"delta_softplus": False, "delta_bias": None, "D": None, "out_proj_bias": None, "conv1d_bias": None}
        args["delta_proj_weight"] = args["delta_proj_weight"] * 0.01
        args |= {f"{name}_proj_bias": normal(n) for name in "BC" if name not in given}
        if not complex_A:
            args |= {f"{name.lower()}_rms_weight": normal(4) for name in "BC" if name not in given}
        args["dt_rms_weight"] = normal(6) * 0.01
        args["b_c_dt_rms_eps"] = 1e-3
    tensors = {k: t.requires_grad_() for k, t in args.items() if isinstance(t, torch.Tensor)}
    got, want = mamba_inner_fn(**args), composed(**args)
    torch.testing.assert_close(got, want)
    direction = torch.randn_like(want)
    grads, wanted = (torch.autograd.grad(y, list(tensors.values()), direction) for y in (got, want))
    for name, a, b in zip(tensors, grads, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_positions_of_the_inside_are_the_published_ones_and_half_precision_runs():
    args = inner_arguments(dtype=torch.float32)
    names = ("xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight", "out_proj_weight",
             "out_proj_bias", "A")  # fmt: skip
    positional = [args[name] for name in names]
    want = mamba_inner_fn(**args)
    got = mamba_inner_fn(*positional, None, None, args["D"], args["delta_bias"], None, None, True, 1, None, None, None)
    assert torch.equal(got, want)
    half = [x if name == "A" else x.bfloat16() for name, x in zip(names, positional, strict=True)]
    out = mamba_inner_fn(*half, D=args["D"], delta_bias=args["delta_bias"])
    assert out.dtype == torch.bfloat16
    error = (out.float() - want).norm() / want.norm()
    assert error < 3e-2
