"""Minimum of a convex quadratic plus a length, for a handful of task weights on the simplex {w >= 0, sum w = 1}.

Plain Python numbers: for so few unknowns a tensor call costs more than the arithmetic inside it.
"""

import math

Matrix = list[list[float]]
Vector = list[float]


def minimise_on_simplex(
    gramian: Matrix, linear: Vector, quadratic: float, length: float, tolerance: float = 1e-11
) -> Vector:
    """The minimum of ``linear . w + quadratic w'Gw / 2 + length sqrt(w'Gw)``.

    Newton steps follow the central path of the logarithmic barrier, the length's kink at 0 being smoothed as much as
    the barrier; the last steps run on the weights that are not zero.

    Args:
        gramian: G [K, K], positive semi-definite, entries about 1.
        linear: [K].
        quadratic: >= 0.
        length: >= 0.
        tolerance: barrier at which to stop; the value is then within K times this of the minimum.

    Returns:
        W [K].
    """
    k = len(linear)
    problem = _Problem(gramian, linear, quadratic, length)
    w = [1 / k] * k
    barrier = 0.1
    while barrier > tolerance:
        for _ in range(50):
            value, slope, curve = problem.at(w, barrier, range(k))
            slope = [s - barrier / x for s, x in zip(slope, w, strict=True)]
            step = newton_step(slope, curve, [barrier / x**2 for x in w])
            decrease = sum(s * d for s, d in zip(slope, step, strict=True))
            if -decrease < 1e-3 * barrier:
                break
            # Stay inside, then halve until the barrier function falls.
            size = min([1.0] + [-0.99 * x / d for x, d in zip(w, step, strict=True) if d < 0])
            start = value - barrier * sum(map(math.log, w))
            trial = w
            while size > 1e-12:
                trial = [x + size * d for x, d in zip(w, step, strict=True)]
                reached = problem.value(trial, barrier) - barrier * sum(map(math.log, trial))
                if reached <= start + 1e-4 * size * decrease:
                    break
                size /= 2
            total = sum(trial)
            w = [x / total for x in trial]
        barrier *= 0.1
    return _finish(problem, w, tolerance)


def newton_step(slope: Vector, curve: Matrix, diagonal: Vector) -> Vector:
    """The Newton step that keeps the sum, for a Hessian ``curve`` plus a diagonal."""
    k = len(slope)
    system = [[*curve[i], 1.0] for i in range(k)] + [[1.0] * k + [0.0]]
    for i in range(k):
        system[i][i] += diagonal[i]
    return solve(system, [-s for s in slope] + [0.0])[:k]


def solve(system: Matrix, right: Vector) -> Vector:
    """Gaussian elimination with row pivots; a column without a pivot gets the solution 0."""
    n = len(right)
    rows = [[*row, b] for row, b in zip(system, right, strict=True)]
    for i in range(n):
        best = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[best] = rows[best], rows[i]
        pivot = rows[i][i]
        if pivot == 0:
            continue
        for r in range(i + 1, n):
            factor = rows[r][i] / pivot
            if factor:
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    solution = [0.0] * n
    for i in reversed(range(n)):
        rest = rows[i][n] - sum(rows[i][j] * solution[j] for j in range(i + 1, n))
        solution[i] = rest / rows[i][i] if rows[i][i] else 0.0
    return solution


class _Problem:
    def __init__(self, gramian: Matrix, linear: Vector, quadratic: float, length: float) -> None:
        self.gramian, self.linear, self.quadratic, self.length = gramian, linear, quadratic, length

    def value(self, w: Vector, smooth: float) -> float:
        square = sum(x * y for x, y in zip(w, self._times(w), strict=True))
        root = math.sqrt(max(square, 0.0) + smooth**2)
        flat = sum(a * x for a, x in zip(self.linear, w, strict=True))
        return flat + 0.5 * self.quadratic * square + self.length * root

    def at(self, w: Vector, smooth: float, support: "range | list[int]") -> tuple[float, Vector, Matrix]:
        """Value, gradient and Hessian, the latter two on the supported weights."""
        inner = self._times(w)
        square = max(sum(x * y for x, y in zip(w, inner, strict=True)), 0.0)
        root = math.sqrt(square + smooth**2)
        flat = self.quadratic + self.length / root
        bend = self.length / root**3
        slope = [self.linear[i] + flat * inner[i] for i in support]
        curve = [[flat * self.gramian[i][j] - bend * inner[i] * inner[j] for j in support] for i in support]
        value = sum(a * x for a, x in zip(self.linear, w, strict=True)) + 0.5 * self.quadratic * square
        return value + self.length * root, slope, curve

    def _times(self, w: Vector) -> Vector:
        return [sum(g * x for g, x in zip(row, w, strict=True)) for row in self.gramian]


def _finish(problem: _Problem, w: Vector, smooth: float) -> Vector:
    """Newton steps on the weights that are not zero; kept only when they stay inside and do not rise."""
    support = [i for i, x in enumerate(w) if x > 1e-6]
    total = sum(w[i] for i in support)
    best = [x / total if i in support else 0.0 for i, x in enumerate(w)]
    if problem.value(best, smooth) > problem.value(w, smooth):
        return w
    for _ in range(3):
        value, slope, curve = problem.at(best, smooth, support)
        trial = list(best)
        # A flat direction (dependent gradients) would make the system singular: the least bit of curvature settles it.
        for i, d in zip(support, newton_step(slope, curve, [1e-13] * len(support)), strict=True):
            trial[i] += d
        if min(trial) < 0 or not problem.value(trial, smooth) <= value:
            break
        best = trial
    return best
