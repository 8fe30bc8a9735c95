"""Two Dask worker processes give what the local engine gives, bit by bit."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ltv_stack import (
    DaskEngine,
    FeatureBuilder,
    LocalEngine,
    LTVConfig,
    LTVPipeline,
    Schema,
    make_engine,
    open_partitions,
    predict_table,
)

pytest.importorskip("distributed")
# Dask's own background threads may close late; nothing of that is this package's.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def dask() -> Iterator[DaskEngine]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with DaskEngine(workers=2) as engine:
            yield engine


def test_features_fit_and_predictions_are_those_of_one_process(
    dask: DaskEngine, world: Path, schema: Schema, config: Callable[..., LTVConfig], tmp_path: Path
) -> None:
    data = open_partitions(world, end="2025-10-01-08-00", sample_frac=0.7, limit_rows=5000, chunk_size=400)
    local = FeatureBuilder(schema, config().features).fit(data)
    assert FeatureBuilder(schema, config().features).fit(data, engine=dask).to_json() == local.to_json()
    here = LTVPipeline(schema, config()).fit(data)
    there = LTVPipeline(schema, config(cache_dir=str(tmp_path))).fit(data, engine=dask)
    later = open_partitions(world, start="2025-10-01-09-00")
    expected = predict_table(here, later)
    assert predict_table(there, later).equals(expected)
    assert predict_table(there, later, engine=dask).equals(expected)


def test_results_come_in_order_and_errors_come_through(dask: DaskEngine) -> None:
    assert list(dask.map(_square, list(range(20)))) == list(LocalEngine().map(_square, list(range(20))))
    with pytest.raises(ZeroDivisionError):
        list(dask.map(_divide, [1, 0]))


def test_engines_by_name() -> None:
    assert isinstance(make_engine("local"), LocalEngine)
    with pytest.raises(ValueError, match="engine: got 'spark'"):
        make_engine("spark")


def _square(x: int) -> int:
    return x * x


def _divide(x: int) -> float:
    return 1 / x
