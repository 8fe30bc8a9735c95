"""The build recipe on a package of a few lines: paths, what an install asks for, CUDA sources."""

import ctypes
from pathlib import Path

import pytest

from hstu_kernels import native


def package_in(folder, cuda=False):
    """A package whose modules know no Python, so that compiling one takes a moment."""
    csrc = folder / "src" / "tiny" / "csrc"
    csrc.mkdir(parents=True)
    (csrc / "three_cpu.cpp").write_text("namespace FOOTFALL_ISA { int three() { return 3; } }\n")
    (csrc / "bind_cpu.cpp").write_text(
        "namespace portable { int three(); }\n"
        'extern "C" __attribute__((visibility("default"))) int answer() { return portable::three(); }\n'
    )
    if cuda:
        (csrc / "four_cuda.cu").write_text(
            "__global__ void nothing(int) {}\n"
            'extern "C" __attribute__((visibility("default"))) int answer() {\n'
            "int n; cudaGetDeviceCount(&n); nothing<<<1, 1>>>(0); return 4; }\n"
        )
        (csrc / "bind_cuda.cpp").write_text("")
    return csrc.parent


def compiled(package):
    return sorted(path.name.split(".")[0] for path in package.glob("*.so"))


def answer(path):
    return ctypes.CDLL(str(path)).answer()


@pytest.fixture
def no_pybind11(monkeypatch):
    monkeypatch.setattr(native, "_pybind11_include", lambda: "/nowhere")


def test_relative_paths_are_of_the_callers_folder(tmp_path, monkeypatch, no_pybind11):
    package_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    package = Path("src/tiny")
    assert answer(native.build(package, "_cpu")) == 3
    built = native.build(package, "_cpu", out=Path("modules"), work=Path("objects"))
    assert built == tmp_path / "modules" / f"_cpu{native.SUFFIX}"
    assert answer(built) == 3


def test_a_package_without_cuda_sources_asks_for_no_nvcc(tmp_path, monkeypatch, no_pybind11):
    monkeypatch.setattr(native, "_nvcc", lambda: None)
    package = package_in(tmp_path)
    native.install_time_modules(package, "auto")
    assert compiled(package) == ["_cpu"]


def test_a_missing_nvcc_is_fatal_only_for_those_who_insist(tmp_path, monkeypatch, no_pybind11):
    monkeypatch.setattr(native, "_nvcc", lambda: None)
    package = package_in(tmp_path, cuda=True)
    native.install_time_modules(package, "auto")
    assert compiled(package) == ["_cpu"]
    with pytest.raises(native.BuildError, match="no nvcc found"):
        native.install_time_modules(package, "cuda")
    monkeypatch.setenv("FOOTFALL_CUDA", "on")
    with pytest.raises(native.BuildError, match="no nvcc found"):
        native.install_time_modules(package, "auto")
    monkeypatch.setenv("FOOTFALL_CUDA", "perhaps")
    with pytest.raises(native.BuildError, match="FOOTFALL_CUDA must be auto, on or off, got 'perhaps'"):
        native.install_time_modules(package, "auto")


@pytest.mark.skipif(native._nvcc() is None, reason="no nvcc")
def test_cuda_modules_compile_and_load_without_a_driver(tmp_path, monkeypatch, no_pybind11):
    package = package_in(tmp_path, cuda=True)
    monkeypatch.setenv("FOOTFALL_CUDA", "off")
    native.install_time_modules(package, "auto")
    assert compiled(package) == ["_cpu"]
    with pytest.raises(native.BuildError, match="switched off by FOOTFALL_CUDA=off"):
        native.load(package, "_cuda")
    monkeypatch.delenv("FOOTFALL_CUDA")
    monkeypatch.setattr(native, "_card", lambda: False)
    assert len(native.install_time_modules(package, "auto")) == 1
    monkeypatch.setattr(native, "_card", lambda: True)
    built = native.install_time_modules(package, "auto")
    assert [path.name.split(".")[0] for path in built] == ["_cpu", "_cuda"]
    assert answer(built[1]) == 4


def test_a_module_of_other_sources_is_never_loaded(tmp_path, monkeypatch):
    package = package_in(tmp_path)
    module = package / f"_cpu{native.SUFFIX}"
    module.write_bytes(native._sources(package).encode())
    # Nothing compiles these; what is asked is which of them would be taken.
    monkeypatch.setenv("FOOTFALL_JIT", "0")
    with pytest.raises(ImportError):
        native.load(package, "_cpu")
    (package / "csrc" / "three_cpu.cpp").write_text("namespace FOOTFALL_ISA { int three() { return 4; } }\n")
    with pytest.raises(native.BuildError, match="other sources"):
        native.load(package, "_cpu")
