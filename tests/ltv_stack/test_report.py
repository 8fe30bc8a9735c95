"""Evaluation, comparison and the report that is written from them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ltv_stack import (
    LTVConfig,
    LTVPipeline,
    Schema,
    evaluate,
    from_table,
    model_card,
    open_partitions,
    write_report,
)
from ltv_stack.evaluation import compare


@pytest.fixture(scope="module")
def fitted(world: Path, schema: Schema, config: Callable[..., LTVConfig]) -> LTVPipeline:
    return LTVPipeline(schema, config()).fit(open_partitions(world, end="2025-10-01-08-00"))


def test_the_report_is_written_whole_from_real_numbers(fitted: LTVPipeline, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    later = open_partitions(world, start="2025-10-01-09-00")
    found = evaluate(fitted, later)
    page = write_report(
        found,
        fitted,
        tmp_path,
        title="A <report>",
        drift=fitted.drift(later),
        importance=fitted.importance(later, rows=200),
    )
    text = page.read_text()
    assert "A &lt;report&gt;" in text and "<script" not in text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    for horizon in fitted.horizons:
        kinds = ("deciles", "lift", "lorenz", "calibration", "distribution")
        assert {f"{kind}_{horizon}.png" for kind in kinds} <= pictures
    assert {"buyers.png", "drift.png", "importance_buyer_gain.png", "segment_d7_country.png"} <= pictures
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert text.count("data:image/png;base64,") == len(pictures)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["metrics"]["d7"]["msle"] == found.metrics["d7"]["msle"]
    assert written["ms_per_row"] > 0
    assert not list(tmp_path.glob(".*"))


def test_the_model_card_states_the_estimand_and_what_was_left_out(fitted: LTVPipeline) -> None:
    card = model_card(fitted)
    assert "exp(E[log(1 + revenue)]) - 1" in card and "7000 rows" in card
    assert "d1, d7, d14" in card


def test_segments_and_comparison(fitted: LTVPipeline, world: Path) -> None:
    found = evaluate(fitted, open_partitions(world, start="2025-10-01-11-00"), segments=["bundle"])
    table = found.tables["calibration:d7:bundle"]
    assert set(table["segment"]) == {"game", "shop", "chat"} and table["rows"].sum() == 1000
    frame = compare({"one": found, "two": found})
    assert frame["model"].tolist() == ["one"] * 3 + ["two"] * 3
    assert frame["horizon"].tolist() == ["d1", "d7", "d14"] * 2


def test_data_without_labels_or_without_revenue(fitted: LTVPipeline, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table = open_partitions(world, max_partitions=1).read()
    bare = table.drop_columns(["revenue_d1", "revenue_d7", "revenue_d14", "buyer_d7"])
    with pytest.raises(ValueError, match="no labels of the horizons"):
        evaluate(fitted, from_table(bare))
    with pytest.raises(ValueError, match="got no rows"):
        evaluate(fitted, from_table(table.slice(0, 0)))
    for name in ("revenue_d7", "buyer_d7"):
        bare = bare.append_column(name, pa.array(np.zeros(bare.num_rows)))
    found = evaluate(fitted, from_table(bare))
    assert found.horizons == ["d7"]
    assert write_report(found, fitted, tmp_path).is_file()
