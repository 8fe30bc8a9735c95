"""The Triton kernels: run by Triton's interpreter where there is no card, and compiled for cards nobody has here."""

import os
import subprocess
import sys

import pytest
import torch

from mamba_scan import Mamba, available_backends, causal_conv1d, selective_scan, selective_state_update

pytest.importorskip("triton")
PARITY = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(args):
    return {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in args.items()}


def check(seed, drawn, results, close, small=True):
    dtype = DTYPES[seed % len(DTYPES)]
    args = on_device(drawn(seed, dtype, small=small, states=(1, 7, 16, 64, 256)))
    close(results(args, "triton"), results(args, "reference"), PARITY[dtype])


def test_the_backend_is_here():
    assert available_backends()["triton"] == "ok"


@pytest.mark.parametrize("seed", range(2000, 2024))
def test_scan(seed, drawn, results, close):
    check(seed, drawn, results, close)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(30))
def test_scan_on_many_more(block, drawn, results, close):
    for seed in range(2100 + block * 10, 2110 + block * 10):
        check(seed, drawn, results, close)


@pytest.mark.gpu
@pytest.mark.parametrize("block", range(30))
def test_scan_on_a_card(block, drawn, results, close):
    if DEVICE != "cuda":
        pytest.skip("no CUDA device is visible")
    for seed in range(3000 + block * 10, 3010 + block * 10):
        check(seed, drawn, results, close, small=False)


@pytest.mark.parametrize("constant", [False, True])
def test_scan_across_chunks_and_wide_states(constant, results, close):
    torch.manual_seed(0)
    offsets = torch.tensor([0, 66, 66, 67, 70])
    u, delta, z = (torch.randn(70, 3) for _ in range(3))
    args = {"u": u, "delta": delta, "z": z, "A": -torch.rand(3, 33), "delta_softplus": True}
    if constant:
        args |= {k: args[k][None, :66].mT for k in ("u", "delta", "z")}
        args |= {"B": torch.randn(3, 33), "C": torch.randn(3, 33)}
    else:
        args |= {"B": torch.randn(70, 33), "C": torch.randn(70, 33), "offsets": offsets}
    args = on_device(args)
    close(results(args, "triton"), results(args, "reference"), 2e-5)


