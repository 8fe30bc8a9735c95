"""Which cached rows are trained on and which are held out."""

import logging
from typing import Any

import numpy as np

from . import stages
from .cache import FeatureCache, Ints
from .columns import Floats
from .config import LTVConfig, embargo_seconds

log = logging.getLogger(__name__)


def split_rows(cache: FeatureCache, config: LTVConfig, buyers: Floats, report: dict[str, Any]) -> tuple[Ints, Ints]:
    """Training and held-out rows, ascending, as `LTVConfig.split` says; the same rows where models are cross-fitted.

    Args:
        cache: all rows.
        config: settings.
        buyers: 1.0 for buyers by the main horizon, NaN where unknown [N].
        report: takes the numbers of rows.

    Returns:
        numbers of the training rows and of the held-out rows.

    Raises:
        ValueError: too few rows are left on a side; says how many.
    """
    if config.split == "stratified_random":
        log.warning("held-out rows are drawn at random: what is learnt on them does not see the passing of time")
        train, held_out = _at_random(cache, config.calibration_frac, np.nan_to_num(buyers))
    elif config.split == "cross_fit":
        train = held_out = np.arange(cache.rows)
    else:
        train, held_out = _by_time(cache, config, report)
    if config.max_rows is not None and len(train) > config.max_rows:
        log.warning("max_rows: %d of %d training rows are used", config.max_rows, len(train))
        report["rows_over_the_cap"] = len(train) - config.max_rows
        train = drawn_rows(cache, train, config.max_rows)
        held_out = train if config.split == "cross_fit" else held_out
    report |= {"training_rows": len(train), "held_out_rows": len(held_out)}
    if len(train) == 0 or len(held_out) == 0:
        raise ValueError(
            f"dataset: {cache.rows} rows leave {len(train)} for training and {len(held_out)} for calibration; "
            "give more rows, or a smaller embargo"
        )
    return train, held_out


def folds_of(cache: FeatureCache, rows: Ints, number: int) -> list[Ints]:
    """Rows cut into stretches of time.

    Args:
        cache: all rows.
        rows: those to cut.
        number: of stretches.
    """
    fold = stages.blocked_folds(cache.time[rows], number)
    return [rows[fold == f] for f in range(number)]


def drawn_rows(cache: FeatureCache, rows: Ints, number: int) -> Ints:
    """At most so many of these rows, by their hashes, ascending.

    Args:
        cache: all rows.
        rows: those to draw from, ascending.
        number: most rows.
    """
    return np.sort(rows[np.argsort(cache.hashes[rows], kind="stable")[:number]])


def _at_random(cache: FeatureCache, share: float, buyers: Floats) -> tuple[Ints, Ints]:
    held = np.zeros(cache.rows, dtype=bool)
    for value in (0.0, 1.0):
        own = np.flatnonzero(buyers == value)
        held[drawn_rows(cache, own, round(len(own) * share))] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _by_time(cache: FeatureCache, config: LTVConfig, report: dict[str, Any]) -> tuple[Ints, Ints]:
    share, gap = config.calibration_frac, embargo_seconds(config.embargo)
    ordered = np.sort(cache.time)
    cut = float(ordered[min(int(len(ordered) * (1 - share)), len(ordered) - 1)])
    held = cache.time >= cut
    if cut > ordered[0] and held.mean() <= max(0.4, 2 * share):
        before = cache.time < cut - gap
        if gap:
            report["rows_in_embargo"] = int((~held & ~before).sum())
        return np.flatnonzero(before), np.flatnonzero(held)
    log.info("too few distinct times to hold out the newest %.0f %%: the last rows are held out", 100 * share)
    order = np.argsort(cache.time, kind="stable")
    first = max(1, int(len(order) * (1 - share)))
    return np.sort(order[:first]), np.sort(order[first:])
