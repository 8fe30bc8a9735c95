"""Datasets: windows, limits, samples and chunks of hourly partitions; unreadable files."""

import logging
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltv_stack import PartitionError, from_table, open_partitions
from ltv_stack.data import drawn, parse_time, row_hashes


def ids(data: object) -> list[str]:
    return data.read(["row_id"])["row_id"].to_pylist()


def test_windows_are_inclusive_and_add_the_partition_s_hour(world: Path) -> None:
    data = open_partitions(world, start="2025-10-01-03-00", end=datetime(2025, 10, 1, 5))
    assert [p.name for p in data.partitions] == [f"datetime=2025-10-01-0{h}-00" for h in (3, 4, 5)]
    assert data.num_rows == 3000
    times = data.read(["datetime"])["datetime"]
    assert times.type == pa.timestamp("us")
    assert times.to_pylist()[0] == datetime(2025, 10, 1, 3) and times.to_pylist()[-1] == datetime(2025, 10, 1, 5)
    assert open_partitions(world).window("2025-10-01T11:00:00").num_rows == 1000


@pytest.mark.parametrize("chunk", [1, 7, 999, 1000, 1001, None])
def test_the_rows_do_not_depend_on_the_chunk_size(world: Path, chunk: int | None) -> None:
    whole = open_partitions(world, end="2025-10-01-01-00", sample_frac=0.3)
    data = open_partitions(world, end="2025-10-01-01-00", sample_frac=0.3, chunk_size=chunk)
    assert ids(data) == ids(whole)
    assert data.num_rows == len(ids(data)) == sum(p.rows for p in data.partitions)
    assert all(b.num_rows <= (chunk or 10**9) for b in data)


def test_the_sample_is_the_same_in_another_window_and_follows_its_seed(world: Path) -> None:
    wide = ids(open_partitions(world, sample_frac=0.1))
    narrow = ids(open_partitions(world, start="2025-10-01-05-00", end="2025-10-01-05-00", sample_frac=0.1))
    assert set(narrow) == {i for i in wide if i.startswith("5-")}
    assert 900 < len(wide) < 1500
    assert set(wide) != set(ids(open_partitions(world, sample_frac=0.1, seed=1)))


def test_limits_count_rows_after_sampling_and_stop_early(world: Path) -> None:
    data = open_partitions(world, sample_frac=0.5, limit_rows=777, chunk_size=100)
    assert data.num_rows == len(ids(data)) == 777
    assert len(data.partitions) == 2
    assert ids(data) == ids(open_partitions(world, sample_frac=0.5))[:777]
    assert len(open_partitions(world, max_partitions=3).partitions) == 3


