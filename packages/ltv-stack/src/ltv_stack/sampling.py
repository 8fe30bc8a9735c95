"""HistUS and HistOS as published, on the amount; their expected multiplicities as weights; and what undoes them."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Histogram:
    """Equal-width bins over the amounts seen, and how rare each amount is: exp(-beta · count / largest count).

    Amounts outside the fitted range fall in the edge bins, the largest amount in the last one.

    Args:
        bins: number of bins; None for one per hundred rows, as published.
        beta: steepness of the rarity.

    Source: Aminian, Ribeiro, Gama, Machine Learning 2025 (arXiv 2501.17568): partition incremental discretisation,
    layer 1, and the rarity of its section on histogram-based sampling.
    """

    def __init__(self, bins: int | None = None, beta: float = 1.0) -> None:
        check_settings(bins=bins, beta=beta)
        self.bins = bins
        self.beta = beta
        self.edges: Floats = np.empty(0)
        self.counts: Ints = np.empty(0, np.int64)

    def fit(self, y: Floats) -> "Histogram":
        """Count the amounts [N].

        Args:
            y: amounts, one at least.

        Returns:
            the histogram itself.

        Raises:
            ValueError: no amounts, or some that are not finite.
        """
        y = _amounts(y)
        bins = self.bins or max(1, len(y) // 100)
        low, high = float(y.min()), float(y.max())
        margin = max(1e-9, 1e-9 * max(abs(low), abs(high)))
        self.edges = np.linspace(low - margin, high + margin, bins + 1)
        self.counts = np.bincount(self._bin(y), minlength=bins).astype(np.int64)
        return self

    def rarity(self, y: Floats) -> Floats:
        """p(y) in (0, 1]: near 1 where few amounts lie, exp(-beta) in the fullest bin [N].

        Args:
            y: amounts [N]; one beyond those counted falls into the bin at the edge.

        Raises:
            ValueError: it is not fitted.
        """
        if not len(self.counts):
            raise ValueError("Histogram is not fitted: call fit(y) first")
        return np.exp(-self.beta * self.counts[self._bin(np.asarray(y))] / (self.counts.max() + 1e-8))

    def _bin(self, y: Floats) -> Ints:
        return np.clip(np.searchsorted(self.edges, y, side="right") - 1, 0, len(self.edges) - 2).astype(np.int64)


def histus(y: Floats, *, seed: int = 0, histogram: Histogram | None = None) -> Ints:
    """Rows that HistUS keeps: each with probability p(y), so frequent amounts thin out and rare ones stay.

    Args:
        y: amounts [N].
        seed: of the draws.
        histogram: fitted one; None fits it on y.

    Returns:
        row numbers, ascending. A row of the largest amount always stays.
    """
    y = _amounts(y)
    p = (histogram or Histogram().fit(y)).rarity(y)
    keep = np.random.default_rng(seed).random(len(y)) < p
    keep[int(np.argmax(y))] = True
    return np.flatnonzero(keep)


def histos(
    y: Floats, *, alpha: float = 1.02, max_over: int = 40, seed: int = 0, histogram: Histogram | None = None
) -> Ints:
    """Rows as HistOS trains on them: each once, then again while a draw stays below p, and p falls by alpha each time.

    Args:
        y: amounts [N].
        alpha: divides p after every extra copy.
        max_over: most extra copies a row.
        seed: of the draws.
        histogram: fitted one; None fits it on y.

    Returns:
        row numbers with repeats, ascending.
    """
    y = _amounts(y)
    check_settings(alpha=alpha, max_over=max_over)
    p = (histogram or Histogram().fit(y)).rarity(y)
    draws = np.random.default_rng(seed)
    copies = np.ones(len(y), np.int64)
    active = np.arange(len(y))
    for _ in range(max_over):
        active = active[draws.random(len(active)) < p[active]]
        if not len(active):
            break
        copies[active] += 1
        p[active] /= alpha
    return np.repeat(np.arange(len(y)), copies)


def histus_weights(y: Floats, *, histogram: Histogram | None = None) -> Floats:
    """Expected number of times HistUS trains on each row [N]: p(y). For trees: no draws, no rows lost.

    Args:
        y: amounts [N].
        histogram: fitted one; None fits it on y.
    """
    y = _amounts(y)
    return (histogram or Histogram().fit(y)).rarity(y)


def histos_weights(y: Floats, *, alpha: float = 1.02, max_over: int = 40, histogram: Histogram | None = None) -> Floats:
    """Expected number of times HistOS trains on each row [N]: 1 + sum over m of the product of its first m chances.

    Args:
        y: amounts [N].
        alpha: divides p after every extra copy.
        max_over: most extra copies a row.
        histogram: fitted one; None fits it on y.
    """
    y = _amounts(y)
    check_settings(alpha=alpha, max_over=max_over)
    p = (histogram or Histogram().fit(y)).rarity(y)
    weight, chance = np.ones(len(y)), np.ones(len(y))
    for m in range(max_over):
        chance = chance * p / alpha**m
        weight += chance
    return weight


def check_settings(bins: int | None = None, beta: float = 1.0, alpha: float = 1.02, max_over: int = 40) -> None:
    """Check settings of HistUS and HistOS.

    Args:
        bins: of the histogram; None to choose by the rows.
        beta: how steeply p falls with the count of a bin.
        alpha: divides p after every extra copy.
        max_over: most extra copies a row.

    Raises:
        ValueError: a setting cannot be; named.
    """
    if bins is not None and bins < 1:
        raise ValueError(f"bins: got {bins}, needs at least 1")
    if beta <= 0:
        raise ValueError(f"beta: got {beta}, needs a positive number")
    if alpha < 1:
        raise ValueError(f"alpha: got {alpha}, needs 1 or more")
    if max_over < 0:
        raise ValueError(f"max_over: got {max_over}, needs 0 or more")


def undo_weights(probability: Floats, weight_of_buyers: float, weight_of_others: float) -> Floats:
    """The buyer probability before resampling, from that of a classifier trained with these mean weights per class [N].

    Source: Elkan, The Foundations of Cost-Sensitive Learning, IJCAI 2001, theorem 2.

    Args:
        probability: of the classifier [N].
        weight_of_buyers: mean weight of a buyer in its training.
        weight_of_others: mean weight of another row.

    Raises:
        ValueError: a weight is not positive.
    """
    if weight_of_buyers <= 0 or weight_of_others <= 0:
        raise ValueError(f"weights: got {weight_of_buyers} and {weight_of_others}, needs positive numbers")
    odds = probability * weight_of_others
    return odds / (odds + (1.0 - probability) * weight_of_buyers)


def _amounts(y: Floats) -> Floats:
    y = np.asarray(y, dtype=np.float64)
    if y.ndim != 1 or len(y) == 0:
        raise ValueError(f"y: got shape {y.shape}, needs at least one amount [N]")
    if not np.isfinite(y).all():
        raise ValueError(f"y: {int((~np.isfinite(y)).sum())} of {len(y)} amounts are not finite")
    return y
