"""Every backend gives what the reference gives, on drawn problems: output, last state and all gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_scan import available_backends

PARITY = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)


def test_the_cpu_backend_is_here():
    assert available_backends()["cpu"] == "ok"


@pytest.mark.parametrize("block", range(25))
def test_cpu_real(block, drawn, results, close):
    for seed in range(block * 10, block * 10 + 10):
        dtype = DTYPES[seed % len(DTYPES)]
        args = drawn(seed, dtype)
        close(results(args, "cpu"), results(args, "reference"), PARITY[dtype])


@pytest.mark.parametrize("block", range(6))
def test_cpu_complex(block, drawn, results, close):
    for seed in range(1000 + block * 10, 1010 + block * 10):
        dtype = DTYPES[seed % len(DTYPES)]
        args = drawn(seed, dtype, complex_A=True)
        close(results(args, "cpu"), results(args, "reference"), max(PARITY[dtype] * 5, 1e-11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype, drawn, results, close):
    args = drawn(5, dtype)
    wide = {k: x.float() if isinstance(x, torch.Tensor) and x.dtype == dtype else x for k, x in args.items()}
    got, want = results(args, "cpu"), results(wide, "cpu")
    close({"out": got["out"].float()}, {"out": want["out"]}, 4e-3 if dtype == torch.bfloat16 else 5e-4)
    assert torch.equal(got["last_state"], want["last_state"])


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa, tmp_path):
    """The instruction set is chosen when the module starts, so each one needs a process of its own."""
    script = tmp_path / "parity.py"
    helpers = str(Path(__file__).with_name("conftest.py"))
    script.write_text(
        "import importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location('helpers', {helpers!r})\n"
        "c = importlib.util.module_from_spec(spec); spec.loader.exec_module(c)\n"
        "from mamba_scan.impl import cpu\n"
        "if cpu.unavailable():\n    print(cpu.unavailable()); sys.exit(77)\n"
        f"assert cpu.isa() == {isa!r}\n"
        "for seed in range(24):\n"
        "    dtype = (torch.float64, torch.float32)[seed % 2]\n"
        "    args = c.draw(seed, dtype, complex_A=seed % 6 == 5, small=seed % 3 == 0)\n"
        "    c.assert_close(c.run(args, 'cpu'), c.run(args, 'reference'), 1e-11 if dtype == torch.float64 else 1e-4)\n"
    )
    environment = {**os.environ, "FOOTFALL_ISA": isa}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr
