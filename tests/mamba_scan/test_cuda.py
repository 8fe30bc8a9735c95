"""The CUDA kernels: run by an emulator where there is no card (the threads of a block take turns on a CPU), on a card
where there is one, and compiled for real cards where there is nvcc."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from mamba_scan import Mamba, available_backends, causal_conv1d, native, selective_scan
from mamba_scan.impl import cuda

CSRC = Path(native.__file__).parent / "csrc"
PARITY = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The module of the CUDA sources and their binder, compiled by a C++ compiler against the emulator."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    pybind11 = pytest.importorskip("pybind11")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("cuda") / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [CSRC, Path(__file__).parent, pybind11.get_include(), sysconfig.get_path("include")]
    command = [*compiler.split(), "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", "-o", str(target)]
    command += [f"-I{folder}" for folder in includes]
    command += ["-x", "c++", *(str(CSRC / name) for name in ("scan_cuda.cu", "conv_cuda.cu", "bind_cuda.cpp"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    spec = importlib.util.spec_from_file_location("mamba_scan._cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulator(emulated, monkeypatch):
    """The backend "cuda" on CPU tensors."""
    monkeypatch.setattr(cuda, "_module", lambda: emulated)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "supports", lambda p: None)


def check_scan(seed, drawn, results, close, device="cpu", **options):
    dtype = DTYPES[seed % len(DTYPES)]
    args = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in drawn(seed, dtype, **options).items()}
    close(results(args, "cuda"), results(args, "reference"), PARITY[dtype])


@pytest.mark.parametrize("seed", range(4000, 4012))
def test_scan(seed, emulator, drawn, results, close):
    check_scan(seed, drawn, results, close, small=True)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_scan_on_many_more(block, emulator, drawn, results, close):
    for seed in range(4100 + block * 8, 4108 + block * 8):
        check_scan(seed, drawn, results, close, small=seed % 4 > 0, states=(1, 4, 7, 16, 33, 129))


def test_scan_across_chunks_and_blocks(emulator, results, close):
    torch.manual_seed(0)
    u, delta, z = (torch.randn(140, 35) for _ in range(3))
    args = {"u": u, "delta": delta, "z": z, "A": -torch.rand(35, 16), "D": torch.randn(35), "delta_softplus": True}
    args |= {"B": torch.randn(140, 16), "C": torch.randn(140, 16), "offsets": torch.tensor([0, 131, 131, 140])}
    close(results(args, "cuda"), results(args, "reference"), 2e-5)


def test_the_number_of_states_settles_the_threads_of_a_channel(emulator, results, close):
    torch.manual_seed(0)
    for states in (1, 5, 64, 130):
        args = {"u": torch.randn(1, 3, 10), "delta": torch.rand(1, 3, 10), "A": -torch.rand(3, states)}
        args |= {"B": torch.randn(3, states), "C": torch.randn(1, states, 10)}
        close(results(args, "cuda"), results(args, "reference"), 2e-5)


def draw_conv(seed, device="cpu", rows=40):
    g = torch.Generator().manual_seed(seed)
    d, width, segments = 3 + seed % 3, 1 + seed % 5, 3
    args = {"x": torch.randn(rows, d, generator=g), "weight": torch.randn(d, width, generator=g)}
    if seed % 2:
        args["offsets"] = torch.tensor([0, 2, 2, rows])
    else:
        args["x"], segments = args["x"].unflatten(0, (2, -1)).mT, 2
    if seed % 3:
        args["bias"] = torch.randn(d, generator=g)
        args["initial_states"] = torch.randn(segments, d, width - 1, generator=g)
    if seed % 4 == 0:
        index = torch.randint(-1, 3, (rows,), generator=g).sort()[0]
        args["seq_idx"] = index if seed % 2 else index.view(2, -1)
    return {k: x.to(device) for k, x in args.items()}


def run_conv(args, backend, silu):
    tensors = {k: x.detach().requires_grad_() for k, x in args.items() if x.is_floating_point()}
    out, final = causal_conv1d(
        **{**args, **tensors}, activation="silu" if silu else None, return_final_states=True, backend=backend
    )
    grads = torch.autograd.grad(out.square().sum() + final.sin().sum(), list(tensors.values()), allow_unused=True)
    return [out, final, *(x for x in grads if x is not None)]


def check_conv(seed, **options):
    args = draw_conv(seed, **options)
    for got, want in zip(run_conv(args, "cuda", seed % 4), run_conv(args, "reference", seed % 4), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_conv(seed, emulator):
    check_conv(seed)


def test_conv_in_several_parts(emulator):
    check_conv(5, rows=1100)


def test_the_block(emulator):
    torch.manual_seed(0)
    m, offsets, x, results = Mamba(4, d_state=3), torch.tensor([0, 2, 5]), torch.randn(5, 4), []
    for m.backend in ("cuda", "reference"):
        out, state = m(x, offsets, m.init_state(2))
        grads = torch.autograd.grad(out.square().sum() + state.ssm.sum(), list(m.parameters()))
        results.append([out, *grads, *state])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_nothing_at_all(emulator, results):
    u, B = torch.randn(0, 3), torch.randn(0, 4)
    args = {"u": u, "delta": u, "A": -torch.rand(3, 4), "B": B, "C": B, "initial_state": torch.randn(2, 3, 4)}
    got = results({**args, "offsets": torch.tensor([0, 0, 0])}, "cuda")
    assert torch.equal(got["last_state"], args["initial_state"]) and not got["dA"].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is visible")
def test_without_a_card_it_says_so():
    assert available_backends()["cuda"] == "no CUDA device is visible"
    x, B = torch.randn(1, 2, 3), torch.randn(1, 4, 3)
    with pytest.raises(RuntimeError, match='backend="cuda" cannot run here: no CUDA device'):
        selective_scan(x, x, -torch.ones(2, 4), B, B, backend="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scan_cuda.cu", "conv_cuda.cu"])
def test_sources_compile_for_real_cards_without_a_warning(name, tmp_path):
    nvcc = native._nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    flags = [*native.NVCC_FLAGS, "-Werror=all-warnings", "-Xcompiler=-Wall,-Werror", f"-I{CSRC}"]
    done = subprocess.run(
        [nvcc, *flags, "-c", str(CSRC / name), "-o", str(tmp_path / "x.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


@needs_card
@pytest.mark.gpu
@pytest.mark.parametrize("block", range(30))
def test_scan_on_a_card(block, drawn, results, close):
    assert available_backends()["cuda"] == "ok"
    for seed in range(5000 + block * 10, 5010 + block * 10):
        check_scan(seed, drawn, results, close, device="cuda")


@needs_card
@pytest.mark.gpu
@pytest.mark.parametrize("length", [51, 1024])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_of_real_size_against_float64_on_a_cpu(length, packed, results, close):
    torch.manual_seed(length)
    b, d, n = 4, 256, 16
    shape = (b * length, d) if packed else (b, d, length)
    rows = (b * length, n) if packed else (b, n, length)
    args = {k: torch.rand(shape) * 2 - 1 for k in ("u", "delta", "z")}
    args |= {k: torch.rand(rows) * 2 - 1 for k in ("B", "C")}
    args |= {"A": -torch.rand(d, n), "D": torch.rand(d) * 2 - 1, "delta_bias": torch.rand(d) * 2 - 1}
    args |= {"delta_softplus": True, "initial_state": torch.rand(b, d, n) * 2 - 1}
    if packed:
        args["offsets"] = torch.arange(b + 1) * length
    wide = {k: x.double() if isinstance(x, torch.Tensor) and k != "offsets" else x for k, x in args.items()}
    want = results(wide, "cpu")
    on_card = {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in args.items()}
    first, second = (results(on_card, "cuda") for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), f"{name} differs between two runs"
    close({k: x.cpu().double() for k, x in first.items()}, want, 1e-5)


@needs_card
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_conv_on_a_card(seed):
    check_conv(seed, device="cuda", rows=40 if seed % 2 else 1100)
