"""The evaluation against plain code, the union of candidates by hand, and a re-ranker that has something to learn."""

import math

import numpy as np
import pytest

from rankers import Interactions, LambdaRank, Popularity, RepeatItems, evaluate, union
from rankers.evaluate import bootstrap
from rankers.ranker import top_items


def _plain(found, targets, k, full_ideal):
    """ndcg, recall, mrr, phr of one list, or NaNs."""
    if not targets:
        return [math.nan] * 4
    hits = [place for place, item in enumerate(found[:k]) if item in targets]
    ideal = sum(1 / math.log2(p + 2) for p in range(len(targets) if full_ideal else min(k, len(targets))))
    gain = sum(1 / math.log2(p + 2) for p in hits)
    return [gain / ideal, len(hits) / len(targets), 1 / (hits[0] + 1) if hits else 0.0, float(bool(hits))]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("full_ideal", [False, True])
def test_values_are_their_definitions_in_every_slice(seed, full_ideal):
    rng = np.random.default_rng(seed)
    users = rng.permutation(20)[:9]
    lists = np.stack([rng.permutation(8)[:6] for _ in users])
    lists[2, 3:] = -1
    wanted = np.stack([rng.integers(20, size=40), rng.integers(8, size=40)], 1)
    past = np.stack([rng.integers(20, size=30), rng.integers(6, size=30)], 1)
    result = evaluate(users, lists, *wanted.T, ks=(1, 3, 6), seen=tuple(past.T), full_ideal=full_ideal)
    seen, warm = {tuple(p) for p in past.tolist()}, set(past[:, 1].tolist())
    rules = {
        "all": lambda u, i: True,
        "repeat": lambda u, i: (u, i) in seen,
        "new": lambda u, i: (u, i) not in seen,
        "cold": lambda u, i: i not in warm,
        "warm": lambda u, i: i in warm,
    }
    for name, rule in rules.items():
        for k in (1, 3, 6):
            rows = []
            for u, found in zip(users.tolist(), lists.tolist(), strict=True):
                rows.append(_plain(found, {i for v, i in wanted.tolist() if v == u and rule(u, i)}, k, full_ideal))
            rows = np.array(rows)
            for column, metric in enumerate(("ndcg", "recall", "mrr", "phr")):
                np.testing.assert_allclose(result.values[name][f"{metric}@{k}"], rows[:, column], rtol=1e-12)
            has = ~np.isnan(rows[:, 0])
            means = result.means(name)
            assert means["users"] == has.sum()
            if has.any():
                assert means[f"ndcg@{k}"] == pytest.approx(rows[has, 0].mean())
                assert result.means(name, all_users=True)[f"recall@{k}"] == pytest.approx(
                    np.nan_to_num(rows[:, 1]).sum() / 9
                )


def test_numbers_and_tie_rule_are_those_of_mtl_heads():
    torch, metrics = pytest.importorskip("torch"), pytest.importorskip("mtl_heads.metrics")
    rng = np.random.default_rng(3)
    scores, relevant = rng.integers(4, size=(30, 12)).astype(float), rng.random((30, 12)) < 0.15
    exclude = (rng.random((30, 12)) < 0.2) & ~relevant
    lists, _ = top_items(np.where(exclude, -np.inf, scores), 5)
    found = evaluate(np.arange(30), lists, *np.nonzero(relevant), ks=(1, 5)).means()
    other = metrics.RankingMetrics((1, 5))
    other.update(*(torch.from_numpy(part) for part in (scores, relevant)), exclude=torch.from_numpy(exclude))
    expected = other.compute()
    assert found.pop("users") == expected["rows"]
    assert found == pytest.approx({name: expected[name] for name in found})


def test_pairs_of_rankers_are_of_the_same_users():
    users, lists = np.arange(3), np.array([[0, 1], [1, 0], [0, 1]])
    one = evaluate(users, lists, [0, 1], [0, 0], ks=(2,))
    two = evaluate(users, lists[:, ::-1], [0, 1], [0, 0], ks=(2,))
    gap = 1 - 1 / math.log2(3)
    np.testing.assert_allclose(one.minus(two, "ndcg@2"), [gap, -gap])
    assert one.minus(two, "ndcg@2", all_users=True).shape == (3,)
    low, high = one.interval("ndcg@2", draws=200)
    assert low <= one.means()["ndcg@2"] <= high and (low, high) == one.interval("ndcg@2", draws=200)
    assert all(math.isnan(x) for x in bootstrap(np.zeros(0)))
    with pytest.raises(ValueError, match="other: got other users or targets"):
        one.minus(evaluate(users, lists, [0, 2], [0, 0], ks=(2,)), "ndcg@2")
    with pytest.raises(ValueError, match=r"metric, slice: got 'ndcg@2', 'cold'"):
        one.of("ndcg@2", "cold")


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"lists: got shape \(1, 2\), needs \[1, 3 or more\]"):
        evaluate([0], [[0, 1]], [0], [0], ks=(3,))
    with pytest.raises(ValueError, match="lists: got an item twice"):
        evaluate([0], [[1, 1]], [0], [0], ks=(1,))
    with pytest.raises(ValueError, match="users: got a user twice"):
        evaluate([0, 0], [[0], [0]], [0], [0], ks=(1,))
    nobody = evaluate([], np.zeros((0, 1)), [0], [0], ks=(1,))
    assert math.isnan(nobody.means()["ndcg@1"]) and nobody.means()["users"] == 0


