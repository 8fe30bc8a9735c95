"""Next-basket baselines on Ta-Feng give the numbers measured with the published protocol and folds."""

import json

import numpy as np
import pytest

from rankers import TIFUKNN, UPCF, Interactions, TopFreq, evaluate

# Test users of fold 0 .. 4, mean over the folds: Recall@10, NDCG@10 (ideal over all targets), PHR@10.
EXPECTED = {
    "g": (0.0813, 0.0861, 0.2504),
    "gp": (0.1350, 0.1157, 0.4245),
    "upcf": (0.1282, 0.1114, 0.4060),
}


@pytest.fixture
def tafeng(footfall_data):
    folder = footfall_data("tafeng-nbr")
    history, future = (json.loads((folder / f"tafeng_{part}.json").read_text()) for part in ("history", "future"))
    number = {user: i for i, user in enumerate(sorted(history, key=int))}
    # The files have an empty basket [-1] at either end.
    past = [
        (number[user], item, time)
        for user, lists in history.items()
        for time, basket in enumerate(b for b in lists if b != [-1])
        for item in basket
    ]
    columns = np.array(past).T
    targets = np.array([(number[u], item) for u, lists in future.items() for b in lists if b != [-1] for item in b]).T
    folds = [json.loads((folder / "folds" / f"fold_{k}.json").read_text()) for k in range(5)]
    parts = [{part: np.array([number[u] for u in fold[part]]) for part in ("train", "test")} for fold in folds]
    return Interactions(*columns, num_users=len(number), num_items=folds[0]["item_num"]), targets, parts


def _judged(ranker, users, targets):
    means = evaluate(users, ranker.recommend(users, 10)[0], *targets, full_ideal=True).means()
    return np.array([means["recall@10"], means["ndcg@10"], means["phr@10"]])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_the_published_protocol_gives_the_published_numbers(name, tafeng):
    data, targets, folds = tafeng
    ranker = (UPCF(10, 0.75, 10.0) if name == "upcf" else TopFreq(name)).fit(data)
    found = np.mean([_judged(ranker, fold["test"], targets) for fold in folds], 0)
    # Equal scores by item number move the fourth decimal.
    np.testing.assert_allclose(found, EXPECTED[name], atol=3e-4)


@pytest.mark.slow
def test_tuned_tifu_beats_the_frequencies(tafeng):
    data, targets, folds = tafeng
    test, train = folds[0]["test"], folds[0]["train"]
    tifu = _judged(TIFUKNN(900, 1.0, 0.9, 0.1, 7, among=train).fit(data), test, targets)
    assert tifu[0] == pytest.approx(0.1564, abs=5e-4)
    assert (tifu > _judged(TopFreq("gp").fit(data), test, targets)).all()
