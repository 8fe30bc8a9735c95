"""Names, shapes, dtypes and errors of ``selective_scan``; and what other implementations are known to get wrong."""

import subprocess
import sys

import pytest
import torch

import mamba_scan
from mamba_scan import available_backends, selective_scan, selective_scan_fn


def arguments(b=2, d=6, n=4, length=5):
    torch.manual_seed(0)
    return {
        "u": torch.randn(b, d, length),
        "delta": torch.rand(b, d, length),
        "A": -torch.rand(d, n),
        "B": torch.randn(b, n, length),
        "C": torch.randn(b, n, length),
    }


def packed_arguments(rows=7, d=6, n=4):
    torch.manual_seed(0)
    return {
        "u": torch.randn(rows, d),
        "delta": torch.rand(rows, d),
        "A": -torch.rand(d, n),
        "B": torch.randn(rows, n),
        "C": torch.randn(rows, n),
        "offsets": torch.tensor([0, 3, 3, 7]),
    }


def test_one_step_by_hand():
    u, delta, A, B, C = (torch.tensor(x).reshape(s) for x, s in
        (([2.0], (1, 1, 1)), ([0.5], (1, 1, 1)), ([-1.0], (1, 1)), ([3.0], (1, 1, 1)), ([4.0], (1, 1, 1))))  # fmt: skip
    out, last = selective_scan(u, delta, A, B, C, D=torch.tensor([10.0]), return_last_state=True,
        initial_state=torch.full((1, 1, 1), 7.0))  # fmt: skip
    state = 7 * torch.tensor(-0.5).exp() + 0.5 * 3 * 2
    torch.testing.assert_close(last.flatten(), state.reshape(1))
    torch.testing.assert_close(out.flatten(), (4 * state + 10 * 2).reshape(1))


def test_alias_and_positional_order():
    args = arguments()
    extra = (torch.randn(6), torch.randn(2, 6, 5), torch.randn(6), True, True)
    out, last = selective_scan_fn(*args.values(), *extra)
    assert selective_scan_fn is selective_scan
    assert out.shape == (2, 6, 5) and last.shape == (2, 6, 4) and last.dtype == torch.float32
    assert torch.equal(selective_scan(*args.values(), *extra[:4]), out)


def test_dtypes_of_the_results():
    args = arguments()
    for dtype in (torch.bfloat16, torch.float16):
        half = {k: x if k == "A" else x.to(dtype) for k, x in args.items()}
        out, last = selective_scan(**half, return_last_state=True)
        assert out.dtype == dtype and last.dtype == torch.float32
    out, last = selective_scan(**{k: x.double() for k, x in args.items()}, return_last_state=True)
    assert out.dtype == last.dtype == torch.float64


BROKEN = {
    "u": [lambda a: a | {"u": a["u"][0]}, lambda a: a | {"u": a["u"].int()}],
    "delta": [lambda a: a | {"delta": a["delta"][:, :, :-1]}, lambda a: a | {"delta": a["delta"].double()}],
    "A": [lambda a: a | {"A": a["A"][:-1]}, lambda a: a | {"A": a["A"].int()}],
    "B": [
        lambda a: a | {"B": a["B"][:, :-1]},
        lambda a: a | {"B": a["B"][:, None].expand(-1, 4, -1, -1)},
        lambda a: a | {"B": a["B"].double()},
        lambda a: a | {"B": torch.randn(5, 4)},
    ],
    "C": [lambda a: a | {"C": a["C"][:, :, :-1]}, lambda a: a | {"C": torch.stack([a["C"]] * 2, 1)}],
    "D": [lambda a: a | {"D": torch.ones(5)}],
    "z": [lambda a: a | {"z": a["u"].mT}],
    "delta_bias": [lambda a: a | {"delta_bias": torch.ones(6, 1)}],
    "initial_state": [lambda a: a | {"initial_state": torch.ones(2, 4, 6)}],
    "backend": [lambda a: a | {"backend": "gpu"}],
}


