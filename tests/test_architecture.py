"""The import rules of the house, read from the code: which room may import what, and downwards only."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = {"hstu_kernels", "mamba_scan"}
PACKAGES = {"seqdata", "mtl_heads", "ltv_stack", "stu_tokens"}
APPS = {"ubt", "purchase", "ltv", "retailsim", "stu"}
HOUSE = KERNELS | PACKAGES | APPS
# What a room may import besides the standard library and itself; extras included.
ALLOWED = {
    "hstu_kernels": {"torch", "triton"},
    "mamba_scan": {"torch", "triton"},
    "seqdata": {
        "pyarrow",
        "numpy",
        "duckdb",
        "torch",
        "dask",
        "distributed",
        "pandas",
        "polars",
        "yaml",
        "tqdm",
        "matplotlib",
    },
    "mtl_heads": {"torch", "torchmetrics", "torchjd", "matplotlib"},
    "ltv_stack": {
        "lightgbm",
        "pyarrow",
        "numpy",
        "pandas",
        "sklearn",
        "xgboost",
        "shap",
        "matplotlib",
        "torch",
        "dask",
        "distributed",
    },
    "stu_tokens": {"torch", "numpy", "faiss"},
}
# Imported for these rooms inside functions only: an extra, or a backend that may be absent.
LAZY = {
    "hstu_kernels": {"triton"},
    "mamba_scan": {"triton"},
    "seqdata": {"torch", "dask", "distributed", "pandas", "polars", "matplotlib"},
    "mtl_heads": {"torchjd", "matplotlib"},
    "ltv_stack": {"torch", "dask", "distributed", "xgboost", "shap", "matplotlib"},
    "stu_tokens": {"faiss"},
}
# Modules that exist only for an extra and are themselves imported lazily.
EXTRA_MODULES = {
    "hstu_kernels": {"impl/triton.py"},
    "mamba_scan": {"impl/triton.py"},
    "seqdata": {"loader.py", "dask_engine.py"},
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


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """The dotted names a file imports, their lines, and whether the import runs when the module is imported."""
    tree = ast.parse(path.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def at_import_time(node: ast.AST) -> bool:
        while node in parents:
            node = parents[node]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                return False
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                return False
        return True

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, at_import_time(node)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            for alias in node.names:
                yield (
                    f"{dots}{node.module or ''}.{alias.name}" if node.module else f"{dots}{alias.name}",
                    node.lineno,
                    at_import_time(node),
                )


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
    for name, line, at_import_time in imports(path):
        if name.startswith("."):
            continue
        package = top(name)
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if package in HOUSE and package != room:
            assert room in APPS and package not in APPS, f"{where}: rooms import downwards only"
        elif room in ALLOWED and package != room and package not in sys.stdlib_module_names:
            assert package in ALLOWED[room], f"{where}: not in the room's row"
            lazy = package in LAZY[room] and str(path).split(f"src/{room}/")[1] not in EXTRA_MODULES.get(room, set())
            assert not (lazy and at_import_time), (
                f"{where}: an extra must be imported inside the function that needs it"
            )


@pytest.mark.parametrize("room", sorted(KERNELS))
def test_backends_mirror_each_other_and_never_meet(room: str):
    impl = ROOT / "kernels" / room.replace("_", "-") / "src" / room / "impl"
    if not impl.exists():
        pytest.skip(f"{room} is not built yet")
    backends = {path.stem for path in impl.glob("*.py")} - {"__init__"}
    assert "reference" in backends
    for path in impl.glob("*.py"):
        for name, line, _ in imports(path):
            others = backends - {path.stem}
            met = others & set(name.strip(".").split("."))
            assert not (met and (name.startswith(".") or top(name) == room)), f"{path.name}:{line} imports {name}"
    for name, line, at_import_time in imports(impl.parent / "ops.py"):
        assert not (at_import_time and "impl" in name), f"ops.py:{line} imports a backend ({name}) when it is imported"


def test_the_recipe_is_one_file():
    for link in ROOT.glob("kernels/*/src/*/native.py"):
        assert link.is_symlink() and link.resolve() == ROOT / "kernels" / "native.py"
