"""Fixtures every package's tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

DATA = Path(os.environ.get("FOOTFALL_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data").resolve()


@pytest.fixture
def footfall_data() -> Callable[[str], Path]:
    """``footfall_data("rees46")`` is that data set's folder; where it is missing the test is skipped, naming it."""

    def folder(name: str) -> Path:
        path = DATA / name
        if not path.is_dir():
            pytest.skip(f"real data not here: {path} (set FOOTFALL_DATA to the folder that holds {name}/)")
        return path

    return folder
