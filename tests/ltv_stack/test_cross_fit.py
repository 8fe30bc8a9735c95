"""Cross-fitting: every row calibrates on models that never saw its stretch of time, and trains those put out."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from ltv_stack import LTVConfig, LTVPipeline, Schema, evaluate, open_partitions, predict_table
from ltv_stack.cache import FeatureCache
from ltv_stack.models import Models
from ltv_stack.training import Trainer

Config = Callable[..., LTVConfig]


class Watched(Trainer):
    """Keeps which rows were fitted and which were scored, in order."""

    seen: ClassVar[list[tuple[np.ndarray, np.ndarray, dict[str, int]]]] = []
    scored: ClassVar[list[tuple[np.ndarray, np.ndarray]]] = []

    def fit(self, rows: np.ndarray, stopping_rows: np.ndarray, trees: Mapping[str, int] | None = None) -> Models:
        self.seen.append((self.cache.time[rows], rows, dict(trees or {})))
        models = super().fit(rows, stopping_rows, trees)
        scores_of = models.scores_of

        def watched(cache: FeatureCache, own: np.ndarray) -> dict[str, np.ndarray]:
            self.scored.append((cache.time[own], own))
            return scores_of(cache, own)

        models.scores_of = watched
        return models


def test_no_row_is_scored_by_a_model_of_its_fold_or_of_the_embargo_around_it(
    world: Path, schema: Schema, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_partitions(world, max_partitions=6)
    monkeypatch.setattr("ltv_stack.pipeline.Trainer", Watched)
    seen, scored = Watched.seen, Watched.scored
    pipe = LTVPipeline(schema, config(split="cross_fit", folds=3, embargo="1h")).fit(data)
    assert pipe.report_["training_rows"] == pipe.report_["held_out_rows"] == 6000
    assert len(seen) == 4 and len(scored) == 3
    for (fitted, rows, trees), (left_out, own) in zip(seen, scored, strict=False):
        assert not set(rows) & set(own) and not trees
        assert np.abs(fitted[:, None] - np.unique(left_out)).min() >= 3600
    assert sorted(np.concatenate([own for _, own in scored])) == list(range(6000))
    # The models put out are those of all rows, as large as the folds' were on average.
    _, rows, trees = seen[3]
    assert len(rows) == 6000
    assert pipe.models.points.boosters["d7"].num_trees() == trees["point:d7"] <= 30


def test_few_rows_are_predicted_better_and_intervals_hold(world: Path, schema: Schema, config: Config) -> None:
    few, later = open_partitions(world, max_partitions=4), open_partitions(world, start="2025-10-01-04-00")
    found = {
        split: evaluate(LTVPipeline(schema, config(split=split, folds=5)).fit(few), later)
        for split in ("temporal", "cross_fit")
    }
    errors = {split: sum(one.metrics[h]["msle"] for h in one.horizons) for split, one in found.items()}
    assert errors["cross_fit"] < errors["temporal"]
    for h in ("d7", "d14"):
        assert 0.87 <= found["cross_fit"].coverage[h]["overall"] <= 0.94
        assert 0.86 <= found["cross_fit"].coverage[f"{h}:buyer"]["overall"] <= 0.94


@pytest.mark.parametrize("model", ["two_stage", "stack"])
def test_it_works_for_models_of_several_stages_and_after_a_round_trip(
    model: str, world: Path, schema: Schema, config: Config, tmp_path: Path
) -> None:
    data = open_partitions(world, max_partitions=3)
    settings = config(model=model, split="cross_fit", folds=2, stacking_bases=["elastic_net"], max_rows=2500)
    pipe = LTVPipeline(schema, settings).fit(data)
    assert pipe.report_["held_out_rows"] == 2500
    later = open_partitions(world, start="2025-10-01-10-00")
    assert predict_table(LTVPipeline.load(pipe.save(tmp_path / "model")), later).equals(predict_table(pipe, later))


def test_an_embargo_that_leaves_nothing_is_an_error(world: Path, schema: Schema, config: Config) -> None:
    with pytest.raises(ValueError, match="embargo: 9d leaves no rows beside a fold of"):
        LTVPipeline(schema, config(split="cross_fit", embargo="9d")).fit(open_partitions(world, max_partitions=3))
