"""The README's app works as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "packages" / "runkit" / "README.md"


def test_the_app_of_the_readme(tmp_path: Path) -> None:
    source = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "hello.py").write_text(source[0])

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "hello.py", *words], cwd=tmp_path, capture_output=True, text=True)

    assert run("train", "--seed", "3").stdout == "done\n"
    metadata = json.loads((tmp_path / "runs" / "hello" / "metadata.json").read_text())
    assert metadata["seed"] == 3 and metadata["commands"]["train"]["answer"] == 42
    wrong = run("train", "--seed", "soon")
    assert wrong.returncode == 2 and wrong.stderr == "hello train: error: seed: got 'soon', needs a whole number\n"


def test_importing_runkit_loads_nothing_heavy() -> None:
    source = "import sys, runkit; print(*[name for name in sys.modules if name.split('.')[0] in sys.argv[1:]])"
    heavy = ["torch", "lightning", "numpy", "jsonargparse", "yaml", "tqdm", "matplotlib", "fcntl", "resource"]
    done = subprocess.run([sys.executable, "-c", source, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
    source = source.replace("runkit;", "runkit.run, runkit.cli, runkit.compare, runkit.progress;")
    heavy = ["torch", "lightning", "matplotlib", "resource", "pandas", "scipy"]
    done = subprocess.run([sys.executable, "-c", source, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
