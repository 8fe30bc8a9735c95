"""The two-task toy problem of the CAGrad, Nash-MTL and FAMO papers: every method reaches its Pareto front.

Two coordinates x; for x2 > 0 each loss is a log-valley, for x2 < 0 a bowl: a = (7, -8), b = (-7, -8). On the front the
two gradients point against each other: it is the line x2 = x2* from -7 to 7, x2* a bit below -8.
"""

import math

import pytest
import torch

from mtl_heads import AGGREGATORS, FAMO, WEIGHTINGS, LossWeighting
from mtl_heads.aggregation import mgda_weights

STARTS = [(-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)]
# Losses go down to -20; weightings by loss ratios need positive ones. A constant moves no front.
SHIFT = 21.0


def _valley(argument, d1, d2):
    """log(max(|argument|, 5e-6)) + 6 and its gradient."""
    size = abs(argument)
    if size <= 5e-6:
        return math.log(5e-6) + 6, (0.0, 0.0)
    return math.log(size) + 6, (d1 / argument, d2 / argument)


def losses_and_jacobian(x1, x2):
    """The two losses and their gradients, in closed form."""
    th, bend = math.tanh(x2), 1 - math.tanh(x2) ** 2
    half, half_bend = math.tanh(x2 / 2), 0.5 * (1 - math.tanh(x2 / 2) ** 2)
    # At x2 = 0 both halves let their gradient through, as a clamp does.
    up, down = max(half, 0.0), max(-half, 0.0)
    up_bend, down_bend = (half_bend if x2 >= 0 else 0.0), (-half_bend if x2 <= 0 else 0.0)
    valleys = _valley(0.5 * (-x1 - 7) + th, -0.5, bend), _valley(0.5 * (-x1 + 3) - th + 2, -0.5, -bend)
    values, rows = [], []
    for (valley, (v1, v2)), centre in zip(valleys, (7.0, -7.0), strict=True):
        bowl = ((x1 - centre) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
        b1, b2 = 0.2 * (x1 - centre), 0.02 * (x2 + 8)
        values.append(valley * up + bowl * down)
        rows.append((v1 * up + b1 * down, v2 * up + valley * up_bend + b2 * down + bowl * down_bend))
    return values, rows


def _front():
    """Points of the front in losses [P, 2]."""
    points = []
    for i in range(281):
        x1 = -7 + i / 20
        points.append(min((losses_and_jacobian(x1, -8 - j / 100)[0] for j in range(100)), key=sum))
    return torch.tensor(points)


FRONT = _front()


def _descend(method, start, steps=4000, lr=0.1):
    """Adam on x with the gradient the method gives, until the front is reached or the steps are used up."""
    x, mean, square = list(start), [0.0, 0.0], [0.0, 0.0]
    parameters = list(method.parameters())
    own = torch.optim.Adam(parameters, 0.01) if parameters else None
    for step in range(1, steps + 1):
        values, rows = losses_and_jacobian(*x)
        jacobian = torch.tensor(rows, dtype=torch.float64)
        if isinstance(method, LossWeighting):
            # Losses that are exact here and have the exact gradient.
            leaf = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            losses = torch.tensor(values, dtype=torch.float64) + SHIFT + jacobian @ leaf
            total = method(losses, shared=[leaf])
            if own is not None:
                own.zero_grad()
            total.backward()
            if own is not None:
                own.step()
            direction = leaf.grad.tolist()
        else:
            direction = method(jacobian).tolist()
        for i, g in enumerate(direction):
            mean[i] = 0.9 * mean[i] + 0.1 * g
            square[i] = 0.999 * square[i] + 0.001 * g * g
            x[i] -= lr * mean[i] / (1 - 0.9**step) / (math.sqrt(square[i] / (1 - 0.999**step)) + 1e-8)
        if isinstance(method, FAMO):
            method.update(torch.tensor(losses_and_jacobian(*x)[0], dtype=torch.float64) + SHIFT)
        if isinstance(method, LossWeighting) and step % 100 == 0:
            method.end_epoch()
        if step % 25 == 0 and _above_the_front(x) < 0.02:
            break
    return x


def _above_the_front(x):
    """By how much some point of the front is better in both losses at once; the losses span 20."""
    return float((torch.tensor(losses_and_jacobian(*x)[0]) - FRONT).min(-1).values.max())


def test_the_gradients_are_those_of_the_losses():
    for x in ((-8.0, 5.0), (2.0, 3.0), (1.0, -2.0), (6.0, -9.0), (-7.5, 0.1)):
        _, rows = losses_and_jacobian(*x)
        for i in (0, 1):
            step = [0.0, 0.0]
            step[i] = 1e-6
            up = losses_and_jacobian(x[0] + step[0], x[1] + step[1])[0]
            low = losses_and_jacobian(x[0] - step[0], x[1] - step[1])[0]
            for k in (0, 1):
                assert rows[k][i] == pytest.approx((up[k] - low[k]) / 2e-6, rel=1e-4, abs=1e-6)


def test_the_front_is_stationary_and_the_starts_are_far_from_it():
    for x1 in (-6.0, 0.0, 3.0):
        j = torch.tensor(losses_and_jacobian(x1, -8.4)[1], dtype=torch.float64)
        assert (mgda_weights(j @ j.T) @ j).norm() < 0.01
    assert all(_above_the_front(start) > 5 for start in STARTS)


@pytest.mark.parametrize("name", [*WEIGHTINGS, *AGGREGATORS])
def test_every_method_reaches_the_front_from_five_starts(name):
    make = {**WEIGHTINGS, **AGGREGATORS}[name]
    ends = [_descend(make(2), start) for start in STARTS]
    gaps = [_above_the_front(x) for x in ends]
    assert max(gaps) < 0.05, [(tuple(round(v, 2) for v in x), round(gap, 3)) for x, gap in zip(ends, gaps, strict=True)]
