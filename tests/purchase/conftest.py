"""A small generated log, prepared and trained once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from purchase.cli import app

SMALL: dict[str, Any] = {
    "generate": {"rows": 6000, "products": 200, "days": 40, "start": "2019-11-01", "ratio": 12},
    "split": {"cutoff": "2019-12-01", "horizon_hours": 120},
    "model": {"width": 16, "max_len": 20, "layers": 1},
    "train": {"max_epochs": 2, "learning_rate": 0.005, "ema": 0.9, "negatives": 32, "warmup_steps": 5},
    "evaluate": {"factors": 8, "rounds": 5, "candidates": 20, "rankers": ["popularity", "repeat", "ials"]},
    "progress": False,
}


@pytest.fixture(scope="session")
def purchase(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """``purchase("train", run, data, "--seed", "1")`` runs one command with the small settings."""
    file = tmp_path_factory.mktemp("settings") / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))

    def call(command: str, run: Path, data: Path, *words: str) -> int:
        return app.main([command, "--config", str(file), "--run-dir", str(run), "--folder", str(data), *words])

    return call


@pytest.fixture(scope="session")
def data(purchase: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert purchase("generate", folder / "run", folder) == 0
    return folder


@pytest.fixture(scope="session")
def trained(purchase: Callable[..., int], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after prepare and train."""
    run = tmp_path_factory.mktemp("trained")
    assert purchase("prepare", run, data) == 0
    assert purchase("train", run, data) == 0
    return run


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Any]:
    """The settings of a run directory as a dataclass."""

    def read(run: Path, *words: str) -> Any:
        return app.parse("train", ["--config", str(run / "config.yaml"), *words])

    return read