def _data():
    #        user 0: items 0, 0, 1; user 1: item 2; user 2: nothing.
    columns = np.array([[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 1, 1]])
    return Interactions(*columns, num_users=3, num_items=4)


def test_a_union_has_every_candidate_once_with_all_scores_and_ranks():
    data = _data()
    rankers = {"pop": (Popularity(None).fit(data), 2), "own": (RepeatItems(None).fit(data), 9)}
    found = union(rankers, [2, 1, 0])
    assert found.names == ("pop", "own") and found.users.tolist() == [2, 1, 0]
    pairs = list(zip(found.row.tolist(), found.item.tolist(), strict=True))
    assert pairs == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    nan = math.nan
    np.testing.assert_array_equal(found.ranks, [[0, nan], [1, nan], [0, nan], [1, nan], [nan, 0], [0, 0], [1, 1]])
    np.testing.assert_array_equal(found.scores, [[2, nan], [1, nan], [2, nan], [1, nan], [nan, 1], [2, 2], [1, 1]])
    assert found.features().shape == (7, 4)
    assert found.relevance([1, 0, 0], [2, 1, 3]).tolist() == [0, 0, 0, 0, 1, 0, 1]
    hidden = union(rankers, [0], exclude=data.matrix())
    assert hidden.item.tolist() == [2] or 0 not in hidden.item
    with pytest.raises(ValueError, match="users: got a user twice"):
        union(rankers, [0, 0])
    with pytest.raises(ValueError, match="rankers: got none"):
        union({}, [0])


def test_a_reranker_learns_what_its_features_say():
    rng = np.random.default_rng(0)
    users, items = 60, 30
    every = np.stack(np.meshgrid(np.arange(users), np.arange(items), indexing="ij"), -1).reshape(-1, 2)
    data = Interactions(every[:, 0], every[:, 1], np.zeros(len(every), np.int64), users, items)
    found = union({"pop": (Popularity(None).fit(data), 20)}, np.arange(users))
    signal = rng.normal(size=len(found))
    features = np.column_stack([signal, rng.normal(size=len(found)), found.features()])
    relevance = np.zeros(len(found), np.int64)
    for row in range(users):
        at = np.flatnonzero(found.row == row)
        relevance[at[np.argsort(-signal[at])[:2]]] = 1
    # A user without a relevant candidate is left out of the fit, and still gets a list.
    relevance[found.row == 5] = 0
    model = LambdaRank(k=5, rounds=60, min_leaf=5).fit(found, features, relevance)
    lists, scores = model.recommend(found, features, 5)
    assert lists.shape == (users, 5) and (lists >= 0).all() and (np.diff(scores) <= 0).all()
    judged = evaluate(found.users, lists, found.users[found.row[relevance > 0]], found.item[relevance > 0], ks=(5,))
    before = evaluate(
        found.users,
        Popularity(None).fit(data).recommend(found.users, 5)[0],
        found.users[found.row[relevance > 0]],
        found.item[relevance > 0],
        ks=(5,),
    )
    assert judged.means()["ndcg@5"] > 0.9 > 0.5 > before.means()["ndcg@5"]
    again = LambdaRank(k=5, rounds=60, min_leaf=5).fit(found, features, relevance)
    np.testing.assert_array_equal(again.recommend(found, features, 5)[1], scores)
    # Equal features give equal scores: then the smaller item comes first.
    flat, _ = model.recommend(found, np.zeros_like(features), 5)
    assert (np.diff(flat, axis=1) > 0).all()
    with pytest.raises(ValueError, match="relevance: got no relevant candidate"):
        LambdaRank().fit(found, features, 0 * relevance)
    with pytest.raises(ValueError, match=r"features: got shape \(3, 2\), needs"):
        model.recommend(found, np.zeros((3, 2)), 5)
    with pytest.raises(ValueError, match="got recommend before fit"):
        LambdaRank().recommend(found, features, 5)
