"""The modules of the package import one another downwards only."""

from __future__ import annotations

import ast
from pathlib import Path

import seqdata

FOLDER = Path(seqdata.__file__).parent


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it: within functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "seqdata":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("seqdata."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("seqdata.")}
    return found


def test_no_module_reaches_itself():
    left = {path.stem: imported(path) for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    assert "engines" in left["build"]
    while left:
        free = [name for name, needs in left.items() if not needs & set(left)]
        assert free, f"a circle among {left}"
        for name in free:
            del left[name]
