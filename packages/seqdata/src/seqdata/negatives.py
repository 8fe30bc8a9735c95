"""Negative items for training: uniform, by popularity, of the positive's category, or the rest of the batch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from seqdata.fields import MISSING
from seqdata.jagged import Jagged
from seqdata.join import positions_of
from seqdata.store import Store

TRIES, CHUNK = 20, 1 << 20


class Negatives:
    """Draws ids of a categorical field, fresh for every (epoch, step), the same for the same seed.

    Args:
        store: whose counts, those before the fit cutoff, are the popularity, so that it leaks nothing
        field: categorical field whose ids to draw
        alpha: an id is drawn in proportion to count ** alpha; 0 is uniform
        category: item property "field.column" of which negatives share their positive's value
        within: share of the draws that stay inside the positive's category, 0 to 1
        seed: of all draws
    """

    def __init__(
        self,
        store: Store,
        field: str,
        *,
        alpha: float = 0.0,
        category: str | None = None,
        within: float = 1.0,
        seed: int = 0,
    ) -> None:
        vocabulary = store.vocabulary(field)
        if vocabulary.hashed is not None or not len(vocabulary.values):
            raise ValueError(f"Negatives: {field!r} has no values to draw from")
        if not 0 <= within <= 1:
            raise ValueError(f"Negatives: within={within}; needs a share from 0 to 1")
        self.seed, self.within, self.size, self.first = seed, within, len(vocabulary), vocabulary.first_value
        weight = np.zeros(self.size)
        weight[self.first :] = np.maximum(vocabulary.counts, 1).astype(np.float64) ** alpha
        self._store, self._field = store, field
        self._category = None
        if category is not None:
            owner, column = store.item_columns.get(category, (None, ""))
            if owner != field:
                raise KeyError(
                    f"Negatives: category={category!r} is no item column of {field!r}; there are"
                    f" {list(store.item_columns)}"
                )
            self._category = store.item_column(field, column).astype(np.int64)
            self._sizes = np.bincount(self._category, weight > 0)
        self._weighted = _Bins(self._category, weight)
        self._even = _Bins(self._category, (weight > 0).astype(np.float64))

    @property
    def log_q(self) -> np.ndarray:
        """float32 [ids] log of the chance of each id where nothing is excluded, -inf for ids that are never drawn.

        `log_q_of` has the chance beside a positive, and where a category or known ids matter.

        Raises:
            ValueError: a chance depends on the positive, with `category`
        """
        if self._category is not None and self.within > 0:
            raise ValueError("log_q: with category= a chance depends on the positive; needs log_q_of(positives, drawn)")
        with np.errstate(divide="ignore"):
            return np.log(self._weighted.weight / self._weighted.weight.sum()).astype(np.float32)

    def log_q_of(
        self, positives: np.ndarray, drawn: np.ndarray, *, avoid: Jagged | None = None, rows: Any = None
    ) -> np.ndarray:
        """float32 [T, count] log of the chance that one draw beside its positive gives what `draw` gave.

        Exact: a draw that hits what is to be avoided is drawn again, so all others are the more likely.

        Args:
            positives: ids [T]
            drawn: what `draw` gave for them [T, count]
            avoid: as `draw` had it
            rows: as `draw` had them

        Raises:
            ValueError: `drawn` has another shape
        """
        positives, drawn = np.asarray(positives, np.int64), np.asarray(drawn, np.int64)
        if drawn.ndim != 2 or len(drawn) != len(positives):
            raise ValueError(f"log_q_of: drawn has shape {drawn.shape}; needs [{len(positives)}, count]")
        known = self._known(avoid, rows, positives)
        sequence = np.zeros(len(positives), np.int64) if rows is None else np.asarray(rows, np.int64)
        everything = np.zeros(len(positives), np.int64)
        if self._category is None:
            chance = self._chance(positives, drawn, everything, known, sequence)
        else:
            share = np.where(self._has_others(positives), self.within, 0.0)[:, None]
            chance = (1 - share) * self._chance(positives, drawn, everything, known, sequence)
            chance += share * self._chance(positives, drawn, 1 + self._category[positives], known, sequence)
        with np.errstate(divide="ignore"):
            return np.log(chance).astype(np.float32)

    def draw(
        self,
        positives: np.ndarray,
        count: int,
        *,
        epoch: int = 0,
        step: int = 0,
        avoid: Jagged | None = None,
        rows: Any = None,
    ) -> np.ndarray:
        """Draws negatives.

        Args:
            positives: ids [T]
            count: negatives of each positive
            epoch: another one gives other draws
            step: another one gives other draws
            avoid: a Jagged of one field of ids that the draws of a sequence shall not contain
            rows: which of these sequences each positive belongs to [T]

        Returns:
            int32 ids [T, count], none the positive of its row. Where what is to be avoided is nearly everything, a few
            of it may stay.

        Raises:
            ValueError: `count` is less than 1, or a positive is no id of the field
        """
        if count < 1:
            raise ValueError(f"draw: count={count}; needs an integer >= 1")
        positives = np.asarray(positives, np.int64)
        if len(positives) and (positives.min() < 0 or positives.max() >= self.size):
            raise ValueError(f"draw: positives hold ids {positives.min()}..{positives.max()}; needs 0..{self.size - 1}")
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, step]))
        known = self._known(avoid, rows, positives)
        wanted = np.repeat(positives, count)
        sequence = np.repeat(np.zeros(len(positives), np.int64) if rows is None else np.asarray(rows, np.int64), count)
        drawn = np.zeros(len(wanted), np.int64)
        again = np.arange(len(wanted))
        group = self._group(wanted, rng)
        for turn in range(2 * TRIES):
            # a sequence that holds nearly all popular ids would be refused for ever: then all ids have one chance
            bins = self._weighted if turn < TRIES else self._even
            drawn[again] = bins.draw(group[again], rng)
            bad = drawn[again] == wanted[again]
            if known is not None:
                bad |= _inside(known, sequence[again] * self.size + drawn[again])
            again = again[bad]
            if not len(again):
                break
        return drawn.reshape(len(positives), count).astype(np.int32)

    def in_batch(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float32 log of the chance of each id [B], bool [B, B] that is True where another row holds the same id).

        For a softmax over the batch: subtract the first from the logits' columns, mask the second. Items come into a
        batch as they come in the log, whatever `alpha` is: the chance of an id is its share of the events before the
        fit cutoff that have one. An id that had none counts as one event.

        Args:
            ids: item ids of the batch [B]
        """
        ids = np.asarray(ids)
        same = ids[:, None] == ids[None, :]
        np.fill_diagonal(same, False)
        return self._log_shares[ids], same

    @functools.cached_property
    def _log_shares(self) -> np.ndarray:
        store, fit = self._store, self._store.schema["fit_before"]
        counts = np.zeros(self.size, np.int64)
        for low in range(0, store.num_events, CHUNK):
            places = np.arange(low, min(low + CHUNK, store.num_events))
            found = store.take(self._field, places)
            counts += np.bincount(found if fit is None else found[store.time[places] < fit], minlength=self.size)
        counts[MISSING] = 0
        shares = np.maximum(counts, 1) / max(counts.sum(), 1)
        return np.log(shares).astype(np.float32)

    def _chance(
        self,
        positives: np.ndarray,
        drawn: np.ndarray,
        group: np.ndarray,
        known: np.ndarray | None,
        sequence: np.ndarray,
    ) -> np.ndarray:
        """float64 [T, count] chance of each draw out of a group [T], after all that `draw` tries."""
        refused = drawn == positives[:, None]
        if known is not None:
            refused |= _inside(known, sequence[:, None] * self.size + drawn)
        own = np.ones(drawn.shape, bool)
        if self._category is not None:
            own = (group == 0)[:, None] | (self._category[drawn] == group[:, None] - 1)
        chance, last, left = np.zeros(drawn.shape), np.zeros(drawn.shape), np.ones(len(drawn))
        for bins in (self._weighted, self._even):
            total = np.maximum(bins.total[group], np.finfo(np.float64).tiny)
            bad = np.clip(self._refused(bins.weight, positives, group, known, sequence) / total, 0, 1)
            once = bins.weight[drawn] * own / total[:, None]
            # 1 + bad + bad ** 2 + ...: the tries that got so far
            tries = sum(bad**turn for turn in range(TRIES))
            chance += (left * tries)[:, None] * once
            # the very last try is kept whatever it is
            last = (left * bad ** (TRIES - 1))[:, None] * once
            left = left * bad**TRIES
        return np.where(refused, last, chance)

    def _refused(
        self,
        weight: np.ndarray,
        positives: np.ndarray,
        group: np.ndarray,
        known: np.ndarray | None,
        sequence: np.ndarray,
    ) -> np.ndarray:
        """float64 [T] weight of the positive and the known ids that lie in a group [T]."""
        if known is None:
            return weight[positives]
        more = np.where(_inside(known, sequence * self.size + positives), 0.0, weight[positives])
        ids, owner = known % self.size, known // self.size
        if self._category is None or not group.any():
            return more + np.bincount(owner, weight[ids], minlength=int(sequence.max(initial=0)) + 1)[sequence]
        width = int(self._category.max()) + 1
        keys, place = np.unique(owner * width + self._category[ids], return_inverse=True)
        at = positions_of(sequence * width + group - 1, keys)
        return more + np.append(np.bincount(place, weight[ids], minlength=len(keys)), 0.0)[at]

    def _has_others(self, positives: np.ndarray) -> np.ndarray:
        """bool [T]: has the category another item? A category of one, or none, has no negative of its own."""
        assert self._category is not None
        category = self._category[positives]
        return (self._sizes[category] > 1) & (category > 0)

    def _group(self, positives: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The group to draw each negative from: 0 is everything, 1 + c the category c."""
        if self._category is None:
            return np.zeros(len(positives), np.int64)
        inside = self._has_others(positives) & (rng.random(len(positives)) < self.within)
        return np.where(inside, 1 + self._category[positives], 0)

    def _known(self, avoid: Jagged | None, rows: Any, positives: np.ndarray) -> np.ndarray | None:
        if avoid is None:
            return None
        if rows is None or len(rows) != len(positives):
            raise ValueError("draw: avoid needs rows [T], the sequence of every positive")
        if len(avoid.values) != 1:
            raise ValueError(f"draw: avoid holds {list(avoid.values)}; needs one field")
        ids = np.asarray(next(iter(avoid.values.values())), np.int64)
        lengths = np.asarray(avoid.lengths)
        return np.unique(np.repeat(np.arange(len(lengths)), lengths) * self.size + ids)


class _Bins:
    """Weighted ids end to end, all and then category by category: one uniform number picks an id of a group."""

    def __init__(self, category: np.ndarray | None, weight: np.ndarray) -> None:
        everything = np.arange(len(weight))
        self.weight = weight
        self._ids, border = everything, np.array([0, len(weight)])
        if category is not None:
            order = np.argsort(category, kind="stable")
            self._ids = np.append(everything, order)
            inner = np.searchsorted(category[order], np.arange(int(category.max()) + 2))
            border = np.append(0, len(weight) + inner)
        self._ends = np.cumsum(weight[self._ids])
        ends = np.append(0.0, self._ends)[border]
        self._low, self._high, self._last = ends[:-1], ends[1:], border[1:] - 1
        self.total = self._high - self._low

    def draw(self, group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        low, high = self._low[group], self._high[group]
        at = np.searchsorted(self._ends, low + (high - low) * rng.random(len(group)), "right")
        return self._ids[np.minimum(at, self._last[group])]


def _inside(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.zeros(len(keys), bool)
    return known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys
