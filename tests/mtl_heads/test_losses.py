"""Every loss against its formula, written out plainly."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from mtl_heads import losses


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_focal_loss_is_its_formula_and_cross_entropy_at_gamma_zero():
    z = torch.randn(50, generator=_generator(), dtype=torch.float64) * 4
    y = (torch.rand(50, generator=_generator(1)) < 0.3).double()
    p = z.sigmoid()
    p_t, a_t = torch.where(y > 0, p, 1 - p), torch.where(y > 0, 0.75, 0.25)
    expected = -a_t * (1 - p_t) ** 2 * p_t.log()
    torch.testing.assert_close(losses.focal_loss(z, y, alpha=0.75, reduction="none"), expected)
    torch.testing.assert_close(losses.focal_loss(z, y, gamma=0.0), F.binary_cross_entropy_with_logits(z, y))
    summed = expected.sum()
    torch.testing.assert_close(losses.focal_loss(z, y, alpha=0.75), summed / 50)
    torch.testing.assert_close(losses.focal_loss(z, y, alpha=0.75, normalise="positives"), summed / y.sum())


def test_focal_loss_by_hand():
    # p = 0.5 exactly: -0.75 * 0.25 * ln 0.5 for a positive, -0.25 * 0.25 * ln 0.5 for a negative.
    value = losses.focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]), alpha=0.75, reduction="none")
    torch.testing.assert_close(value, torch.tensor([0.75, 0.25]) * 0.25 * math.log(2))


def test_focal_losses_are_finite_far_out():
    z = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    y = torch.tensor([1.0, 0.0, 0.0, 1.0])
    losses.focal_loss(z, y).backward()
    assert z.grad.isfinite().all() and z.grad[2] > 0 > z.grad[3]
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    losses.softmax_focal_loss(logits, torch.tensor([0, 0])).backward()
    assert logits.grad.isfinite().all() and logits.grad[1, 0] < 0


def test_softmax_focal_loss_is_its_formula():
    z = torch.randn(20, 5, generator=_generator(), dtype=torch.float64)
    y = torch.randint(5, (20,), generator=_generator(1))
    alpha = torch.rand(5, generator=_generator(2), dtype=torch.float64)
    p = z.softmax(-1)[torch.arange(20), y]
    expected = -alpha[y] * (1 - p) ** 1.5 * p.log()
    torch.testing.assert_close(losses.softmax_focal_loss(z, y, gamma=1.5, alpha=alpha, reduction="none"), expected)
    torch.testing.assert_close(losses.softmax_focal_loss(z, y, gamma=0.0), F.cross_entropy(z, y))


def test_cross_entropies_equal_torchs():
    z, y = torch.randn(20, 5, generator=_generator()), torch.randint(5, (20,), generator=_generator(1))
    torch.testing.assert_close(
        losses.softmax_cross_entropy(z, y, label_smoothing=0.1), F.cross_entropy(z, y, label_smoothing=0.1)
    )
    bits = (z > 0.5).float()
    weight = torch.tensor([1.0, 2, 3, 4, 5])
    torch.testing.assert_close(
        losses.binary_cross_entropy(z, bits, pos_weight=weight),
        F.binary_cross_entropy_with_logits(z, bits, pos_weight=weight),
    )
    smoothed = losses.binary_cross_entropy(z, bits, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, F.binary_cross_entropy_with_logits(z, bits * 0.8 + 0.1))


def test_class_weights_scale_each_class_without_touching_the_denominator():
    z, y = torch.zeros(3, 2), torch.tensor([0, 0, 1])
    value = losses.softmax_cross_entropy(z, y, class_weights=torch.tensor([1.0, 4.0]))
    assert value.item() == pytest.approx((1 + 1 + 4) * math.log(2) / 3)


def test_class_balanced_weights_by_hand():
    # beta 0.5: (1 - b) / (1 - b^n) is 1 for n = 1 and 0.5 / 0.75 = 2/3 for n = 2; scaled to sum to 2.
    weights = losses.class_balanced_weights([1, 2], beta=0.5)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2 / 3]) * 2 / (5 / 3))
    assert losses.class_balanced_weights([10, 0, 10], beta=0.9)[1] == 0
    torch.testing.assert_close(losses.class_balanced_weights([3, 30], beta=0.0), torch.ones(2))
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\)"):
        losses.class_balanced_weights([1], beta=1.0)


def test_product_logit_is_the_product_of_probabilities():
    a, b = torch.randn(2, 40, generator=_generator(), dtype=torch.float64) * 5
    torch.testing.assert_close(losses.product_logit([a, b]).sigmoid(), a.sigmoid() * b.sigmoid())
    far = torch.tensor([60.0, -300.0, 0.0], requires_grad=True)
    value = losses.product_logit([far, torch.tensor([90.0, -300.0, -300.0])])
    value.sum().backward()
    assert value.isfinite().all() and far.grad.isfinite().all()


def test_ziln_is_its_formula():
    out = torch.randn(30, 3, generator=_generator(), dtype=torch.float64)
    y = torch.where(
        torch.rand(30, generator=_generator(1)) < 0.5, torch.rand(30, generator=_generator(2)).double() * 80, 0.0
    )
    p, mu, sigma = out[:, 0].sigmoid(), out[:, 1], F.softplus(out[:, 2])
    density = torch.distributions.LogNormal(mu, sigma).log_prob(y.clamp_min(1e-9))
    expected = torch.where(y > 0, -p.log() - density, -(1 - p).log())
    torch.testing.assert_close(losses.ziln_loss(out, y, reduction="none"), expected)
    torch.testing.assert_close(losses.ziln_mean(out), p * torch.distributions.LogNormal(mu, sigma).mean)


def test_ordinal_is_its_formula_and_levels_sum_to_one():
    z = torch.randn(20, 1, generator=_generator()) - torch.tensor([-1.0, 0.0, 1.5])
    y = torch.randint(4, (20,), generator=_generator(1))
    p = z.sigmoid()
    expected = torch.stack(
        [sum(-(p[i, j].log() if y[i] > j else (1 - p[i, j]).log()) for j in range(3)) for i in range(20)]
    )
    torch.testing.assert_close(losses.ordinal_loss(z, y, reduction="none"), expected)
    levels = losses.ordinal_probabilities(z)
    torch.testing.assert_close(levels.sum(-1), torch.ones(20))
    assert (levels >= 0).all()


def test_bpr_and_order_penalty_by_hand():
    value = losses.bpr_loss(torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 1.0], [0.0, 2.0]]), reduction="none")
    expected = torch.tensor([math.log(2), 0.5 * (math.log(2) + math.log1p(math.exp(2)))])
    torch.testing.assert_close(value, expected)
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    chain = [torch.tensor([logit(0.5)]), torch.tensor([logit(0.7)]), torch.tensor([logit(0.1)])]
    assert losses.order_penalty(chain).item() == pytest.approx(0.2)


def test_info_nce_with_pairs_is_cross_entropy_on_the_diagonal():
    q, k = torch.randn(6, 4, generator=_generator()), torch.randn(6, 4, generator=_generator(1))
    torch.testing.assert_close(
        losses.info_nce_loss(q, k, temperature=0.2), F.cross_entropy(q @ k.T / 0.2, torch.arange(6))
    )


def test_info_nce_averages_over_the_positives_and_skips_queries_without():
    q, k = torch.randn(3, 4, generator=_generator()), torch.randn(5, 4, generator=_generator(1))
    positives = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    log_p = (q @ k.T / 0.5).log_softmax(-1)
    expected = (-(log_p[0, 0] + log_p[0, 1]) / 2 - log_p[2, 4]) / 2
    torch.testing.assert_close(losses.info_nce_loss(q, k, positives, temperature=0.5), expected)


def test_supcon_is_its_formula():
    z = F.normalize(torch.randn(7, 4, generator=_generator()), dim=-1)
    y = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    terms = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        same = [p for p in others if y[p] == y[i]]
        bottom = sum(math.exp(z[i] @ z[a] / 0.3) for a in others)
        if same:
            terms.append(-sum(float(z[i] @ z[p]) / 0.3 - math.log(bottom) for p in same) / len(same))
    assert losses.supervised_contrastive_loss(z, y, temperature=0.3).item() == pytest.approx(
        sum(terms) / len(terms), rel=1e-5
    )


def test_unlabelled_rows_are_no_negatives_in_supcon():
    z = torch.randn(7, 4, generator=_generator())
    y = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    mask = torch.tensor([True, True, False, True, True, True, False])
    torch.testing.assert_close(
        losses.supervised_contrastive_loss(z, y, mask=mask), losses.supervised_contrastive_loss(z[mask], y[mask])
    )


def test_vector_and_regression_losses():
    a, b = torch.randn(5, 3, generator=_generator()), torch.randn(5, 3, generator=_generator(1))
    torch.testing.assert_close(losses.vector_loss(a, b), F.mse_loss(a, b))
    torch.testing.assert_close(losses.vector_loss(a, b, kind="cosine"), (1 - F.cosine_similarity(a, b)).mean())
    torch.testing.assert_close(losses.regression_loss(a, b, kind="mae"), F.l1_loss(a, b))
    torch.testing.assert_close(losses.regression_loss(a, b, kind="huber", delta=0.5), F.huber_loss(a, b, delta=0.5))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: losses.focal_loss(x, (x.detach() > 0.3).double(), alpha=0.25),
        lambda x: losses.softmax_focal_loss(x, torch.tensor([0, 2, 1])),
        lambda x: losses.ziln_loss(x[:, :3], torch.tensor([0.0, 2.0, 30.0])),
        lambda x: losses.ordinal_loss(x, torch.tensor([0, 2, 3])),
        lambda x: losses.diversity_loss(x),
        lambda x: losses.novelty_loss(x, torch.tensor([3.0, 1, 2, 5]), k=2),
        lambda x: losses.product_logit([x[:, 0], x[:, 1]]).sum(),
        lambda x: losses.supervised_contrastive_loss(x, torch.tensor([0, 0, 1])),
    ],
)
def test_gradients(loss):
    x = torch.randn(3, 4, generator=_generator(4), dtype=torch.float64, requires_grad=True)
    assert gradcheck(loss, (x,))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"targets must have the logits' shape \(3,\), got \(3, 1\)"):
        losses.focal_loss(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="normalise must be"):
        losses.focal_loss(torch.zeros(3), torch.zeros(3), normalise="none")
    with pytest.raises(ValueError, match="positives must be given"):
        losses.info_nce_loss(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="targets must have shape"):
        losses.softmax_cross_entropy(torch.zeros(3, 2), torch.zeros(2).long())
