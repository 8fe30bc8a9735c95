"""Deep heads: likelihoods against closed forms, monotone units, and the same promises as the trees."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ltv_stack import LTVConfig, LTVPipeline, Schema, evaluate, open_partitions, predict_table

torch = pytest.importorskip("torch")
from ltv_stack.heads import ODMN, OptDist, ziln_loss, ziln_mean  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ziln_is_the_published_likelihood_and_mean() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 3, dtype=torch.float64)
    y = torch.where(torch.rand(50) < 0.5, torch.exp(torch.randn(50)), torch.zeros(50)).double()
    p, mu, sigma = torch.sigmoid(logits[:, 0]), logits[:, 1], torch.nn.functional.softplus(logits[:, 2])
    safe = torch.where(y > 0, y, torch.ones_like(y))
    density = torch.distributions.LogNormal(mu, sigma).log_prob(safe)
    expected = -torch.where(y > 0, torch.log(p) + density, torch.log1p(-p))
    torch.testing.assert_close(ziln_loss(logits, y), expected)
    torch.testing.assert_close(ziln_mean(logits), p * torch.exp(mu + sigma**2 / 2))


def test_ziln_never_overflows() -> None:
    logits = torch.full((1, 3), 1e4)
    assert torch.isfinite(ziln_mean(logits)).all() and torch.isfinite(ziln_loss(logits, torch.ones(1))).all()


def test_more_early_probability_never_lowers_a_later_logit() -> None:
    torch.manual_seed(0)
    head = ODMN(8, 2, distributions=2, buckets=3)
    unit = head.mono[0]
    low = torch.rand(20, 7)
    high = low + torch.rand(20, 7)
    assert (unit(high) >= unit(low) - 1e-6).all()
    outputs = head(torch.randn(4, 8, requires_grad=True))
    later = outputs[1][0].sum()
    head.zero_grad()
    later.backward()
    # The earlier horizon is not trained through the later one.
    assert head.towers[0][0].weight.grad is None or not head.towers[0][0].weight.grad.any()


def test_odmn_buckets_hold_about_equal_counts_and_decode_inside_them() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    y = np.where(rng.random((2000, 2)) < 0.5, rng.lognormal(size=(2000, 2)), 0.0)
    for decode in ("argmax", "expectation"):
        head = ODMN(8, 2, distributions=2, buckets=5, decode=decode)
        head.prepare(y)
        positive = torch.tensor(y[:, 0][y[:, 0] > 0], dtype=torch.float32)
        counts = torch.bincount(head._cell(positive, 0), minlength=10)
        assert counts.min() >= 0.9 * len(positive) / 10 and counts.max() <= 1.1 * len(positive) / 10
        found = head.mean(head(torch.randn(64, 8)))
        assert found.shape == (64, 2) and (found >= 0).all() and found.max() <= y.max()
        target = torch.tensor(y[:64], dtype=torch.float32)
        loss = head.loss(head(torch.randn(64, 8)), target, torch.ones(64, 2))
        loss.backward()
        assert torch.isfinite(loss) and head.towers[1][0].weight.grad.abs().sum() > 0
    nothing = head.loss(head(torch.randn(4, 8)), torch.zeros(4, 2), torch.zeros(4, 2))
    assert torch.isfinite(nothing)


def test_optdist_aligns_its_choice_with_the_network_that_fits_best() -> None:
    torch.manual_seed(0)
    head = OptDist(4, 1, distributions=3)
    optimiser = torch.optim.Adam(head.choice.parameters(), 0.05)
    hidden = torch.randn(256, 4)
    y = torch.exp(2 * hidden[:, :1])
    for _ in range(60):
        loss = head.loss(head(hidden), y, torch.ones(256, 1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    logits, alpha = head(hidden)
    best = ziln_loss(logits, y.unsqueeze(-1).expand(logits.shape[:-1])).argmin(-1)
    assert (alpha.argmax(-1) == best).float().mean() > 0.6


@pytest.mark.parametrize("model", ["ziln", "optdist", "odmn"])
def test_a_deep_pipeline_keeps_every_promise(
    model: str, world: Path, schema: Schema, config: Callable[..., LTVConfig], tmp_path: Path
) -> None:
    train = open_partitions(world, end="2025-10-01-08-00")
    later = open_partitions(world, start="2025-10-01-09-00")
    pipe = LTVPipeline(schema, config(model=model, deep={"epochs": 4, "hidden": [64, 32]})).fit(train)
    whole = predict_table(pipe, later.with_options(chunk_size=None))
    amounts = np.column_stack([whole[f"revenue_{h}"].to_numpy() for h in ("d1", "d7", "d14")])
    assert (np.diff(amounts, axis=1) >= 0).all() and np.isfinite(amounts).all()
    loaded = LTVPipeline.load(pipe.save(tmp_path / "model"))
    for other in (loaded, pickle.loads(pickle.dumps(pipe))):
        for chunk in (1000, 50_000, 77):
            again = predict_table(other, later.with_options(chunk_size=chunk))
            for name in pipe.output_columns:
                assert again[name].to_numpy().tobytes() == whole[name].to_numpy().tobytes(), (chunk, name)
    found = evaluate(pipe, later)
    truth = found.predictions["true_d7"].to_numpy()
    assert found.metrics["d7"]["msle"] < 0.97 * np.var(np.log1p(truth))
    assert found.metrics["d7"]["gini"] > 0.45


def test_the_same_seed_gives_the_same_weights(world: Path, schema: Schema, config: Callable[..., LTVConfig]) -> None:
    data = open_partitions(world, max_partitions=3)
    settings = config(model="ziln", estimand="mean", deep={"epochs": 1})
    one, two = (predict_table(LTVPipeline(schema, settings).fit(data), data) for _ in range(2))
    assert one.equals(two)