def test_a_truncated_file_is_named_or_skipped_and_listed(world: Path, tmp_path: Path, caplog: object) -> None:
    folder = tmp_path / "datetime=2025-10-01-00-00"
    folder.mkdir()
    good = (world / "datetime=2025-10-01-00-00" / "part-0.parquet").read_bytes()
    (folder / "part-0.parquet").write_bytes(good)
    (folder / "part-1.parquet").write_bytes(good[: len(good) // 2])
    with pytest.raises(PartitionError, match=r"part-1\.parquet cannot be read as Parquet"):
        open_partitions(tmp_path)
    with caplog.at_level(logging.WARNING):
        data = open_partitions(tmp_path, on_error="skip")
    assert "part-1.parquet" in caplog.text and len(data.skipped) == 1
    assert data.num_rows == 617


def test_a_file_broken_behind_its_footer_is_named_when_read(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "datetime=2025-10-01-00-00"
    folder.mkdir()
    content = bytearray((world / "datetime=2025-10-01-00-00" / "part-0.parquet").read_bytes())
    content[4:3000] = b"\xff" * 2996
    (folder / "part-0.parquet").write_bytes(content)
    with pytest.raises(PartitionError, match=r"part-0\.parquet"):
        open_partitions(tmp_path).read()


def test_of_a_file_broken_behind_its_footer_no_row_is_counted_when_skipping(world: Path, tmp_path: Path) -> None:
    """The damage lies in the second half: what is read before it must not count either."""
    folder = tmp_path / "datetime=2025-10-01-00-00"
    shutil.copytree(world / folder.name, folder)
    table = pq.ParquetFile(folder / "part-1.parquet").read()
    pq.write_table(table, folder / "part-1.parquet", row_group_size=100, compression="none", write_page_checksum=True)
    whole = pq.ParquetFile(folder / "part-1.parquet")
    at = whole.metadata.row_group(3).column(table.column_names.index("noise")).data_page_offset
    content = bytearray((folder / "part-1.parquet").read_bytes())
    # One flipped bit of a number: only the page's checksum tells.
    content[at + 200] ^= 1
    (folder / "part-1.parquet").write_bytes(content)
    with pytest.raises(PartitionError, match=r"part-1\.parquet"):
        open_partitions(tmp_path).read()
    data = open_partitions(tmp_path, on_error="skip")
    assert data.num_rows == data.read().num_rows == 617
    assert len(data.skipped) == 1 and "part-1.parquet" in data.skipped[0]


def test_a_partition_without_files_is_passed_over_aloud(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "datetime=2025-10-01-01-00").mkdir()
    shutil.copytree(world / "datetime=2025-10-01-00-00", tmp_path / "datetime=2025-10-01-00-00")
    assert open_partitions(tmp_path).num_rows == 1000
    assert "partition datetime=2025-10-01-01-00 holds no rows" in caplog.text


def test_partitions_may_lack_columns_or_hold_them_as_null(tmp_path: Path) -> None:
    for hour, table in enumerate(
        [
            pa.table({"a": pa.array([1, 2]), "b": pa.nulls(2)}),
            pa.table({"a": pa.array([3.5])}),
            pa.table({"a": pa.array([4], pa.int8()), "b": ["x"]}),
        ]
    ):
        folder = tmp_path / f"datetime=2025-10-01-0{hour}-00"
        folder.mkdir()
        pq.write_table(table, folder / "part-0.parquet")
    data = open_partitions(tmp_path)
    assert data.schema.field("b").type == pa.string()
    table = data.read()
    assert table["a"].to_pylist() == [1, 2, 3.5, 4]
    assert table["b"].to_pylist() == [None, None, None, "x"]


def test_tables_frames_and_batches_are_datasets() -> None:
    table = pa.table({"x": list(range(10))})
    for source in (table, table.to_batches()[0], table.to_batches(max_chunksize=3), pd.DataFrame({"x": range(10)})):
        data = from_table(source, chunk_size=4, partition_rows=5)
        assert [b.num_rows for b in data] == [4, 1, 4, 1]
        assert data.read()["x"].to_pylist() == list(range(10))
    assert from_table(table, limit_rows=3).read().num_rows == 3
    assert from_table(table.slice(0, 0)).read().num_rows == 0


def test_hashes_are_uniform_and_do_not_depend_on_where_they_start() -> None:
    whole = row_hashes(0, "p", 0, 100_000)
    np.testing.assert_array_equal(whole[777:], row_hashes(0, "p", 777, 100_000 - 777))
    assert drawn(whole, 0.25).mean() == pytest.approx(0.25, abs=0.01)
    assert drawn(whole, 1.0).all()


def test_times_and_errors(world: Path, tmp_path: Path) -> None:
    assert (
        parse_time("2025-10-06-23-00", "end") == parse_time("2025-10-06T23:00:00", "end") == datetime(2025, 10, 6, 23)
    )
    with pytest.raises(ValueError, match="start: got 'yesterday'"):
        open_partitions(world, start="yesterday")
    with pytest.raises(ValueError, match="sample_frac: got 0"):
        open_partitions(world, sample_frac=0)
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        open_partitions(world, chunk_size=0)
    with pytest.raises(ValueError, match="limit_rows: got 0"):
        open_partitions(world, limit_rows=0)
    with pytest.raises(PartitionError, match="no partition lies in 2030-01-01"):
        open_partitions(world, start="2030-01-01")
    with pytest.raises(PartitionError, match="holds no folders"):
        open_partitions(tmp_path)
    with pytest.raises(PartitionError, match="is not a folder"):
        open_partitions(tmp_path / "nothing")
