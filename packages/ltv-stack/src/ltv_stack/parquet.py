"""Parquet files of partitions: read by pieces, and named where they cannot be."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import PartitionError

PIECE_ROWS = 1 << 16


def file_tables(path: str, columns: Sequence[str] | None, time_column: str | None) -> Iterator[pa.Table]:
    """Read a file by pieces, the same ones whatever is done with them.

    Args:
        path: the file
        columns: those to read that the file has; None for all
        time_column: a column of nulls to put in the place of one of that name; None for none

    Raises:
        PartitionError: the file cannot be read, or has a column twice.
    """
    with footer(path) as file:
        known = file.schema_arrow.names
        wanted = known if columns is None else [c for c in columns if c in known]
        add_time = time_column and (columns is None or time_column in columns)
        try:
            for batch in file.iter_batches(batch_size=PIECE_ROWS, columns=wanted):
                table = without_views(pa.Table.from_batches([batch]))
                if add_time:
                    column = pa.nulls(batch.num_rows, pa.timestamp("us"))
                    if time_column in table.column_names:
                        table = table.drop_columns([time_column])
                    table = table.append_column(time_column, column)
                yield table
        except (pa.ArrowException, OSError, EOFError) as error:
            raise PartitionError(_unreadable(path, error)) from error


def read_through(path: str) -> None:
    """Read a file to its end, since a good footer may hide damaged pages.

    Args:
        path: the file.

    Raises:
        PartitionError: a page is damaged.
    """
    with footer(path) as file:
        try:
            for _ in file.iter_batches(batch_size=PIECE_ROWS):
                pass
        except (pa.ArrowException, OSError, EOFError) as error:
            raise PartitionError(_unreadable(path, error)) from error


def footer(path: str) -> pq.ParquetFile:
    """Open a file, its pages checked against their checksums as they are read.

    Raises:
        PartitionError: it cannot be read as Parquet, or has a column twice; named.
    """
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise PartitionError(_unreadable(path, error)) from error
    if twice := first_doubled(file.schema_arrow):
        file.close()
        raise PartitionError(f"partition file {path} has the column {twice!r} more than once, needs names that differ")
    return file


def without_views(table: pa.Table) -> pa.Table:
    """A table of the types that `viewless` gives."""
    fields = [field.with_type(viewless(field.type)) for field in table.schema]
    return table if fields == list(table.schema) else table.cast(pa.schema(fields))


def viewless(kind: pa.DataType) -> pa.DataType:
    """The type with text and bytes instead of views of them, whose rows Arrow cannot yet take or filter."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_map(kind):
        return pa.map_(viewless(kind.key_type), kind.item_field.with_type(viewless(kind.item_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(viewless(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(viewless(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(viewless(kind.field(i).type)) for i in range(kind.num_fields)])
    return kind


def first_doubled(schema: pa.Schema) -> str | None:
    """The first column name that comes more than once."""
    names = schema.names
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


def _unreadable(path: str, error: BaseException) -> str:
    return f"partition file {path} cannot be read as Parquet (truncated or not Parquet?): {str(error).splitlines()[0]}"
