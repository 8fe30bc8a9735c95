"""How a column is read, from its Arrow type: one value a row, many, or text."""

from collections.abc import Sequence

import pyarrow as pa

from .columns import is_nested, number_fields, struct_as_map
from .data import Dataset
from .schema import Kind, Schema

_NESTED_KINDS = ("nested", "nested_time", "set")


def check_types(dataset: Dataset, schema: Schema, exclude: Sequence[str] = ()) -> None:
    """Look at the Arrow type of every declared feature in every file, before anything is read.

    Raises:
        ValueError: a map or list where one value a row is needed, or the other way round, or text where other files
            hold numbers; names the column and the file.
    """
    names = {name for name in schema.feature_columns if name not in exclude}
    first: dict[str, tuple[str, pa.DataType]] = {}
    for place, one in dataset.fields():
        if one.name not in names or pa.types.is_null(one.type):
            continue
        before, known = first.setdefault(one.name, (place, one.type))
        declared = schema[one.name].kind
        if declared != "auto":
            require_kind(f"column {one.name} in {place}", declared, one.type)
        if _family(kind_of(one.type)) != _family(kind_of(known)):
            raise ValueError(f"column {one.name}: Arrow type {one.type} in {place}, but {known} in {before}")


def as_read(column: pa.Array, name: str) -> pa.Array:
    """A column as features are made of it: a struct as a map of its numbers, bytes as text.

    Raises:
        ValueError: bytes that are not UTF-8 text; names the column.
    """
    kind = column.type
    if pa.types.is_struct(kind) and number_fields(kind):
        return struct_as_map(column)
    if _is_bytes(kind):
        try:
            return column.cast(pa.large_binary()).cast(pa.large_string())
        except pa.ArrowInvalid as error:
            raise ValueError(f"column {name}: its bytes ({kind}) are not UTF-8 text; exclude it") from error
    return column


def kind_of(arrow: pa.DataType) -> Kind:
    """How a column of this Arrow type is read; "auto" where it is not."""
    if pa.types.is_dictionary(arrow):
        arrow = arrow.value_type
    if is_nested(arrow):
        inner = arrow.item_type if pa.types.is_map(arrow) else arrow.value_type
        text = pa.types.is_string(inner) or pa.types.is_large_string(inner)
        return "set" if text and not pa.types.is_map(arrow) else "nested"
    if number_fields(arrow):
        return "nested"
    if pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or _is_bytes(arrow):
        return "category"
    if pa.types.is_timestamp(arrow) or pa.types.is_date(arrow):
        return "unix_seconds"
    numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    return "number" if any(check(arrow) for check in numeric) else "auto"


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _family(kind: Kind) -> str:
    return "nested" if kind in _NESTED_KINDS else kind


def require_kind(what: str, kind: Kind, arrow: pa.DataType) -> None:
    """Check that a column of this Arrow type can be read as `kind`.

    Args:
        what: the column, for the message.
        kind: as declared.
        arrow: as found.

    Raises:
        ValueError: it cannot.
    """
    if pa.types.is_null(arrow):
        return
    several = _family(kind_of(arrow)) == "nested"
    if several != (kind in _NESTED_KINDS):
        needs = "one value a row" if several else "a map or a list"
        raise ValueError(f"{what}: got Arrow type {arrow}, needs {needs} ({kind})")
