"""The import rules of the house, read from the code: which room may import what, and downwards only."""

import ast
import importlib.util
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
        {"pyarrow", "numpy", "duckdb", "yaml", "filelock"},
        {"torch", "dask", "distributed", "pandas", "polars", "matplotlib"},
    ),
    "mtl_heads": ({"torch"}, {"torchmetrics", "torchjd", "matplotlib"}),
    "ltv_stack": (
        {"lightgbm", "pyarrow", "numpy", "pandas", "sklearn", "yaml"},
        {"torch", "dask", "distributed", "xgboost", "shap", "matplotlib"},
    ),
    "stu_tokens": ({"torch", "numpy"}, {"faiss"}),
    "rankers": ({"numpy", "scipy", "implicit", "lightgbm", "threadpoolctl"}, set()),
    "runkit": (
        {"jsonargparse", "docstring_parser", "yaml", "tqdm", "numpy", "filelock"},
        {"lightning", "torch", "fastapi", "uvicorn", "matplotlib"},
    ),
    "synthlogs": ({"numpy", "pyarrow", "tqdm"}, set()),
}
# What runkit owns: an app that defines it again has run machinery of its own.
OWNED = {
    *("temporary_directory", "temporary_file", "atomic_file", "atomic_folder", "write_json", "read_json", "write_yaml"),
    *("file_hash", "files_hash", "folder_hash", "content_hash", "fingerprint", "sweep", "remove_folder"),
    *("Run", "record", "peak_memory", "peak_memory_mb", "machine", "SettingError", "App", "Command"),
    *("markdown", "markdown_table", "text_table", "verdict", "auroc", "macro_auroc", "roc_curve", "bootstrap", "minus"),
    *("progress", "show_progress", "check_same", "History"),
}
LINES_OF_A_FILE = 400


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


def backends_of(impl: Path) -> set[str]:
    """A backend is a file or, where it has several, a folder."""
    names = {path.stem for path in impl.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    return names - {"__init__"}


@pytest.mark.parametrize("room", sorted({room for room, _ in modules()} & KERNELS))
def test_backends_mirror_each_other_and_never_meet(room: str):
    package = ROOT / "kernels" / room.replace("_", "-") / "src" / room
    impl = package / "impl"
    backends = backends_of(impl)
    assert backends == {"reference", "cpu", "triton", "cuda"}
    assert (impl / "triton").is_dir()
    for path in impl.rglob("*.py"):
        own = path.relative_to(impl).parts[0].removesuffix(".py")
        for name, line in imports(path):
            met = (backends - {own}) & set(name.strip(".").split("."))
            assert not (met and top(name) in ("", room)), f"{path.relative_to(impl)}:{line} imports {name}"
    for path in sorted((package / "ops").glob("*.py")):
        for name, line in imports(path):
            assert "impl" not in name.split("."), f"{path.name}:{line} imports a backend ({name})"


def test_what_the_kernel_packages_share_is_copied_and_the_same():
    spec = importlib.util.spec_from_file_location("native", ROOT / "kernels" / "native.py")
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    shared = native.shared_files(ROOT / "kernels")
    assert {copy.relative_to(ROOT / "kernels").parts[0] for _, copy in shared} == {"hstu-kernels", "mamba-scan"}
    assert {master.name for master, _ in shared} == {path.name for path in (ROOT / "kernels").glob("[!.]*.*")}
    for master, copy in shared:
        assert not copy.is_symlink(), f"{copy.relative_to(ROOT)} is a link, which archives turn into a text"
        same = copy.read_bytes() == master.read_bytes()
        assert same, (
            f"{copy.relative_to(ROOT)} differs from {master.relative_to(ROOT)}: python kernels/native.py --sync"
        )


def depends(room: str, path: Path, known: set[str]) -> set[str]:
    """The modules of its own room that a file imports when it runs, at its top or later; not what types alone need."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in branch.body
        for node in ast.walk(statement)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = dotted(room, path).split(".")
            # A package's __init__ is itself what one dot names.
            above = package[: len(package) - node.level + (path.name == "__init__.py")] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inside = {f"{source}.{alias.name}" for alias in node.names}
            found |= inside & known or {source}
            found |= {source} if inside - known else set()
    return found & known


def dotted(room: str, path: Path) -> str:
    parts = path.with_suffix("").parts
    start = len(parts) - 1 - parts[::-1].index(room)
    return ".".join(part for part in parts[start:] if part != "__init__")


@pytest.mark.parametrize("room", sorted({room for room, _ in modules()}))
def test_no_module_reaches_itself(room: str):
    files = {dotted(room, path): path for name, path in modules() if name == room}
    left = {name: depends(room, path, set(files)) - {name} for name, path in files.items()}
    while free := [name for name, needed in left.items() if not needed & set(left)]:
        left = {name: needed for name, needed in left.items() if name not in free}
    circle = {name: sorted(needed & set(left)) for name, needed in left.items()}
    assert not circle, f"these import each other: {circle}"


def apps() -> list[tuple[str, Path]]:
    return [(room.name, room / "src" / room.name) for room in rooms() if room.parent.name == "apps"]


every_app = pytest.mark.parametrize("name", [name for name, _ in apps()])


@every_app
def test_apps_have_one_skeleton(name: str):
    files = {path.name for path in dict(apps())[name].iterdir()}
    assert {"cli.py", "config.py", "__main__.py"} <= files, "an app has cli.py, config.py and __main__.py"
    names = {imported for imported, _ in imports(dict(apps())[name] / "cli.py")}
    assert {"runkit.cli.App", "runkit.cli.Command"} <= names, "the commands of an app are runkit's"


@every_app
def test_no_app_defines_what_runkit_owns(name: str):
    for path in dict(apps())[name].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in OWNED:
                raise AssertionError(f"{path.relative_to(ROOT)}:{node.lineno} defines {node.name}, which runkit has")


@every_app
def test_no_file_of_an_app_is_too_long_to_read(name: str):
    for path in dict(apps())[name].rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= LINES_OF_A_FILE, f"{path.relative_to(ROOT)}: {lines} lines, needs at most {LINES_OF_A_FILE}"


def test_circles_are_seen_whatever_the_form_of_the_import(tmp_path: Path):
    room = tmp_path / "room"
    (room / "deep").mkdir(parents=True)
    sources = {
        "__init__.py": "from room.a import x",
        "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from room.b import y\nfrom .deep import c",
        "b.py": "def f():\n    from room import a",
        "deep/__init__.py": "",
        "deep/c.py": "from ..b import y\nimport json",
    }
    found = {}
    for name, source in sources.items():
        (room / name).write_text(source)
    known = {dotted("room", path) for path in room.rglob("*.py")}
    for path in room.rglob("*.py"):
        found[dotted("room", path)] = depends("room", path, known)
    assert found == {
        "room": {"room.a"},
        "room.a": {"room.deep.c"},
        "room.b": {"room.a"},
        "room.deep": set(),
        "room.deep.c": {"room.b"},
    }