@pytest.mark.parametrize("seed", range(12))
def test_conv(seed):
    g = torch.Generator().manual_seed(seed)
    d, width, rows = 3 + seed % 3, 1 + seed % 4, 40
    args = {"x": torch.randn(rows, d, generator=g), "weight": torch.randn(d, width, generator=g)}
    segments = 3
    if seed % 2:
        args["offsets"] = torch.tensor([0, 2, 2, rows])
    else:
        args["x"], segments = args["x"].unflatten(0, (2, -1)).mT, 2
    if seed % 3:
        args["bias"] = torch.randn(d, generator=g)
        args["initial_states"] = torch.randn(segments, d, width - 1, generator=g)
    if seed % 5 == 0:
        index = torch.randint(-1, 3, (rows,), generator=g).sort()[0]
        args["seq_idx"] = index if seed % 2 else index.view(2, -1)
    args, results = on_device(args), []
    for backend in ("triton", "reference"):
        tensors = {k: x.detach().requires_grad_() for k, x in args.items() if x.is_floating_point()}
        out, final = causal_conv1d(
            **{**args, **tensors}, activation="silu" if seed % 4 else None, return_final_states=True, backend=backend
        )
        grads = torch.autograd.grad((out.square().sum() + final.sin().sum()), list(tensors.values()), allow_unused=True)
        results.append([out, final, *(x for x in grads if x is not None)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_block_and_its_steps():
    torch.manual_seed(0)
    m, offsets = Mamba(4, d_state=3).to(DEVICE), torch.tensor([0, 2, 5], device=DEVICE)
    x, results = torch.randn(5, 4, device=DEVICE), []
    for m.backend in ("triton", "reference"):
        out, state = m(x, offsets, m.init_state(2))
        grads = torch.autograd.grad(out.square().sum() + state.ssm.sum(), list(m.parameters()))
        step, state = m.step(x[:2], state)
        results.append([out, *grads, step, *state])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_state_update():
    state, x, A, B = torch.randn(2, 3, 4), torch.randn(2, 3), -torch.rand(3, 4), torch.randn(2, 4)
    (state, x, A, B) = (t.to(DEVICE) for t in (state, x, A, B))
    other = state.clone()
    outs = [selective_state_update(s, x, x.abs(), A, B, B, backend=b) for s, b in ((state, "triton"), (other, None))]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(state, other)


def test_what_it_cannot_take_it_explains():
    x, A, B = torch.randn(1, 2, 3, device=DEVICE), -torch.ones(2, 4, device=DEVICE), torch.randn(1, 4, 3, device=DEVICE)
    with pytest.raises(ValueError, match="A is complex"):
        selective_scan(x, x, A.to(torch.complex64), B.repeat(1, 1, 2), B.repeat(1, 1, 2), backend="triton")
    with pytest.raises(ValueError, match="float64"):
        selective_scan(x.double(), x.double(), A, B.double(), B.double(), backend="triton")


def test_without_a_card_it_says_so():
    code = "import mamba_scan; print(mamba_scan.available_backends()['triton'])"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "no CUDA device" in done.stdout


@pytest.mark.slow
def test_kernels_compile_for_real_cards():
    """No card is needed to compile: types, shapes and barriers are checked by the real compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 2 * 2 * 10


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mamba_scan.impl.triton import conv, scan, ssd

def compile(kernel, pointers, constants):
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    places = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    for architecture in (80, 90):
        triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
        print("ok")

floats = ("out last saved u delta z A B C D bias initial dout dlast du ddelta dz dB dC state_sums channel_sums "
          "dinitial scratch first second parts weight dpre dx x").split()
pointers = {n: "*fp32" for n in floats} | {"u": "*bf16", "delta": "*bf16", "x": "*bf16"}
pointers |= {"offsets": "*i64", "begin": "*i64", "end": "*i64", "segment": "*i32", "documents": "*i32"}
for full in (True, False):
    scan_sizes = dict(GROUPS=1, PER_GROUP=4, SOFTPLUS=full, CHUNK=64, PACKED=full, ROWS_B=True, ROWS_C=full)
    scan_sizes |= dict(BLOCK_D=32, BLOCK_N=16) if full else dict(BLOCK_D=2, BLOCK_N=256)
    conv_sizes = dict(WIDTH=4, SILU=full, BLOCK_R=32, BLOCK_D=32)
    if not full:
        scan_sizes |= {n: None for n in ("offsets", "z", "dz", "D", "bias", "initial", "dlast")}
        conv_sizes |= {n: None for n in ("bias", "initial", "documents")}
    # "parts" is a number to the scan, a tensor to the convolution.
    numbers = {n: kind for n, kind in pointers.items() if n != "parts"}
    compile(scan._scan_forward_kernel, numbers, scan_sizes | {"SAVE": full})
    compile(scan._scan_backward_kernel, numbers, scan_sizes | ({} if full else {"out": None}))
    compile(conv._conv_kernel, pointers, conv_sizes | {"BACKWARD": False, "parts": None})
    compile(conv._conv_kernel, pointers, conv_sizes | {"BACKWARD": True})
    compile(conv._conv_input_kernel, pointers, conv_sizes | {"parts": None})
    # "first" is a tensor to the convolution only, "start" may be absent.
    chunks = {n: "*fp32" for n in "states totals start final ends dy dx y ddt dA dB dC dt A".split()}
    chunks |= {n: "*bf16" for n in "x B C".split()} | {n: "*i64" for n in "firsts sizes first_of chunks_of".split()}
    blocks = dict(PER_GROUP=6, T=64, P=64, N=64, PRECISION="tf32" if full else "ieee")
    compile(ssd._chunk_states_kernel, chunks, blocks | {"REVERSE": full})
    compile(ssd._pass_states_kernel, chunks, {"REVERSE": full, "CELLS": 256} | ({} if full else {"start": None}))
    compile(ssd._chunk_outputs_kernel, chunks, blocks)
    compile(ssd._chunk_inputs_kernel, chunks, blocks)
    compile(ssd._chunk_coefficients_kernel, chunks, blocks | {"HEADS": 4})
"""
