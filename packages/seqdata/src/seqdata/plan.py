"""What a build reads and makes, checked before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from seqdata.encode import Codec, UserCodec, make_codec
from seqdata.fields import Categorical, Field, Hashed, ItemTable, describe, infer_field, is_key, is_name, parse_field
from seqdata.lists import per_event
from seqdata.part import Part
from seqdata.sources import open_source

DEFAULT_MEMORY = 512_000_000
CASTS = {"int64": pa.int64(), "string": pa.string(), "float64": pa.float64()}


@dataclass(frozen=True)
class Plan:
    """Everything the steps of a build share; plain data, so that worker processes can have it."""

    parts: list[tuple[str, Part]]
    user: str
    time: str
    text_users: bool
    fields: dict[str, Field]
    kinds: dict[str, pa.DataType]
    event_field: str | None
    types: dict[str, pa.DataType]
    fit_before: int | None
    null_user: str
    time_unit: str | None
    time_format: str | None
    shards: int
    budget: int
    tables: list[str]
    dedup: bool = False

    def codecs(self) -> dict[str, Codec]:
        """The codec of every field, fresh."""
        known = {self.event_field: self.tables}
        return {name: make_codec(name, spec, self.kinds[name], known.get(name)) for name, spec in self.fields.items()}

    def user_codec(self) -> UserCodec | None:
        """Codes text ids; None where ids are integers."""
        return UserCodec(self.user) if self.text_users else None

    def without(self, numbers: list[int]) -> Plan:
        """This plan with empty stand-ins for some parts, so that what lives in memory need not travel."""
        parts = [(table, Part() if i in numbers else part) for i, (table, part) in enumerate(self.parts)]
        return replace(self, parts=parts)

    def signature(self) -> dict[str, Any] | None:
        """What a resumed build must share with the interrupted one; None where a part is not on disk."""
        prints = [part.fingerprint() for _, part in self.parts]
        if any(one is None for one in prints):
            return None
        return {
            "parts": [[table, one] for (table, _), one in zip(self.parts, prints, strict=True)],
            "user": self.user,
            "time": [self.time, self.time_unit, self.time_format],
            "fields": {name: describe(spec) | {"type": str(self.kinds[name])} for name, spec in self.fields.items()},
            "values": {
                name: list(spec.values or ()) for name, spec in self.fields.items() if isinstance(spec, Categorical)
            },
            "types": {name: str(kind) for name, kind in self.types.items()},
            "options": [self.event_field, self.fit_before, self.null_user, self.shards, self.dedup],
        }


def plan_build(sources: Any, *, event_field: str, null_user: str, budget: int, **options: Any) -> Plan:
    """Opens the sources of `build` and checks its arguments against their columns."""
    if null_user not in ("error", "drop"):
        raise ValueError(f"null_user={null_user!r}: needs 'error' or 'drop'")
    several = isinstance(sources, Mapping)
    if several and not sources:
        raise ValueError("sources={}: needs at least one event table")
    named = {str(name): source for name, source in sources.items()} if several else {"events": sources}
    time = options["time"]
    tables = {
        name: [per_event(part, time) for part in open_source(source, name, budget // 2)]
        for name, source in named.items()
    }
    return make_plan(
        tables, event_field=event_field if several else None, null_user=null_user, budget=budget, **options
    )


def make_plan(
    tables: dict[str, list[Part]],
    *,
    user: str,
    time: str,
    fields: Mapping[str, Any] | None,
    event_field: str | None,
    types: Mapping[str, str],
    kinds: Mapping[str, str] | None = None,
    text_users: bool | None = None,
    **options: Any,
) -> Plan:
    """Checks columns and types of all tables and settles every field.

    Args:
        tables: {event table name: parts}
        user: column of the user id
        time: column of the event time
        fields: as for `build`
        event_field: name of the field that holds the table name; None for one unnamed table
        types: as for `build`
        kinds: what a store that is appended to settled long ago; its fields may lack a column then
        text_users: whether the user ids of such a store are text
        **options: more fields of the Plan

    Raises:
        KeyError: a column that is named is in no table
        ValueError: a column or an argument does not fit; names it
    """
    casts = {}
    for column, name in types.items():
        if name not in CASTS:
            raise ValueError(f"types={{{column!r}: {name!r}}}: needs one of {sorted(CASTS)}")
        casts[column] = CASTS[name]
    seen = _columns(tables, user, time, casts, event_field)
    for column in types if kinds is None else ():
        if column not in seen:
            raise KeyError(f"types: column {column!r} is in no table; there are {list(seen)}")
    if event_field in seen:
        raise ValueError(
            f"event_field={event_field!r} is also a column of the log; choose another name for the field that holds the"
            " table name"
        )
    others = [column for column in seen if column not in (user, time)]
    if fields is None:
        chosen = {column: infer_field(column, _common(seen[column])) for column in others}
    else:
        chosen = {column: parse_field(column, spec) for column, spec in fields.items()}
        for column in chosen:
            if column == event_field:
                raise ValueError(f"fields: {column!r} is the event_field, which is made from the table names")
            if column in (user, time):
                role = "user" if column == user else "time"
                raise ValueError(f"fields: {column!r} is the {role} column, which is always kept")
            if column not in seen and kinds is None:
                raise KeyError(f"fields: column {column!r} is in no table; there are {others}")
    if "timestamp" in chosen:
        raise ValueError(
            "fields: the name 'timestamp' is taken by the event times in batches; rename or leave out that column"
        )
    for kind in seen[user]:
        if not (is_key(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise ValueError(f"user column {user!r} has type {kind}; needs integers or text")
    settled = {
        column: (
            CASTS[kinds[column]] if kinds is not None and column in kinds else _kind(column, spec, seen.get(column, []))
        )
        for column, spec in chosen.items()
    }
    if event_field is not None:
        chosen = {event_field: Categorical(), **chosen}
        settled[event_field] = pa.string()
    return Plan(
        parts=[(table, part) for table, parts in tables.items() for part in parts],
        user=user,
        time=time,
        text_users=any(is_name(kind) for kind in seen[user]) if text_users is None else text_users,
        fields=chosen,
        kinds=settled,
        event_field=event_field,
        types=casts,
        tables=list(tables),
        **options,
    )


def parse_bytes(limit: int | str | None) -> int:
    """Bytes of a number or of text such as "512MB" or "2 GiB"; None is 512 MB.

    Args:
        limit: the number or text

    Raises:
        ValueError: no number of bytes, or less than 32 MB
    """
    if limit is None:
        return DEFAULT_MEMORY
    if isinstance(limit, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", limit.lower())
        if not match:
            raise ValueError(f"memory_limit={limit!r}: needs bytes or text such as '512MB'")
        base = 1024 if match[3] else 1000
        limit = int(float(match[1]) * base ** " kmgt".index(match[2] or " "))
    if limit < 32_000_000:
        raise ValueError(f"memory_limit={limit}: needs at least 32 MB")
    return int(limit)


def check_items(items: Mapping[str, ItemTable], plan: Plan) -> None:
    """Refuses an item table of a field that is not categorical.

    Args:
        items: {field: ItemTable}
        plan: with the fields

    Raises:
        KeyError: the field is not categorical
    """
    for name in items:
        if not isinstance(plan.fields.get(name), Categorical):
            known = [field for field, spec in plan.fields.items() if isinstance(spec, Categorical)]
            raise KeyError(f"items: {name!r} is not a categorical field; the categorical fields are {known}")


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a column, dictionary-coded or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def categorical_kind(column: str, spec: Categorical | Hashed, kinds: Sequence[pa.DataType]) -> pa.DataType:
    """int64 or string: how the values of a categorical column are compared.

    Args:
        column: its name
        spec: how it is stored
        kinds: its Arrow type in every table

    Raises:
        ValueError: a type is neither text, numbers nor booleans
    """
    values = spec.values if isinstance(spec, Categorical) else None
    if values and all(isinstance(value, str) for value in values):
        return pa.string()
    if values and all(isinstance(value, int | np.integer) for value in values):
        return pa.int64()
    kinds = [kind for kind in map(value_type, kinds) if not pa.types.is_null(kind)]
    if not kinds or any(is_name(kind) for kind in kinds):
        return pa.string()
    for kind in kinds:
        if not (is_key(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)):
            raise ValueError(
                f"column {column!r} has type {kind}; ids need integers or text: types={{{column!r}: 'string'}} casts it"
            )
    return pa.int64()


def _columns(
    tables: dict[str, list[Part]], user: str, time: str, casts: dict[str, pa.DataType], event_field: str | None
) -> dict[str, list[pa.DataType]]:
    seen: dict[str, list[pa.DataType]] = {}
    for table, parts in tables.items():
        for part in parts:
            place = part.where if event_field is None else f"{part.where} (table {table!r})"
            names = part.schema.names
            for role, column in (("user", user), ("time", time)):
                if column not in names:
                    raise KeyError(f"{role} column {column!r} is not in {place}; it has {names}")
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{place}: columns {repeated} appear twice")
            for column in part.schema:
                seen.setdefault(column.name, []).append(value_type(casts.get(column.name, column.type)))
    return seen


def _common(kinds: Sequence[pa.DataType]) -> pa.DataType:
    for test in (is_name, pa.types.is_floating):
        for kind in kinds:
            if test(kind):
                return kind
    return next((kind for kind in kinds if not pa.types.is_null(kind)), kinds[0])


def _kind(column: str, spec: Field, kinds: Sequence[pa.DataType]) -> pa.DataType:
    return categorical_kind(column, spec, kinds) if isinstance(spec, Categorical | Hashed) else pa.float64()
