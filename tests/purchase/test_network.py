"""The network looks back only, and its lists are exact."""

import numpy as np
import pytest
import torch

from purchase.evaluate import filled
from purchase.prepare import open_prepared
from purchase.ranking import NetworkRanker, excluded, top_k
from purchase.train import load_network
from rankers.ranker import top_items
from tests.purchase.test_objectives import draw, network


@pytest.mark.parametrize("encoder", ["transformer", "hstu"])
def test_later_events_and_other_users_change_nothing(encoder: str) -> None:
    model, batch = network(encoder=encoder).eval(), draw(4)
    whole = model(**batch)
    for user in range(5):
        low, high = int(batch["offsets"][user]), int(batch["offsets"][user + 1])
        for end in range(low + 1, high + 1):
            part = {name: batch[name][low:end] for name in ("item", "event", "seconds")}
            alone = model(**part, offsets=torch.tensor([0, end - low]))
            assert torch.allclose(alone, whole[low:end], atol=1e-5)


def test_an_item_nobody_had_is_its_brand_and_category() -> None:
    model = network()
    vectors = model.item_vectors()
    # Items 10 and 11 were never learnt from; brand is i % 3 and category i % 4, and 0 is none.
    assert torch.equal(vectors[10], model.brands.weight[1] + model.categories.weight[2])
    assert not torch.equal(vectors[4], model.brands.weight[1])
    assert vectors[0].equal(model.items.weight[0])


@pytest.mark.parametrize("seed", range(4))
def test_equal_scores_are_ordered_by_number(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(4, size=(6, 30)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[0] = -np.inf
    for k in (1, 5, 29, 30):
        wanted = top_items(scores.astype(np.float64), k)
        found = top_k(torch.from_numpy(scores), k)
        assert np.array_equal(found[0].numpy(), wanted[0]) and np.array_equal(found[1].double().numpy(), wanted[1])


def test_lists_of_the_network_are_those_of_its_scores(trained, config_of, monkeypatch) -> None:
    config = config_of(trained)
    prepared = open_prepared(config)
    ranker = NetworkRanker(load_network(config, prepared), prepared.history(), "purchase", 20, batch_events=300)
    users = np.arange(len(prepared.history()))[::3]
    monkeypatch.setattr("purchase.ranking.BLOCK_NUMBERS", 7 * prepared.num_items)
    items, scores = ranker.recommend(users, 10)
    whole = ranker._scores(users)
    assert np.isfinite(whole).all() and np.array_equal(items, top_items(whole, 10)[0])
    hidden = excluded(prepared.history(), ["view", "purchase"], prepared.num_items)
    shown, _ = ranker.recommend(users, 10, hidden)
    past = prepared.history().where("event_type", ["view", "purchase"]).gather(["item_id"])
    for user, line in zip(users, shown, strict=True):
        own = past["item_id"][past.offsets[user] : past.offsets[user + 1]] - 2
        assert not set(line.tolist()) & set(own.tolist())
    assert excluded(prepared.history(), [], 5) is None and scores.shape == (len(users), 10)


def test_short_lists_go_on_with_spare_items() -> None:
    lists = np.array([[3, -1, -1], [5, 1, 2], [-1, -1, -1]])
    spare = np.array([[1, 3, 2, 4, 0, 6]] * 3)
    assert filled(lists, spare).tolist() == [[3, 1, 2], [5, 1, 2], [1, 3, 2]]
    assert filled(np.array([[2, -1]]), np.array([[2, -1, -1, -1]])).tolist() == [[2, -1]]
