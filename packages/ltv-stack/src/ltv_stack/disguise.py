"""Whether one view of a column alone tells a label: its values, its groups, or that it is there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from .columns import Floats
from .nested import Bools, Ints

# What alone ranks buyers this well, or follows the amounts this closely, is the label in disguise.
_DERIVED_AUC = 0.985
_DERIVED_CORRELATION = 0.98
FEWEST_BUYERS = 30
# Where few rows buy, a group of rows that all do has seen the outcome.
_PURE = 0.99
_RARE = 0.1


@dataclass(frozen=True)
class Target:
    """A label as the tests take it.

    Args:
        name: of the label.
        values: amounts or flags, NaN where unknown [N].
        ordered: whether columns are compared with the order of the amounts too; times of every kind agree with times.
    """

    name: str
    values: Floats
    ordered: bool = True

    @cached_property
    def known(self) -> Bools:
        """Rows whose label is known [N]."""
        return np.isfinite(self.values)

    @cached_property
    def mask(self) -> bytes:
        """The known rows as a key."""
        return self.known.tobytes()

    @cached_property
    def buyers(self) -> Bools:
        """Rows known to be above zero [N]."""
        return self.known & (np.nan_to_num(self.values) > 0)

    @cached_property
    def amounts(self) -> Floats:
        """What buyers spend, ascending."""
        return np.sort(self.values[self.buyers])

    @cached_property
    def varied(self) -> bool:
        """Whether amounts differ from buyer to buyer; the values of a flag would match any other flag's."""
        return len(np.unique(self.amounts)) > 10

    @cached_property
    def usable(self) -> bool:
        """Whether there are buyers, and others, enough to tell."""
        return FEWEST_BUYERS <= len(self.amounts) < int(self.known.sum())


def targets_of(amounts: Mapping[str, Floats], others: Mapping[str, Floats]) -> list[Target]:
    """What columns are tested against: the labels of the horizons, the amounts between two of them, other labels.

    Args:
        amounts: label -> amounts of a horizon, in order of horizons.
        others: label -> any other label.
    """
    names = list(amounts)
    between = {
        f"{late} - {early}": np.maximum(amounts[late] - amounts[early], 0.0)
        for i, early in enumerate(names)
        for late in names[i + 1 :]
    }
    found = [Target(name, values) for name, values in (dict(amounts) | between).items()]
    found += [Target(name, values, ordered=False) for name, values in others.items()]
    return [target for target in found if target.usable]


def told_by_values(view: Floats, targets: Sequence[Target]) -> tuple[str, str] | None:
    """The kind of leak and what was seen, where a number of every row alone tells a label."""
    there = np.isfinite(view)
    filled = np.where(there, view, np.nanmin(view, initial=0.0) - 1.0)
    # Labels that are known for the same rows share the ranks.
    ranks: dict[bytes, Floats] = {}
    spread = np.sort(view[there & (view != 0)])
    for target in targets:
        buyers = target.buyers
        if target.varied:
            if len(spread) == len(target.amounts) and np.allclose(spread, target.amounts, rtol=1e-6):
                return "label_copy", f"holds exactly the values of {target.name}, in this or another order"
            held = buyers & there
            # Ranks, so that any monotone function of the amounts is seen.
            if target.ordered and held.sum() >= FEWEST_BUYERS and len(np.unique(view[held])) > 5:
                follows = abs(_rank_correlation(view[held], target.values[held]))
                if follows > _DERIVED_CORRELATION:
                    return "label_derived", f"rank correlation {follows:.3f} with {target.name} among buyers"
        if target.mask not in ranks:
            ranks[target.mask] = pd.Series(np.where(target.known, filled, np.nan)).rank().to_numpy()
        positives, negatives = len(target.amounts), int(target.known.sum()) - len(target.amounts)
        auc = float((ranks[target.mask][buyers].sum() - positives * (positives + 1) / 2) / (positives * negatives))
        auc = max(auc, 1 - auc)
        if auc > _DERIVED_AUC:
            return "label_derived", f"alone ranks {target.name} > 0 with AUC {auc:.4f}"
    sign = np.where(there, np.sign(np.where(there, view, 0.0)) + 2, 0).astype(np.int64)
    for target in targets:
        seen = _pure(sign, target)
        if seen:
            group, detail = seen
            return "label_derived", f"{('missing', '< 0', '= 0', '> 0')[group]} in {detail}"
    return None


def told_by_groups(group: Ints, targets: Sequence[Target], half: Bools) -> tuple[str, str] | None:
    """The same, where the rates of a column's groups, learnt on the other half of the rows, rank buyers too well."""
    size = int(group.max(initial=0)) + 1
    for target in targets:
        buyers = target.buyers
        others = target.known & ~buyers
        one, other = (
            [np.bincount(group[side & wanted], minlength=size) for wanted in (buyers, others)] for side in (half, ~half)
        )
        least = np.min([_grouped_auc(_rates(*other), *one), _grouped_auc(_rates(*one), *other)])
        if least > _DERIVED_AUC:
            detail = f"its groups alone rank {target.name} > 0 of the other half of the rows with AUC {least:.4f}"
            return "label_derived", detail
        seen = _pure(group, target)
        if seen:
            return "label_derived", f"one of its values or keys is in {seen[1]}"
    return None


def _pure(group: Ints, target: Target) -> tuple[int, str] | None:
    """A group of rows that nearly all buy, where few rows do, and its numbers in words."""
    rate = len(target.amounts) / target.known.sum()
    if rate > _RARE:
        return None
    bought = np.bincount(group[target.buyers], minlength=int(group.max(initial=0)) + 1)
    rows = np.bincount(group[target.known], minlength=len(bought))
    found = np.flatnonzero((rows >= FEWEST_BUYERS) & (bought >= _PURE * rows))
    if not len(found):
        return None
    first = int(found[0])
    return first, f"{rows[first]} rows, of which {bought[first]} have {target.name} > 0; of all rows {rate:.1%} do"


def _rates(positives: Ints, negatives: Ints) -> Floats:
    """Share of positives of each group, drawn towards that of all [G]."""
    base = positives.sum() / max(positives.sum() + negatives.sum(), 1)
    shares: Floats = (positives + base) / (positives + negatives + 1.0)
    return shares


def _grouped_auc(rates: Floats, positives: Ints, negatives: Ints) -> float:
    """AUC of rows that are scored by the rate of their group; NaN where a class is missing."""
    _, place = np.unique(rates, return_inverse=True)
    above, below = (np.bincount(place, side.astype(np.float64)) for side in (positives, negatives))
    total = above.sum() * below.sum()
    return float((above * (np.cumsum(below) - below / 2)).sum() / total) if total else float("nan")


def _rank_correlation(left: Floats, right: Floats) -> float:
    ranks = [np.argsort(np.argsort(side, kind="stable"), kind="stable").astype(float) for side in (left, right)]
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
