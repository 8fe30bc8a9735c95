"""A process killed at any moment of replacing a folder or a file loses neither the old nor the new one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLING = Path(__file__).with_name("killing.py")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes: needs a system that forks")


def ends(folder: Path, what: str, tries: int, way: str) -> list[str]:
    """What each killed process left: o for the old content, n for the new one, whole in every file."""
    words = [sys.executable, str(KILLING), str(folder), what, str(tries), way]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("what", "way"), [("steps", "exchange"), ("steps", "renames"), ("file", "exchange")])
def test_killed_at_every_step(tmp_path: Path, what: str, way: str) -> None:
    found = ends(tmp_path, what, 0, way)
    # Old until one step, new from it on; the last process came to its end.
    assert found == sorted(found, reverse=True) and set(found) == {"o", "n"} and found[-1] == "n"


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_killed_at_two_hundred_random_moments(tmp_path: Path, way: str) -> None:
    found = ends(tmp_path, "moments", 100, way)
    assert len(found) == 100 and set(found) == {"o", "n"}
