"""The app of CONTRIBUTING.md, "Write a new app in an hour", taken from the page as it stands there."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def write_app(folder: Path) -> Path:
    """Write the page's files below `folder` and return the one that goes on the path."""
    found = re.findall(r"^```python\n# apps/churn/src/(\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert {name for name, _ in found} == {f"churn/{name}.py" for name in ("config", "model", "cli", "__main__")}
    for name, source in found:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    (folder / "churn" / "__init__.py").write_text("")
    return folder
