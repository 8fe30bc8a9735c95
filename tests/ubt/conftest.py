"""A tiny generated log, prepared once; tests that change it work on copies."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from synthlogs.shop import generate
from ubt.config import (
    Config,
    FeaturesConfig,
    GenerateConfig,
    LogConfig,
    ModelConfig,
    PrepareConfig,
    ScoreConfig,
    TrainConfig,
)
from ubt.prepare import Prepared, open_prepared, prepare

TINY = GenerateConfig(clients=6000, relevant_share=0.1, target_categories=8, target_skus=5, target_new_skus=3)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose by a second thread, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def raw_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log") / "data"
    generate(folder, TINY)
    return folder


@pytest.fixture
def raw_copy(raw_log: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(raw_log, tmp_path / "data"))


@pytest.fixture(scope="session")
def prepared_dir(raw_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "prepared"
    prepare(raw_log, folder, LogConfig(), PrepareConfig())
    return folder


@pytest.fixture
def prepared(prepared_dir: Path) -> Prepared:
    return open_prepared(prepared_dir)


@pytest.fixture
def tiny(raw_log: Path, tmp_path: Path) -> Config:
    """Settings of a run of seconds on the tiny log."""
    return Config(
        data_dir=str(raw_log),
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(
            hidden_size=16, num_layers=1, num_heads=2, max_seq_length=20, id_size=4, max_ids=500, embedding_size=12
        ),
        train=TrainConfig(num_epochs=2, batch_size=64, learning_rate=1e-3, cutoffs=3, span=2, threads=1),
        features=FeaturesConfig(cf_size=6, cf_values=500),
        score=ScoreConfig(sample=0, width=16, trees=3),
        progress=False,
    )


@pytest.fixture
def prepare_for(tmp_path: Path) -> Callable[..., Prepared]:
    """prepare_for(data_dir, **log settings) prepares a log in a new folder."""

    def build(data_dir: Path, **log: object) -> Prepared:
        folder = tmp_path / f"prepared{len(list(tmp_path.glob('prepared*')))}"
        prepare(data_dir, folder, replace(LogConfig(), **log), PrepareConfig())
        return open_prepared(folder)

    return build
