"""The import rules of the house, read from the code: which room may import what, and downwards only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = {"hstu_kernels", "mamba_scan"}
PACKAGES = {"seqdata", "mtl_heads", "ltv_stack", "stu_tokens", "rankers", "runkit", "synthlogs"}
APPS = {"ubt", "purchase", "ltv", "retailsim", "stu"}
HOUSE = KERNELS | PACKAGES | APPS
# What a room may import besides the standard library and itself. Extras and backends that may be absent come second:
# the room must import without them.
ALLOWED = {
    "hstu_kernels": ({"torch"}, {"triton", "ninja", "pybind11"}),
    "mamba_scan": ({"torch"}, {"triton", "ninja", "pybind11"}),
    "seqdata": (
        {"pyarrow", "numpy", "duckdb", "yaml", "tqdm"},
        {"torch", "dask", "distributed", "pandas", "polars", "matplotlib"},
    ),
    "mtl_heads": ({"torch"}, {"torchmetrics", "torchjd", "matplotlib"}),
    "ltv_stack": (
        {"lightgbm", "pyarrow", "numpy", "pandas", "sklearn", "yaml"},
        {"torch", "dask", "distributed", "xgboost", "shap", "matplotlib"},
    ),
    "stu_tokens": ({"torch", "numpy"}, {"faiss"}),
    "runkit": (
        {"jsonargparse", "docstring_parser", "yaml", "tqdm", "numpy", "filelock"},
        {"lightning", "torch", "fastapi", "uvicorn", "matplotlib"},
    ),
    "synthlogs": ({"numpy", "pyarrow", "tqdm"}, set()),
}


def rooms() -> list[Path]:
    return sorted(p.parent for group in ("kernels", "packages", "apps") for p in ROOT.glob(f"{group}/*/pyproject.toml"))


def modules() -> list[tuple[str, Path]]:
    return [
        (package.name, path)
        for room in rooms()
        for package in (room / "src").iterdir()
        for path in sorted(package.rglob("*.py"))
    ]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """The dotted names a file imports, and their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (f"{node.module}." if node.module else "")
            yield from ((source + alias.name, node.lineno) for alias in node.names)


def top(name: str) -> str:
    return name.split(".")[0]


def test_every_room_is_its_own_project_with_something_in_it():
    assert rooms()
    for room in rooms():
        packages = [p for p in (room / "src").iterdir() if p.is_dir() and not p.name.endswith(".egg-info")]
        assert [p.name for p in packages] == [room.name.replace("-", "_")]
        assert (room / "README.md").exists()
        assert (packages[0] / "__init__.py").exists()


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: value if isinstance(value, str) else value.stem)
def test_a_room_imports_only_what_its_row_allows(room: str, path: Path):
    for name, line in imports(path):
        package = top(name)
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if name.startswith(".") or package == room or package in sys.stdlib_module_names:
            continue
        if package in HOUSE:
            assert room in APPS and package not in APPS, f"{where}: rooms import downwards only"
        elif room in ALLOWED:
            assert package in set.union(*ALLOWED[room]), f"{where}: not in the room's row"


@pytest.mark.parametrize("room", sorted({room for room, _ in modules()} & set(ALLOWED)))
def test_a_room_imports_without_its_extras(room: str):
    # A finder that refuses them, and not None in sys.modules: others look torch up there and expect a module.
    source = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {sorted(ALLOWED[room][1])}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocked())
import {room}
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", sorted({room for room, _ in modules()} & KERNELS))
def test_backends_mirror_each_other_and_never_meet(room: str):
    impl = ROOT / "kernels" / room.replace("_", "-") / "src" / room / "impl"
    backends = {path.stem for path in impl.glob("*.py")} - {"__init__"}
    assert "reference" in backends
    for path in impl.glob("*.py"):
        for name, line in imports(path):
            met = (backends - {path.stem}) & set(name.strip(".").split("."))
            assert not (met and top(name) in ("", room)), f"{path.name}:{line} imports {name}"
    for name, line in imports(impl.parent / "ops.py"):
        assert "impl" not in name.split("."), f"ops.py:{line} imports a backend ({name})"


def test_the_recipe_is_one_file():
    for link in ROOT.glob("kernels/*/src/*/native.py"):
        assert link.is_symlink() and link.resolve() == ROOT / "kernels" / "native.py"
