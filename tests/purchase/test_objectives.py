"""Targets, losses and what a weight reaches."""

import numpy as np
import pytest
import torch

from mtl_heads import FrequencySampler
from purchase.config import EVENTS, Model, Train
from purchase.network import Recommender
from purchase.objectives import next_items, terms, total
from purchase.train import parameter_groups

ITEMS = 12


def draw(seed: int = 0, users: int = 5) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, users)
    events = int(lengths.sum())
    return {
        "item": torch.from_numpy(rng.integers(ITEMS, size=events)),
        "event": torch.from_numpy(rng.integers(3, size=events)),
        "seconds": torch.from_numpy(np.concatenate([np.sort(rng.integers(1000, size=n)) for n in lengths])),
        "offsets": torch.from_numpy(np.r_[0, np.cumsum(lengths)]),
    }


def network(**settings) -> Recommender:
    torch.manual_seed(0)
    codes = torch.arange(ITEMS)
    model = Model(width=8, heads=2, layers=1, dropout=0.0, id_dropout=0.0, max_len=20, **settings)
    return Recommender(model, codes % 3, codes % 4, codes < 10, EVENTS)


def sampler() -> FrequencySampler:
    return FrequencySampler(torch.arange(1, ITEMS + 1))


@pytest.mark.parametrize("seed", range(3))
def test_targets_are_the_next_event_of_the_same_user_in_time(seed: int) -> None:
    batch = draw(seed)
    for kind, event in enumerate(EVENTS):
        wanted = []
        for low, high in zip(batch["offsets"][:-1].tolist(), batch["offsets"][1:].tolist(), strict=True):
            for at in range(low, high):
                after = [j for j in range(at + 1, high) if batch["event"][j] == kind]
                near = after and batch["seconds"][after[0]] - batch["seconds"][at] <= 300
                wanted.append(int(batch["item"][after[0]]) if near else -1)
        assert next_items(batch, event, 300).tolist() == wanted


@pytest.mark.parametrize("loss", ["softmax", "focal"])
@pytest.mark.parametrize("encoder", ["transformer", "hstu"])
def test_a_weight_reaches_its_own_term_and_nothing_else(loss: str, encoder: str) -> None:
    model, batch, settings = network(encoder=encoder), draw(), Train(loss=loss, negatives=6)
    torch.manual_seed(1)
    found = terms(model, batch, sampler(), settings, 1e9)
    assert set(found) == set(EVENTS) and all(term > 0 for term in found.values())

    def gradient(weights: dict[str, float], name: str) -> list[torch.Tensor]:
        shared = [one for key, one in model.named_parameters() if not key.startswith("heads")]
        own = [*model.heads[name].parameters()]
        grads = torch.autograd.grad(total(found, weights), [*own, *shared], retain_graph=True, allow_unused=True)
        return [grad for grad in grads if grad is not None]

    weights = {"view": 1.0, "cart": 1.0, "purchase": 100.0}
    more = weights | {"purchase": 800.0}
    heads = len([*model.heads["view"].parameters()])
    for once, times in zip(gradient(weights, "purchase")[:heads], gradient(more, "purchase")[:heads], strict=True):
        assert torch.equal(8 * once, times) and once.abs().sum() > 0
    for once, times in zip(gradient(weights, "view")[:heads], gradient(more, "view")[:heads], strict=True):
        assert torch.equal(once, times) and once.abs().sum() > 0
    # In what they share, the purchase term's own gradient is 8 times as large and the others' are what they were.
    alone = gradient({"view": 0.0, "cart": 0.0, "purchase": 100.0}, "view")
    rest = gradient({"view": 1.0, "cart": 1.0, "purchase": 0.0}, "view")
    both = gradient(more, "view")
    for purchase, other, whole in zip(alone, rest, both, strict=True):
        assert torch.allclose(8 * purchase + other, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    values = {name: term.detach() for name, term in found.items()}
    more_by = total(values, more) - total(values, weights)
    assert more_by.item() == pytest.approx(700 * values["purchase"].item(), rel=1e-4)


def test_a_batch_without_purchases_has_no_purchase_term() -> None:
    batch = draw()
    batch["event"] = torch.zeros_like(batch["event"])
    for loss in ("softmax", "focal"):
        found = terms(network(), batch, sampler(), Train(loss=loss, negatives=4), 1e9)
        assert found["purchase"] == 0 and found["view"] > 0
        total(found, Train().weights).backward()


def test_popular_negatives_count_less_with_log_q() -> None:
    model, batch = network(), draw()
    values = {}
    for log_q in (True, False):
        torch.manual_seed(3)
        values[log_q] = terms(model, batch, sampler(), Train(log_q=log_q, negatives=8), 1e9)["view"].item()
    assert values[True] != pytest.approx(values[False])
    even = FrequencySampler(torch.ones(ITEMS))
    for log_q in (True, False):
        torch.manual_seed(3)
        values[log_q] = terms(model, batch, even, Train(log_q=log_q, negatives=8), 1e9)["view"].item()
    # All items are drawn alike: the correction is a constant, which a softmax does not see.
    assert values[True] == pytest.approx(values[False], rel=1e-5)


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = network()
    groups = parameter_groups(model, 0.5, Train(learning_rate=0.1, weight_decay=0.2))
    found = [id(one) for group in groups for one in group["params"]]
    assert sorted(found) == sorted(map(id, model.parameters()))
    by_name = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert by_name == {"embeddings": (0.05, 0.0), "heads": (0.1, 0.2), "matrices": (0.1, 0.2), "rest": (0.1, 0.0)}
