"""The build recipe of the kernel packages: ninja compiles C++ (and CUDA, where nvcc is found) into a pybind11 module.

``hatch_build.py`` calls :func:`install_time_modules`; the package calls :func:`load` at first use, which takes the
built module or compiles one into a cache. Nothing here needs torch: the kernels take pointers, so one build serves
every torch version. The same text in every kernel package: an edit belongs into ``kernels/`` of the repository, and
``python kernels/native.py --sync`` copies what is shared into the packages. Copies and no links: archives, Windows
checkouts and single folders turn a link into a text.

Sources live in ``<package>/csrc``: ``*_cpu.cpp`` is compiled once per instruction set with ``-DFOOTFALL_ISA=<name>``,
``*_cuda.cu`` by nvcc, and ``bind_cpu.cpp`` / ``bind_cuda.cpp`` hold the only lines that know Python.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

X86_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
CUDA_ARCHITECTURES = ("80", "90")
# Machine code for those, and intermediate code of the last for the cards that come after it.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES),
    f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}",
]
# macOS links a module only when told that Python's own symbols come later.
LINK_FLAGS = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n"
_OPENMP_HELP = "Install g++, or libomp beside clang (Debian, Ubuntu: apt install libomp-dev), and install again."
# What lies in kernels/ and is copied: below a project, its import package or its C++ sources.
SHARED = {
    "hatch_build.py": "{project}/hatch_build.py",
    "native.py": "{project}/src/{package}/native.py",
    "dispatch.py": "{project}/src/{package}/dispatch.py",
    "waiting.py": "{project}/src/{package}/waiting.py",
    "simd.h": "{project}/src/{package}/csrc/simd.h",
}


class BuildError(RuntimeError):
    """The module cannot be built here; the message says why and what helps."""


def build(package: Path, module: str, *, out: Path | None = None, work: Path | None = None) -> Path:
    """Compile ``module`` (``"_cpu"`` or ``"_cuda"``) of the package folder and move it into place atomically.

    Args:
        package: folder of the import package, the one that holds ``csrc``.
        module: ``"_cpu"`` or ``"_cuda"``.
        out: folder the finished module goes to; the package folder by default.
        work: folder for objects, kept between builds; ``<project>/build`` by default.

    Raises:
        BuildError: no compiler, no Python headers, no ninja or pybind11, or the compiler's own message.
    """
    # Ninja runs in the work folder, where a relative path would mean another file.
    package = package.resolve()
    out = package if out is None else out.resolve()
    folder = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}{module}"
    work = package.parents[1] / "build" / folder if work is None else work.resolve()
    target = out / f"{module}{SUFFIX}"
    compilers = _compilers(module)
    with _lock(work):
        staged = work / target.name
        ninja_file = work / "build.ninja"
        ninja_file.write_text(_ninja_file(package / "csrc", module, staged, compilers))
        done = subprocess.run([_ninja(), "-C", str(work), "-f", ninja_file.name], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"compiling {package.name}.{module} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out, prefix=f".{module}-", delete=False) as handle:
            fresh = Path(handle.name)
        shutil.copyfile(staged, fresh)
        fresh.chmod(0o755)
        fresh.replace(target)
    return target


def load(package: Path, module: str) -> ModuleType:
    """Import the native module of a package: the installed one, else one compiled now into the user's cache.

    The cache folder is ``$FOOTFALL_CACHE`` (default ``~/.cache/footfall``), one entry for each state of the sources
    and the interpreter. Set ``FOOTFALL_JIT=0`` to forbid compiling at run time, ``FOOTFALL_CUDA=off`` to do without the
    CUDA module, present or not.

    Args:
        package: folder of the import package, the one that holds ``csrc``.
        module: ``"_cpu"`` or ``"_cuda"``.

    Raises:
        BuildError: no module is installed and none can be compiled; the message says why.
    """
    name = f"{package.name}.{module}"
    if name in sys.modules:
        return sys.modules[name]
    if module == "_cuda" and _cuda_policy() == "off":
        raise BuildError(f"{name} is switched off by FOOTFALL_CUDA=off")
    path = package / f"{module}{SUFFIX}"
    if not _made_of(path, package):
        if os.environ.get("FOOTFALL_JIT", "1") == "0":
            state = "is of other sources than these" if path.exists() else "was not built at install time"
            raise BuildError(f"{name} {state}, and FOOTFALL_JIT=0 forbids building it now")
        cache = (
            Path(os.environ.get("FOOTFALL_CACHE") or Path.home() / ".cache" / "footfall")
            / f"{package.name}-{_fingerprint(package)}"
        )
        path = cache / path.name
        if not path.exists():
            print(f"{name} is compiled once into {cache}; that takes a minute or so.", file=sys.stderr)
            begin = time.monotonic()
            build(package, module, out=cache, work=cache / f"build{module}")
            print(f"{name} is compiled, after {time.monotonic() - begin:.0f} seconds.", file=sys.stderr)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    sys.modules[name] = loaded
    if not getattr(loaded, "openmp", True):
        warnings.warn(
            f"{name} runs on one thread: it was compiled without OpenMP. {_OPENMP_HELP}", RuntimeWarning, stacklevel=2
        )
    return loaded


def install_time_modules(package: Path, policy: str) -> list[Path]:
    """Build what ``<PACKAGE>_BUILD`` asks for and return the modules' paths; called by ``hatch_build.py``.

    ``FOOTFALL_CUDA`` settles the CUDA module alone: ``auto`` as the policy, ``on`` insists on it, card or not (for an
    image that other machines run), ``off`` leaves it out.

    Args:
        package: as for :func:`load`.
        policy: ``auto`` builds ``_cpu`` and, where there are CUDA sources, nvcc and a card, ``_cuda``; what cannot be
            built is left out with a message. ``cpu`` and ``cuda`` insist and fail loudly. ``none`` builds nothing.

    Raises:
        BuildError: no such policy, or a module that was insisted on cannot be built.
    """
    if policy not in ("auto", "cpu", "cuda", "none"):
        raise BuildError(f"{package.name.upper()}_BUILD must be auto, cpu, cuda or none, got {policy!r}")
    if policy == "none":
        return []
    has_cuda, cuda = any((package / "csrc").glob("*_cuda.cu")), _cuda_policy()
    found = policy == "auto" and cuda == "auto" and _nvcc() is not None and _card()
    wanted = ["_cpu"] + ["_cuda"] * (policy == "cuda" or (has_cuda and (cuda == "on" or found)))
    built = []
    for module in wanted:
        try:
            built.append(build(package, module))
        except BuildError as error:
            if policy != "auto" or (module == "_cuda" and cuda == "on"):
                raise
            print(f"{package.name}: {module} is not built, the package will do without it.\n{error}", file=sys.stderr)
    return built


def shared_files(kernels: Path) -> list[tuple[Path, Path]]:
    """Return master and copy of every file that the packages of this folder share."""
    packages = [csrc.parent for csrc in sorted(kernels.glob("*/src/*/csrc"))]
    return [
        (kernels / name, Path(place.format(project=package.parents[1], package=package.name)))
        for package in packages
        for name, place in SHARED.items()
    ]


def _main() -> None:
    """Copy what is shared (``--sync``: nothing else), then build every kernel package beside this file in place.

    For developers, after a change of a C++ source. The CPU modules only, since nvcc takes minutes; ``FOOTFALL_BUILD``
    names another of the install-time policies.
    """
    kernels = Path(__file__).resolve().parent
    for master, copy in shared_files(kernels):
        if not copy.is_file() or copy.read_bytes() != master.read_bytes():
            copy.write_bytes(master.read_bytes())
            print(copy)
    if "--sync" not in sys.argv[1:]:
        for csrc in sorted(kernels.glob("*/src/*/csrc")):
            print(*install_time_modules(csrc.parent, os.environ.get("FOOTFALL_BUILD", "cpu")), sep="\n")


def _compilers(module: str) -> dict[str, str]:
    named = os.environ.get("CXX")
    cxx = named or next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if cxx is None or shutil.which(cxx.split()[0]) is None:
        raise BuildError(
            f"no C++ compiler found (looked for {'$CXX=' + named if named else 'c++, g++, clang++ on PATH'}). "
            "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) "
            "and install again, with pip's --no-cache-dir."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise BuildError(
            f"Python.h is missing in {sysconfig.get_path('include')}: install python3-dev (or python3-devel) first."
        )
    found = {"cxx": cxx}
    if module == "_cuda":
        nvcc = _nvcc()
        if nvcc is None:
            raise BuildError(
                "no nvcc found (looked for $CUDACXX, nvcc on PATH, $CUDA_HOME/bin and /usr/local/cuda/bin): "
                "install the CUDA toolkit to build the CUDA kernels."
            )
        found["nvcc"] = nvcc
    return found


def _cuda_policy() -> str:
    policy = os.environ.get("FOOTFALL_CUDA", "auto")
    if policy not in ("auto", "on", "off"):
        raise BuildError(f"FOOTFALL_CUDA must be auto, on or off, got {policy!r}")
    return policy


def _nvcc() -> str | None:
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = (os.environ.get("CUDA_HOME") or "/usr/local/cuda", "/usr/local/cuda")
    places = ["nvcc", *(str(Path(home, "bin", "nvcc")) for home in homes)]
    return next((found for place in places if (found := shutil.which(place))), None)


def _card() -> bool:
    # nvcc takes minutes, which nobody should spend on a machine without a card; a driver shows its cards there.
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _ninja_file(csrc: Path, module: str, target: Path, compilers: dict[str, str]) -> str:
    binder = csrc / f"bind{module}.cpp"
    if not binder.exists():
        raise BuildError(f"{binder} does not exist: this package has no {module} module")
    cxx = compilers["cxx"]
    openmp = ["-fopenmp"] if _accepts(cxx, ["-fopenmp"], _OPENMP_PROBE) else []
    if not openmp:
        print(
            f"{cxx} has no OpenMP: {csrc.parent.name}.{module} will run on one thread. {_OPENMP_HELP}", file=sys.stderr
        )
    variants = _isa_variants(cxx) if module == "_cpu" else {}
    flags = [*CXX_FLAGS, *openmp, *(f"-DFOOTFALL_HAS_{name.upper()}=1" for name in variants)]
    includes = [f"-I{_pybind11_include()}", f"-I{sysconfig.get_path('include')}", f"-I{csrc}"]
    lines = [
        "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx -shared $in -o $out $libs",
        f"cxx = {cxx}",
    ]
    # The portable objects come first: of an inline function present in several objects the linker keeps the first,
    # and that one any CPU can run.
    objects = []
    for isa, isa_flags in variants.items():
        for source in sorted(set(csrc.glob("*_cpu.cpp")) - {binder}):
            objects.append(f"{source.stem}.{isa}.o")
            source_flags = [*flags, *isa_flags, f"-DFOOTFALL_ISA={isa}", f"-I{csrc}"]
            lines.append(f"build {objects[-1]}: cxx {_escape(source)}\n  flags = {' '.join(source_flags)}")
    libraries = [*LINK_FLAGS, *openmp]
    if module == "_cuda":
        lines.append(
            "rule nvcc\n  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
        )
        lines.append(f"nvcc = {compilers['nvcc']}")
        nvcc_flags = [*NVCC_FLAGS, f"-I{_escape(csrc)}"]
        for source in sorted(csrc.glob("*_cuda.cu")):
            objects.append(f"{source.stem}.o")
            lines.append(f"build {objects[-1]}: nvcc {_escape(source)}\n  flags = {' '.join(nvcc_flags)}")
        libraries += [f"-L{_cuda_library_folder(compilers['nvcc'])}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    objects.append(f"bind{module}.o")
    stamp = f"-DFOOTFALL_SOURCES='\"{_sources(csrc.parent)}\"'"
    lines.append(f"build {objects[-1]}: cxx {_escape(binder)}\n  flags = {' '.join([*flags, *includes, stamp])}")
    lines.append(f"build {_escape(target)}: link {' '.join(objects)}\n  libs = {' '.join(libraries)}")
    return "\n".join(lines) + "\n"


def _isa_variants(cxx: str) -> dict[str, list[str]]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"portable": []}
    return {name: flags for name, flags in X86_FLAGS.items() if _accepts(cxx, flags)}


def _accepts(cxx: str, flags: list[str], source_text: str = "int main() { return 0; }\n") -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(source_text)
        command = [*cxx.split(), *flags, str(source), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def _ninja() -> str:
    with contextlib.suppress(ImportError):
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is missing: pip install ninja")
    return found


def _pybind11_include() -> str:
    with contextlib.suppress(ImportError):
        import pybind11

        return str(pybind11.get_include())
    # A machine that has torch but not pybind11 still has the headers torch ships.
    torch_spec = importlib.util.find_spec("torch")
    if torch_spec is not None and torch_spec.submodule_search_locations:
        bundled = Path(torch_spec.submodule_search_locations[0], "include")
        if (bundled / "pybind11" / "pybind11.h").exists():
            return str(bundled)
    raise BuildError("pybind11 is missing: pip install pybind11")


def _cuda_library_folder(nvcc: str) -> Path:
    # nvcc may be a wrapper script, so its own folder says nothing: it is asked for the root of its toolkit.
    dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    root = next((line.split("=", 1)[1].strip() for line in dry.splitlines() if "TOP=" in line), None)
    if root is None:
        raise BuildError(f"{nvcc} --dryrun names no toolkit root (TOP=)")
    for candidate in (Path(root, "lib64"), Path(root, "targets", "x86_64-linux", "lib"), Path(root, "lib")):
        if (candidate / "libcudart_static.a").exists():
            return candidate
    raise BuildError(f"libcudart_static.a is not under {root}")


def _made_of(path: Path, package: Path) -> bool:
    """Whether a module was compiled from these sources: an older one would misread what it is handed."""
    return path.exists() and _sources(package).encode() in path.read_bytes()


def _sources(package: Path) -> str:
    digest = hashlib.sha256()
    for source in sorted(path for path in (package / "csrc").iterdir() if path.suffix in (".cpp", ".cu", ".h")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _fingerprint(package: Path) -> str:
    digest = hashlib.sha256(f"{sysconfig.get_platform()} {SUFFIX} {os.environ.get('CXX', '')} {_nvcc()}".encode())
    digest.update(_sources(package).encode() + Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+b") as handle:
        _take_lock(handle)
        yield


def _take_lock(handle: IO[bytes]) -> None:
    """Wait for the lock of an open file, which the system gives back when the file is closed."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
        return
    import msvcrt

    # Ten tries a second apart are all that LK_LOCK makes.
    while True:
        with contextlib.suppress(OSError):
            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
            return


if __name__ == "__main__":
    _main()