@pytest.mark.parametrize(("name", "how"), [(k, i) for k, v in BROKEN.items() for i in range(len(v))])
def test_a_broken_argument_is_named(name, how):
    with pytest.raises(ValueError, match=rf"^{name}: got .*, needs "):
        selective_scan(**BROKEN[name][how](arguments()))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 3, 7], "first value 1"),
        ([0, 3, 6], "last value 6"),
        ([0, 5, 3, 7], "got 3 after 5 at position 2"),
        ([[0, 7]], "int32 or int64"),
        ([0.0, 7.0], "float32"),
    ],
)
def test_broken_offsets_are_explained(offsets, message):
    with pytest.raises(ValueError, match=rf"offsets: .*{message}"):
        selective_scan(**packed_arguments() | {"offsets": torch.tensor(offsets)})


def test_devices_may_not_mix():
    with pytest.raises(ValueError, match=r"^A: got a tensor on meta, needs cpu"):
        selective_scan(**arguments() | {"A": torch.empty(6, 4, device="meta")})


def test_channels_must_divide_into_groups():
    args = arguments()
    with pytest.raises(ValueError, match="divisor of d = 6"):
        selective_scan(**args | {k: args[k][:, None].expand(-1, 4, -1, -1) for k in ("B", "C")})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_last_state_has_the_factor_B_when_B_is_constant(backend):
    args = arguments(n=3) | {"B": torch.randn(6, 3)}
    variable = args["B"][None, :, :, None]
    last = selective_scan(**args, return_last_state=True, backend=backend)[1]
    h = torch.zeros(2, 6, 3)
    for t in range(5):
        dt = args["delta"][:, :, t, None]
        h = torch.exp(dt * args["A"]) * h + dt * variable[..., 0] * args["u"][:, :, t, None]
    torch.testing.assert_close(last, h)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("length", [1, 3, 5, 65])
def test_gradients_are_finite_at_odd_lengths_even_where_states_grow(backend, length):
    args = arguments(length=length)
    args["A"] = torch.where(torch.arange(24).reshape(6, 4) % 3 > 0, 0.3, -0.5) * torch.rand(6, 4)
    args = {k: x.requires_grad_() for k, x in args.items()}
    bias = torch.randn(6, requires_grad=True)
    out = selective_scan(**args, delta_bias=bias, delta_softplus=True, backend=backend)
    for grad in torch.autograd.grad(out.sum(), [*args.values(), bias]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_channel_uses_the_coefficients_of_its_group(backend):
    args = arguments(d=6)
    B = torch.randn(2, 3, 4, 5)
    out = selective_scan(**args | {"B": B, "C": B}, backend=backend)
    for group in range(3):
        channels = slice(2 * group, 2 * group + 2)
        part = {k: args[k][:, channels] for k in ("u", "delta")} | {"A": args["A"][channels]}
        alone = selective_scan(**part, B=B[:, group], C=B[:, group], backend=backend)
        torch.testing.assert_close(out[:, channels], alone)


def test_backends_say_whether_and_why_not():
    status = available_backends()
    assert status["reference"] == "ok" and set(status) == {"reference", "cpu", "triton", "cuda"}
    assert all(isinstance(reason, str) and reason for reason in status.values())


def test_without_a_native_module_the_reference_runs_and_says_so_once():
    code = (
        "import os, warnings; os.environ['FOOTFALL_JIT'] = '0'\n"
        "import mamba_scan.native as native\n"
        "native.SUFFIX = '.absent'\n"
        "import torch, mamba_scan\n"
        "x, A, B = torch.randn(1, 2, 3), -torch.ones(2, 4), torch.randn(1, 4, 3)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): mamba_scan.selective_scan(x, x, A, B, B)\n"
        "assert len(caught) == 1 and 'FOOTFALL_JIT' in str(caught[0].message), caught\n"
        "assert 'FOOTFALL_JIT' in mamba_scan.available_backends()['cpu']\n"
        "try: mamba_scan.selective_scan(x, x, A, B, B, backend='cpu')\n"
        "except RuntimeError as error: assert 'FOOTFALL_JIT' in str(error)\n"
        "else: raise SystemExit('cpu was not refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_brings_neither_triton_nor_a_compiler():
    code = "import sys, mamba_scan; assert 'triton' not in sys.modules and 'mamba_scan._cpu' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_exist():
    assert all(hasattr(mamba_scan, name) for name in mamba_scan.__all__)
