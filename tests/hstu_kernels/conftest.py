"""Without a GPU the Triton kernels run in the interpreter, which must be asked for before triton is imported; the CUDA
kernels run through a header that plays the card."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hstu_kernels import native
from hstu_kernels.impl import cuda


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    """The module of the CUDA sources, compiled for the CPU with the header that plays the card."""
    csrc = Path(cuda.__file__).parents[1] / "csrc"
    folder, cxx = tmp_path_factory.mktemp("cuda_on_host"), shutil.which("g++") or shutil.which("c++")
    if cxx is None:
        pytest.skip("no C++ compiler")
    includes = [Path(__file__).parent / "cuda_on_host", csrc, native._pybind11_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", *(f"-I{x}" for x in includes)]
    compilers = [
        subprocess.Popen([cxx, *flags, "-x", "c++", "-c", source, "-o", folder / f"{source.stem}.o"])
        for source in [*csrc.glob("*_cuda.cu"), csrc / "bind_cuda.cpp"]
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(compilers)
    path = folder / f"_cuda{native.SUFFIX}"
    subprocess.run([cxx, "-shared", *folder.glob("*.o"), "-o", path], check=True)
    spec = importlib.util.spec_from_file_location("hstu_kernels._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_on_host(on_host, monkeypatch):
    monkeypatch.setattr(cuda, "_load", lambda: (on_host, None))
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "supports", lambda x: None)
    return on_host
