"""The feature cache streams into LightGBM shard by shard, and what comes out is what went in."""

from collections.abc import Callable
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pytest

from ltv_stack import FeatureBuilder, LTVConfig, Schema, open_partitions
from ltv_stack import cache as module
from ltv_stack.cache import FeatureCache, build_cache, lightgbm_names

LABELS = ["revenue_d7"]


@pytest.fixture(scope="module")
def cache(
    world: Path, schema: Schema, config: Callable[..., LTVConfig], tmp_path_factory: pytest.TempPathFactory
) -> FeatureCache:
    data = open_partitions(world, max_partitions=4, chunk_size=300)
    builder = FeatureBuilder(schema, config().features).fit(data)
    folder = tmp_path_factory.mktemp("cache")
    return build_cache(builder, data, folder, label_columns=LABELS, segment="country", sample_rows=1500)


def test_shards_hold_the_features_in_order(
    cache: FeatureCache, world: Path, schema: Schema, config: Callable[..., LTVConfig]
) -> None:
    data = open_partitions(world, max_partitions=4, chunk_size=None)
    builder = FeatureBuilder(schema, config().features).fit(data)
    expected = np.concatenate([builder.transform(batch) for batch in data])
    found = np.concatenate([matrix for _, matrix in cache.matrices()])
    assert found.tobytes() == expected.tobytes()
    rows = np.array([0, 999, 1000, 2503, 3999])
    assert cache.take(rows).tobytes() == expected[rows].tobytes()
    assert cache.sample_matrix.tobytes() == expected[cache.sample].tobytes()
    assert len(cache.sample) == 1500 and (np.diff(cache.sample) > 0).all()
    np.testing.assert_array_equal(cache.labels["revenue_d7"], data.read(LABELS)["revenue_d7"].to_numpy())
    assert cache.segment is not None and cache.segment.tolist() == data.read(["country"])["country"].to_pylist()


def test_lightgbm_reads_whole_shards_once_and_never_single_rows(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    read = module._ShardRows.__getitem__

    def spy(self: object, index: object) -> object:
        asked.append(index)
        return read(self, index)

    monkeypatch.setattr(module._ShardRows, "__getitem__", spy)
    rows = np.arange(0, cache.rows, 2)
    data = cache.dataset(rows, {"num_threads": 1})
    assert data.num_data() == len(rows)
    assert all(isinstance(index, slice) for index in asked) and len(asked) == len(cache.shards)


def test_the_streamed_data_set_trains_the_model_of_the_data_set_in_memory(cache: FeatureCache) -> None:
    rows = np.arange(cache.rows)
    y = np.log1p(cache.labels["revenue_d7"])
    settings = {"objective": "regression", "num_threads": 1, "verbosity": -1, "deterministic": True, "seed": 0}
    settings |= {"force_col_wise": True, "feature_pre_filter": False}
    streamed = cache.dataset(rows, settings)
    streamed.set_label(y)
    reference = lgb.Dataset(
        cache.sample_matrix,
        np.zeros(len(cache.sample)),
        feature_name=lightgbm_names(cache.names),
        categorical_feature=[cache.names.index(name) for name in cache.categorical],
        params=settings,
    )
    held = lgb.Dataset(cache.take(rows), y, reference=reference, params=settings)
    one, two = (lgb.train(settings, data, 15) for data in (streamed, held))
    np.testing.assert_array_equal(one.predict(cache.take(rows)), two.predict(cache.take(rows)))


def test_names_lightgbm_can_hold_stay_distinct() -> None:
    assert lightgbm_names(["a b", "a_b", "ä:[1]"]) == ["a_b", "a_b_2", "ä__1_"]
