"""Draws that every generator shares: Zipf weights, weighted choices, trees of children, and one root finder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

EPSILON = 4 * float(np.finfo(float).eps)


def sigmoid(x: NDArray) -> NDArray[np.float64]:
    """Return the logistic function."""
    return 1.0 / (1.0 + np.exp(-x))


def quantile(share: float) -> float:
    """Return the standard normal's quantile: a score above it belongs to the highest ``1 - share``."""
    return NormalDist().inv_cdf(share)


def zipf(rank: NDArray, power: float, shift: float = 1.0) -> NDArray[np.float64]:
    """Return the weights ``1 / (rank + shift) ** power`` of ranks 0, 1, ...; their sum is not one."""
    return 1.0 / (rank + shift) ** power


def rank_within(parent: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each child's rank 0, 1, ... among those of its parent; `parent` [n] is sorted."""
    starts = np.r_[0, np.flatnonzero(np.diff(parent)) + 1]
    return np.arange(len(parent)) - np.repeat(starts, np.diff(np.r_[starts, len(parent)]))


def children(
    parents: int, number: int, rng: np.random.Generator, weight: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """Return the sorted parents of `number` children: one child for each parent, the rest at random.

    Args:
        weight: how often a parent gets one of the rest [parents]; None = all alike
    """
    more = number - parents
    drawn = rng.integers(0, parents, more) if weight is None else rng.choice(parents, more, p=weight / weight.sum())
    return np.sort(np.r_[np.arange(parents), drawn])


@dataclass(frozen=True)
class Choice:
    """Weighted choice of a child given its parent, for many parents at once, by one search in a cumulative sum."""

    cumulative: NDArray[np.float64]
    first: NDArray[np.float64]
    mass: NDArray[np.float64]
    base: int = 0

    @classmethod
    def among(cls, weight: NDArray[np.float64]) -> Choice:
        """Choose among all, without parents."""
        return cls(np.cumsum(weight) / weight.sum(), np.zeros(1), np.ones(1))

    @classmethod
    def within(cls, parent: NDArray[np.int64], parents: int, weight: NDArray[np.float64], base: int = 0) -> Choice:
        """Choose among a parent's children.

        Args:
            parent: each child's parent, sorted [n]
            weight: how often a child is chosen [n]
            base: number of the first child
        """
        mass = np.bincount(parent, weight, minlength=parents).astype(np.float64)
        first = np.r_[0.0, np.cumsum(mass)[:-1]]
        return cls(np.cumsum(weight), first, mass, base)

    def __call__(self, parent: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Return one child of every parent [n]."""
        point = self.first[parent] + rng.random(len(parent)) * self.mass[parent]
        found = np.searchsorted(self.cumulative, point, side="right")
        return np.minimum(found, len(self.cumulative) - 1) + self.base

    def draw(self, number: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return `number` draws of a choice without parents."""
        return self(np.zeros(number, np.int64), rng)


@dataclass(frozen=True)
class Tree:
    """Children of numbered parents; the children of one parent are contiguous."""

    parent: NDArray[np.int64]
    first: NDArray[np.int64]
    size: NDArray[np.int64]

    @classmethod
    def grow(cls, parents: int, number: int, rng: np.random.Generator) -> Tree:
        """Give every parent one child and the rest at random."""
        parent = children(parents, number, rng)
        size = np.bincount(parent, minlength=parents)
        return cls(parent, np.r_[0, np.cumsum(size)[:-1]], size)

    def draw(self, parent: NDArray, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return one child of every parent [n], the first ones more often."""
        return self.first[parent] + (rng.random(len(parent)) ** 2 * self.size[parent]).astype(np.int64)


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a permutation of the 64-bit numbers [n] that leaves no pattern: the finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def paired(one: NDArray, other: NDArray, salt: int) -> NDArray[np.uint64]:
    """Return 64 random bits that belong to each pair of numbers [n]: the same pair has the same bits."""
    start = np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
    return mixed(mixed(one.astype(np.uint64) + start) + other.astype(np.uint64))


def root(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-6) -> float:
    """Return where `function` is zero between `low` and `high`, where its signs differ, up to `tolerance`.

    Raises:
        ValueError: if the signs at `low` and `high` are the same.

    Source: R. P. Brent, Algorithms for Minimization without Derivatives (1973), chapter 4.
    """
    before, at_before = low, function(low)
    best, at_best = high, function(high)
    if at_before == 0 or at_best == 0:
        return low if at_before == 0 else high
    if at_before * at_best > 0:
        raise ValueError(f"root: got {at_before} at {low} and {at_best} at {high}, needs different signs")
    other, at_other, step, last_step = before, at_before, best - before, best - before
    while True:
        if at_before != 0 and (at_before > 0) != (at_best > 0):
            other, at_other = before, at_before
            step = last_step = best - before
        if abs(at_other) < abs(at_best):
            before, best, other = best, other, best
            at_before, at_best, at_other = at_best, at_other, at_best
        least = (tolerance + EPSILON * abs(best)) / 2
        half = (other - best) / 2
        if at_best == 0 or abs(half) < least:
            return best
        trial = None
        if abs(last_step) > least and abs(at_best) < abs(at_before):
            trial = _interpolated(before, at_before, best, at_best, other, at_other)
        if trial is not None and 2 * abs(trial) < min(abs(last_step), 3 * abs(half) - least):
            last_step, step = step, trial
        else:
            last_step = step = half
        before, at_before = best, at_best
        best += step if abs(step) > least else (least if half > 0 else -least)
        at_best = function(best)


def _interpolated(before: float, at_before: float, best: float, at_best: float, other: float, at_other: float) -> float:
    """The step to the root of the line through two points, or of the inverse quadratic through three."""
    if before == other:
        return -at_best * (best - before) / (at_best - at_before)
    rise = (at_before - at_best) / (before - best)
    far = (at_other - at_best) / (other - best)
    return -at_best * (at_other * far - at_before * rise) / (far * rise * (at_other - at_before))
