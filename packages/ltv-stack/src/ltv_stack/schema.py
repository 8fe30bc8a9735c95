"""Every column's role and the time it becomes known, declared in one place."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

Role = Literal["feature", "label", "id", "time", "ignore"]
Kind = Literal["auto", "number", "category", "unix_seconds", "year_month", "nested", "nested_time", "set"]


@dataclass(frozen=True)
class Column:
    """One column of the data.

    Args:
        name: its name in the files.
        role: what it may be used for.
        kind: how a feature is read; "auto" decides by the Arrow type seen at fit time.
        available_at: "row" when known at the row's own time, else how long after it.
        derived_from: the columns it was computed from.
        lookup: scalar columns whose value is looked up among this nested column's keys.
    """

    name: str
    role: Role = "feature"
    kind: Kind = "auto"
    available_at: timedelta | Literal["row"] = "row"
    derived_from: tuple[str, ...] = ()
    lookup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        roles, kinds = Role.__args__, Kind.__args__  # type: ignore[attr-defined]
        if self.role not in roles:
            raise ValueError(f"role of column {self.name!r}: got {self.role!r}, needs one of {list(roles)}")
        if self.kind not in kinds:
            raise ValueError(f"kind of column {self.name!r}: got {self.kind!r}, needs one of {list(kinds)}")


@dataclass(frozen=True)
class Horizon:
    """One horizon: `revenue` is the column of amounts to date, `buyer` that of the 0/1 flag; either may lack."""

    name: str
    revenue: str | None = None
    buyer: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"name of horizon: got {self.name!r}, needs letters, digits, _ or - (it names files)")


@dataclass(frozen=True)
class Schema:
    """The declared columns and the horizons in order of time.

    Args:
        columns: every column that may be used or must be known about; others in the data are not used.
        horizons: shortest first; revenue at a later one is never below that at an earlier one.
        time: the column of each row's own time, or None where rows have none.
        id: the column that names a row, or None.
        segments: scalar columns by which reports and calibration may split.
    """

    columns: tuple[Column, ...]
    horizons: tuple[Horizon, ...]
    time: str | None = "datetime"
    id: str | None = "row_id"
    segments: tuple[str, ...] = ()
    _by_name: dict[str, Column] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __init__(
        self,
        columns: Sequence[Column],
        horizons: Sequence[Horizon],
        time: str | None = "datetime",
        id: str | None = "row_id",
        segments: Sequence[str] = (),
    ) -> None:
        names = [column.name for column in columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"columns: {twice} are declared more than once")
        twice = sorted({h.name for h in horizons if [other.name for other in horizons].count(h.name) > 1})
        if twice:
            raise ValueError(f"horizons: {twice} are given more than once")
        if not horizons:
            raise ValueError("horizons: got none, needs at least one")
        days = [int(h.name[1:]) for h in horizons if re.fullmatch(r"d\d+", h.name)]
        if days != sorted(days):
            raise ValueError(f"horizons: got {', '.join(h.name for h in horizons)}, needs the shortest first")
        labels = {name for h in horizons for name in (h.revenue, h.buyer) if name}
        clash = sorted(c.name for c in columns if c.role == "feature" and c.name in labels)
        if clash:
            raise ValueError(f"columns: {clash} are labels of a horizon and cannot be features")
        extra = tuple(Column(name, role="label") for name in sorted(labels - set(names)))
        for name, value in {
            "columns": (*columns, *extra),
            "horizons": tuple(horizons),
            "time": time,
            "id": id,
            "segments": tuple(segments),
            "_by_name": {column.name: column for column in (*columns, *extra)},
        }.items():
            object.__setattr__(self, name, value)

    @property
    def feature_columns(self) -> list[str]:
        """Names of the columns that may become features."""
        return [column.name for column in self.columns if column.role == "feature"]

    @property
    def label_columns(self) -> list[str]:
        """Names of the columns that are known only after the row."""
        return [column.name for column in self.columns if column.role == "label"]

    def __getitem__(self, name: str) -> Column:
        if name not in self._by_name:
            raise KeyError(f"column {name!r} is not declared")
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def without(self, *names: str) -> "Schema":
        """The same schema less these columns; a horizon that loses its label loses it here too."""
        for name in names:
            self[name]
        columns = [column for column in self.columns if column.name not in names]
        horizons = [
            replace(h, revenue=None if h.revenue in names else h.revenue, buyer=None if h.buyer in names else h.buyer)
            for h in self.horizons
        ]
        return Schema(columns, horizons, self.time, self.id, self.segments)

    def with_columns(self, *columns: Column) -> "Schema":
        """The same schema with these columns added, or replaced where the name is known."""
        names = {column.name for column in columns}
        kept = [column for column in self.columns if column.name not in names]
        return Schema([*kept, *columns], self.horizons, self.time, self.id, self.segments)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, read back by `Schema.from_dict`."""
        columns = [
            {
                "name": c.name,
                "role": c.role,
                "kind": c.kind,
                "available_seconds": None if c.available_at == "row" else c.available_at.total_seconds(),
                "derived_from": list(c.derived_from),
                "lookup": list(c.lookup),
            }
            for c in self.columns
        ]
        horizons = [{"name": h.name, "revenue": h.revenue, "buyer": h.buyer} for h in self.horizons]
        return {
            "columns": columns,
            "horizons": horizons,
            "time": self.time,
            "id": self.id,
            "segments": list(self.segments),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Schema":
        """The schema `to_dict` wrote."""
        columns = [
            Column(
                c["name"],
                c["role"],
                c["kind"],
                "row" if c["available_seconds"] is None else timedelta(seconds=c["available_seconds"]),
                tuple(c["derived_from"]),
                tuple(c["lookup"]),
            )
            for c in state["columns"]
        ]
        horizons = [Horizon(**h) for h in state["horizons"]]
        return cls(columns, horizons, state["time"], state["id"], state["segments"])
