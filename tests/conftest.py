"""Fixtures every package's tests share."""

import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

DATA = Path(os.environ.get("FOOTFALL_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data").resolve()
HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name)


@pytest.fixture
def footfall_data() -> Callable[[str], Path]:
    """``footfall_data("rees46")`` is that data set's folder; where it is missing the test is skipped, naming it."""

    def folder(name: str) -> Path:
        path = DATA / name
        if not path.is_dir():
            pytest.skip(f"real data not here: {path} (set FOOTFALL_DATA to the folder that holds {name}/)")
        return path

    return folder


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Without a C++ compiler, a test that asks for the native kernel is skipped with the kernel's own reason."""
    try:
        return (yield)
    except Exception as error:
        chain = (str(one) for one in (error, error.__cause__, error.__context__))
        reason = next((text for text in chain if 'backend="cpu" cannot run here' in text), None)
        if HAS_COMPILER or reason is None:
            raise
        pytest.skip(reason)
