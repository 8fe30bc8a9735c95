"""The CUDA kernels, on a CPU through a stand-in for the card and on a card; test_parity.py draws more for both."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hstu_kernels import hstu_attention, native
from hstu_kernels.impl import cuda

CSRC = Path(cuda.__file__).parents[1] / "csrc"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [90, 200])
def test_wide_heads_and_several_chunks_equal_reference(cuda_on_host, dtype, width, monkeypatch):
    # Less memory for the parts than row tiles: a block goes over more than one.
    monkeypatch.setattr(cuda, "_PART_NUMBERS", 2 * 2 * 299)
    generator = torch.Generator().manual_seed(0)
    lengths = [150, 37]
    leaves = [torch.randn(sum(lengths), 1, width, generator=generator).to(dtype) for _ in range(3)]
    tables = [torch.randn(1, 2 * 160 - 1, generator=generator), torch.randn(1, 90, generator=generator)]
    stamps = torch.randint(0, 10**7, (sum(lengths),), generator=generator)
    found = []
    for backend, kind in (("reference", torch.float64), ("cuda", dtype)):
        inputs = [x.to(dtype).to(kind).requires_grad_() for x in (*leaves, *tables)]
        out = hstu_attention(
            *inputs[:3],
            torch.tensor([0, *lengths]).cumsum(0),
            150,
            position_weight=inputs[3],
            timestamps=stamps,
            time_weight=inputs[4],
            backend=backend,
        )
        found.append([out.detach(), *torch.autograd.grad(out, inputs, leaves[0].to(kind))])
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for expected, got in zip(*found, strict=True):
        assert float((got.double() - expected).abs().max() / expected.abs().max()) <= tolerance


def test_the_launcher_names_what_it_cannot_take(cuda_on_host):
    offsets, x = torch.tensor([0, 2]), torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match="width_qk: got 300, needs 1 to 256"):
        hstu_attention(torch.zeros(2, 1, 300), torch.zeros(2, 1, 300), x, offsets, 2, backend="cuda")
    with pytest.raises(ValueError, match="dtype: got code 1"):
        cuda._DTYPE_CODES[torch.float64] = 1
        try:
            hstu_attention(x.double(), x.double(), x.double(), offsets, 2, backend="cuda")
        finally:
            del cuda._DTYPE_CODES[torch.float64]
    wide = torch.zeros(1, 9000, requires_grad=True)
    out = hstu_attention(x, x, x, offsets, 2, timestamps=offsets, time_weight=wide, backend="cuda")
    with pytest.raises(ValueError, match="time_weight: got width 9000, needs at most 4096 for a gradient"):
        out.sum().backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_without_a_card_the_backend_says_so():
    x, offsets = torch.zeros(2, 1, 4), torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match='backend="cuda" cannot run here: no CUDA device is visible'):
        hstu_attention(x, x, x, offsets, 2, backend="cuda")


@pytest.mark.slow
@pytest.mark.skipif(native._nvcc() is None, reason="no nvcc")
def test_sources_compile_without_warnings_and_load_without_a_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Werror=all-warnings")
    path = native.build(CSRC.parent, "_cuda", out=tmp_path, work=tmp_path / "work")
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_cuda', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.device_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("width", [50, 64, 128])
@pytest.mark.parametrize("longest", [64, 257, 1024])
def test_half_precision_errs_no_more_than_torch_does(backend, width, longest):
    """Fresh inputs of scale 1 and poisoned memory; bfloat16 itself errs, so torch's error in it is the measure."""
    torch.cuda.empty_cache()
    poison = torch.full((64 << 20,), float("nan"), device="cuda")
    del poison
    lengths = torch.randint(1, longest + 1, (6,))
    total, offsets = int(lengths.sum()), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    inputs = [(2 * torch.rand(total, 2, width) - 1).bfloat16() for _ in range(4)]
    *leaves, up = inputs

    def run(backend, kind, device, alpha=1.0):
        q, k, v = (x.to(device, kind).requires_grad_() for x in leaves)
        if backend == "torch":
            outs = []
            for a, b, c in zip(*(x.split(lengths.tolist()) for x in (q, k, v)), strict=True):
                scores = alpha * torch.einsum("ihd,jhd->hij", a, b)
                mask = torch.ones(len(a), len(a), device=device, dtype=kind).tril()
                weights = torch.nn.functional.silu(scores) * mask / longest
                outs.append(torch.einsum("hij,jhd->ihd", weights, c))
            out = torch.cat(outs)
        else:
            out = hstu_attention(q, k, v, offsets.to(device), longest, alpha=alpha, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), up.to(device, kind))]

    exact, plain = run("reference", torch.float64, "cpu"), run("torch", torch.bfloat16, "cuda")
    for index, (want, peer, got) in enumerate(zip(exact, plain, run(backend, torch.bfloat16, "cuda"), strict=True)):
        limit = (2 if index == 0 else 3) * float((peer.cpu().double() - want).abs().max())
        assert float((got.cpu().double() - want).abs().max()) <= limit
    for want, got in zip(exact, run(backend, torch.float32, "cuda"), strict=True):
        assert float((got.cpu().double() - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.gpu
def test_backward_on_a_card_is_bitwise_equal_over_runs():
    q, k, v = (torch.randn(900, 2, 64, device="cuda", requires_grad=True) for _ in range(3))
    tables = [torch.randn(1, width, device="cuda", requires_grad=True) for width in (1199, 129)]
    offsets, stamps = torch.tensor([0, 600, 900], device="cuda"), torch.arange(900, device="cuda") * 1000
    found = []
    for _ in range(5):
        out = hstu_attention(
            q, k, v, offsets, 600, position_weight=tables[0], timestamps=stamps, time_weight=tables[1], backend="cuda"
        )
        found.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, *tables])])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
