"""The feature groups and their switches, as `features.yaml` writes them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from .columns import Floats
from .nested import ALL_STATISTICS, STATISTICS

OPERATIONS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "product": lambda left, right: left * right,
    "ratio": lambda left, right: left / (np.abs(right) + 1.0),
    "sum": lambda left, right: left + right,
    "difference": lambda left, right: left - right,
}


@dataclass(frozen=True)
class Term:
    """A feature made of two others; ratio is left / (|right| + 1), so that it never blows up at zero."""

    name: str
    op: Literal["product", "ratio", "sum", "difference"]
    left: str
    right: str

    def __post_init__(self) -> None:
        if self.op not in OPERATIONS:
            raise ValueError(f"op of term {self.name!r}: got {self.op!r}, needs one of {sorted(OPERATIONS)}")


@dataclass(frozen=True)
class FeatureConfig:
    """The feature groups and their switches, in the shape of `features.yaml` (see `from_dict`)."""

    missing_indicators: bool = True
    nested: bool = True
    statistics: tuple[str, ...] = STATISTICS
    lookups: bool = True
    recency: bool = True
    half_life_days: float = 30.0
    categorical: bool = True
    min_count: int = 20
    max_size: int = 254
    frequency: bool = True
    temporal: bool = True
    interactions: tuple[Term, ...] = ()
    behavioural: tuple[Term, ...] = ()
    local_by: tuple[str, ...] = ()
    local_features: tuple[str, ...] = ()
    local_min_rows: int = 200
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("statistics", "local_by", "local_features", "exclude"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, needs a list")
        unknown = sorted(set(self.statistics) - set(ALL_STATISTICS))
        if unknown:
            raise ValueError(f"statistics: got {unknown}, needs names out of {list(ALL_STATISTICS)}")
        if self.half_life_days <= 0:
            raise ValueError(f"half_life_days: got {self.half_life_days}, needs a positive number of days")

    @classmethod
    def from_dict(cls, groups: Mapping[str, Any]) -> "FeatureConfig":
        """Read the mapping a `features.yaml` holds; a group left out keeps its default.

        Args:
            groups: group -> settings, and `exclude` -> list of columns.

        Raises:
            ValueError: an unknown group or setting, named.
        """
        shape: dict[str, dict[str, str]] = {
            "missing_indicators": {"enabled": "missing_indicators"},
            "nested": {"enabled": "nested", "statistics": "statistics", "lookups": "lookups"},
            "recency": {"enabled": "recency", "half_life_days": "half_life_days"},
            "categorical": {
                "enabled": "categorical",
                "min_count": "min_count",
                "max_size": "max_size",
                "frequency": "frequency",
            },
            "temporal": {"enabled": "temporal"},
            "interactions": {"terms": "interactions"},
            "behavioural": {"terms": "behavioural"},
            "local_distribution": {"by": "local_by", "features": "local_features", "min_rows": "local_min_rows"},
        }
        values: dict[str, Any] = {}
        for group, settings in groups.items():
            if group == "exclude":
                if isinstance(settings, str):
                    raise ValueError(f"features.exclude: got {settings!r}, needs a list of columns")
                values["exclude"] = tuple(settings or ())
                continue
            if group not in shape:
                raise ValueError(f"features: got group {group!r}, needs one of {[*shape, 'exclude']}")
            if not isinstance(settings, Mapping):
                raise ValueError(f"features.{group}: got {settings!r}, needs a mapping such as {{enabled: true}}")
            names = shape[group]
            unknown = sorted(set(settings) - set(names) - {"enabled"})
            if unknown:
                raise ValueError(f"features.{group}: got {unknown}, needs names out of {['enabled', *names]}")
            for setting, value in settings.items():
                if setting in names:
                    values[names[setting]] = _setting(value, f"features.{group}.{setting}")
            if not settings.get("enabled", True) and "enabled" not in names:
                values |= {name: () for name in names.values() if name != "local_min_rows"}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON-ready form, read back by `FeatureConfig.restore`."""
        return asdict(self)

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> "FeatureConfig":
        """The configuration `to_dict` wrote."""
        return cls(**{name: _setting(value, name) for name, value in state.items()})


def _setting(value: Any, name: str) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    try:
        return tuple(Term(**one) if isinstance(one, Mapping) else one for one in value)
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, needs name, op, left and right of each term") from None
