"""Every ranker against plain code on tiny data, and the contract they share."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_array

from rankers import EASE, IALS, TIFUKNN, UPCF, Interactions, ItemKNN, LogisticMF, Popularity, RepeatItems, TopFreq
from rankers.baskets import baskets
from rankers.ranker import top_items

DAY = 86_400
MAKERS = {
    "popularity": Popularity,
    "repeat": RepeatItems,
    "knn": lambda: ItemKNN(neighbours=4),
    "ials": lambda: IALS(factors=4, iterations=3),
    "lmf": lambda: LogisticMF(factors=4, iterations=3),
    "ease": lambda: EASE(l2=2.0),
    "g": lambda: TopFreq("g"),
    "p": lambda: TopFreq("p"),
    "gp": lambda: TopFreq("gp"),
    "upcf": lambda: UPCF(recency=2),
    "tifu": lambda: TIFUKNN(neighbours=3, groups=3),
}


def draw(seed, n=60, users=8, items=7, days=9):
    rng = np.random.default_rng(seed)
    return Interactions(
        rng.integers(users - 1, size=n), rng.integers(items - 1, size=n), rng.integers(days, size=n) * DAY, users, items
    )


def by_hand(scores, k):
    """Python's own sort: by falling score, then by item."""
    order = sorted((item for item, s in enumerate(scores) if s > -math.inf), key=lambda item: (-scores[item], item))[:k]
    return order + [-1] * (k - len(order))


def dense(ranker, users, items):
    """Scores of all items, from lists as long as the catalogue; -inf where an item is in no list."""
    found, scores = ranker.recommend(users, items)
    result = np.full((len(users), items), -np.inf)
    rows, places = np.nonzero(found >= 0)
    result[rows, found[rows, places]] = scores[rows, places]
    return result


@pytest.mark.parametrize("seed", range(6))
def test_the_best_items_come_in_order_and_ties_by_number(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(3, size=(5, 8)).astype(float)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    for k in (1, 3, 8, 12):
        items, best = top_items(scores, k)
        for row in range(5):
            assert items[row].tolist() == by_hand(scores[row].tolist(), k)
            assert best[row].tolist() == [scores[row, i] if i >= 0 else -np.inf for i in items[row]]
    with pytest.raises(ValueError, match="scores: got NaN"):
        top_items(np.array([[np.nan]]), 1)


@pytest.mark.parametrize("name", MAKERS)
def test_the_contract(name, monkeypatch):
    data = draw(1)
    ranker = MAKERS[name]()
    with pytest.raises(ValueError, match="got recommend before fit"):
        ranker.recommend([0], 3)
    assert ranker.fit(data) is ranker
    users = np.array([3, 0, 7, 3])
    items, scores = ranker.recommend(users, 5)
    assert items.shape == scores.shape == (4, 5) and items.dtype == np.int64
    assert np.array_equal(items[0], items[3]) and (np.diff(scores[scores[:, -1] > -np.inf]) <= 0).all()
    assert ((items >= 0) == (scores > -np.inf)).all()
    # The order of the events and the size of a block change nothing.
    order = np.random.default_rng(0).permutation(len(data))
    shuffled = Interactions(data.user[order], data.item[order], data.time[order], data.num_users, data.num_items)
    again = MAKERS[name]().fit(shuffled)
    monkeypatch.setattr("rankers.ranker.BLOCK_BYTES", 1)
    np.testing.assert_array_equal(again.recommend(users, 5)[0], items)
    # Items that nobody had, and users who did nothing, are no reason for a recommendation.
    if name != "ease":
        assert 6 not in items
    if name not in ("popularity", "g", "gp"):
        assert (items[2] == -1).all()
    hidden = data.matrix()
    fresh, _ = ranker.recommend(users, 7, exclude=hidden)
    longer, _ = ranker.recommend(users, 7)
    for row, user in enumerate(users):
        own = set(hidden.indices[hidden.indptr[user] : hidden.indptr[user + 1]].tolist())
        kept = [i for i in longer[row].tolist() if i >= 0 and i not in own]
        assert fresh[row].tolist() == kept + [-1] * (7 - len(kept))


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_to_learn_from_gives_empty_lists(name):
    none = np.zeros(0, np.int64)
    ranker = MAKERS[name]().fit(Interactions(none, none, none, 3, 4))
    assert (ranker.recommend([0, 2], 2)[0] == -1).all()


def test_what_does_not_fit_is_refused():
    ranker = Popularity().fit(draw(0))
    with pytest.raises(ValueError, match=r"users: got .* needs \[U\] in 0 \.\. 7"):
        ranker.recommend([8], 2)
    with pytest.raises(ValueError, match="k: got 0, needs 1 or more"):
        ranker.recommend([0], 0)
    with pytest.raises(ValueError, match=r"exclude: got shape \(2, 2\), needs \(8, 7\)"):
        ranker.recommend([0], 1, exclude=csr_array((2, 2)))
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match=r"item: got 5 \.\. 5, needs 0 \.\. 4"):
        Interactions(one, one + 5, one, 1, 5)
    with pytest.raises(ValueError, match="time: got float64, needs whole numbers"):
        Interactions(one, one, one + 0.5, 1, 5)
    with pytest.raises(ValueError, match="weight: got a negative"):
        Interactions(one, one, one, 1, 5, weight=one - 1.0)
    with pytest.raises(ValueError, match=r"weight: got shape \(2,\), needs that of user, \(1,\)"):
        Interactions(one, one, one, 1, 5, weight=np.ones(2))
    with pytest.raises(ValueError, match="half_life: got 0"):
        Popularity(0)
    with pytest.raises(ValueError, match="mode: got 'pg', needs one of g, p, gp"):
        TopFreq("pg")
    with pytest.raises(ValueError, match=r"EASE: got 7 items, needs at most max_items = 6 .*take ItemKNN or IALS"):
        EASE(max_items=6).fit(draw(0))


def test_event_types_are_weighed_and_those_of_weight_zero_left_out():
    one = np.array([0, 0, 1])
    data = Interactions(one, one, one, 2, 2, weight=np.array([1.0, 2.0, 1.0]), event=np.array([0, 1, 2]))
    weighed = data.weighted({0: 1.0, 1: 10.0, 2: 0.0})
    assert weighed.weights.tolist() == [1.0, 20.0] and weighed.matrix().toarray().tolist() == [[21.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match=r"weights: got none for event types \[2\]"):
        data.weighted({0: 1.0, 1: 1.0})
    with pytest.raises(ValueError, match="event: got None"):
        replace(data, event=None).weighted({})
    assert len(data.before(1)) == 2


def test_popularity_and_repeats_halve_with_age():
    data = draw(2)
    newest = data.time.max()
    total, own = np.zeros(7), np.zeros((8, 7))
    for user, item, time in zip(data.user, data.item, data.time, strict=True):
        weight = 0.5 ** ((newest - time) / (2 * DAY))
        total[item] += weight
        own[user, item] += weight
    users = np.arange(8)
    found = dense(Popularity(2 * DAY).fit(data), users, 7)
    np.testing.assert_allclose(found, np.where(total > 0, total, -np.inf)[None].repeat(8, 0))
    np.testing.assert_allclose(dense(RepeatItems(2 * DAY).fit(data), users, 7), np.where(own > 0, own, -np.inf))
    plain = dense(Popularity(None).fit(data), users[:1], 7)[0]
    assert plain[:6].tolist() == np.bincount(data.item, minlength=6).tolist()


def test_item_neighbours_are_bm25s():
    data = draw(3)
    counts = data.matrix().toarray()
    # Items are the documents, users the terms.
    idf = math.log(7) - np.log1p((counts > 0).sum(1, keepdims=True))
    length = 0.25 + 0.75 * counts.sum(0) / counts.sum(0).mean()
    weighted = np.where(counts > 0, counts * 2.2 / (1.2 * length + counts) * idf, 0.0)
    expected = counts @ (weighted.T @ weighted)
    found = dense(ItemKNN(neighbours=7).fit(data), np.arange(8), 7)
    np.testing.assert_allclose(found, np.where(expected > 1e-12, expected, -np.inf), rtol=1e-6)


def test_ease_is_ridge_regression_of_each_item_on_the_others():
    data = draw(4)
    x = (data.matrix().toarray() > 0).astype(float)
    weights = np.zeros((7, 7))
    for item in range(7):
        rest = [i for i in range(7) if i != item]
        gram = x[:, rest].T @ x[:, rest] + 2.0 * np.eye(6)
        weights[rest, item] = np.linalg.solve(gram, x[:, rest].T @ x[:, item])
    found = dense(EASE(l2=2.0).fit(data), np.arange(7), 7)
    np.testing.assert_allclose(found, x[:7] @ weights, atol=1e-10)


def test_ials_solves_its_equations():
    data = draw(5, n=40)
    ranker = IALS(factors=3, regularization=0.5, alpha=2.0, iterations=60).fit(data)
    weights = data.matrix().toarray()
    for item in range(6):
        confidence = np.where(weights[:, item] > 0, 2.0 * weights[:, item], 1.0)
        x = ranker.user_factors
        solved = np.linalg.solve(
            (x.T * confidence) @ x + 0.5 * np.eye(3), x.T @ np.where(weights[:, item] > 0, confidence, 0)
        )
        np.testing.assert_allclose(ranker.item_factors[item], solved, atol=2e-3)


@pytest.mark.parametrize("make", [lambda s: IALS(4, seed=s), lambda s: LogisticMF(4, iterations=50, seed=s)])
def test_factors_find_the_checkerboard_and_repeat_their_seed(make):
    # Even users take even items, odd ones odd: what is held out is the other item of the kind.
    pairs = np.array([(u, i) for u in range(12) for i in range(10) if (u + i) % 2 == 0 and i != u % 10])
    data = Interactions(pairs[:, 0], pairs[:, 1], np.zeros(len(pairs), np.int64), 12, 10)
    items, scores = make(1).fit(data).recommend(np.arange(10), 1, exclude=data.matrix())
    assert items[:, 0].tolist() == list(range(10))
    np.testing.assert_array_equal(make(1).fit(data).recommend(np.arange(10), 1, exclude=data.matrix())[1], scores)


def history(data):
    """Baskets of each user, old to new, as sets."""
    return [
        [set(data.item[(data.user == u) & (data.time == t)].tolist()) for t in sorted(set(data.time[data.user == u]))]
        for u in range(data.num_users)
    ]


def test_baskets_are_distinct_items_of_a_time():
    data = draw(6)
    user, item, place = baskets(data)
    found = [[set() for _ in past] for past in history(data)]
    for u, i, p in zip(user, item, place, strict=True):
        assert i not in found[u][p]
        found[u][p].add(i)
    assert found == history(data)


def test_frequencies_by_hand():
    data = draw(7)
    own = np.array([[sum(i in basket for basket in past) for i in range(7)] for past in history(data)], float)
    total = own.sum(0)
    for user in range(8):
        lists = {mode: TopFreq(mode).fit(data).recommend([user], 7)[0][0].tolist() for mode in ("g", "p", "gp")}
        taken = [i for i in range(7) if total[i]]
        rest = lambda found: found + [-1] * (7 - len(found))  # noqa: E731
        assert lists["g"] == rest(sorted(taken, key=lambda i: (-total[i], i)))
        mine = [i for i in taken if own[user, i]]
        assert lists["p"] == rest(sorted(mine, key=lambda i: (-own[user, i], i)))
        assert lists["gp"] == rest(sorted(taken, key=lambda i: (-own[user, i], -total[i], i)))


@pytest.mark.parametrize("recency", [1, 3, None])
def test_upcf_is_its_formula(recency):
    data, a, q = draw(8), 0.25, 2.0
    past = history(data)
    sets = [set().union(*p) if p else set() for p in past]
    expected = np.zeros((8, 7))
    for u in range(8):
        for v in range(8):
            if sets[u] and sets[v]:
                s = len(sets[u] & sets[v]) / (len(sets[u]) ** a * len(sets[v]) ** (1 - a))
                last = past[v][-recency:] if recency else past[v]
                for i in range(7):
                    expected[u, i] += s**q * sum(i in basket for basket in last) / len(last)
    found = dense(UPCF(recency, a, q).fit(data), np.arange(8), 7)
    np.testing.assert_allclose(found, np.where(expected > 0, expected, -np.inf))


@pytest.mark.parametrize(("groups", "among"), [(3, None), (4, [1, 2, 5, 7]), (20, None)])
def test_tifu_is_its_formula(groups, among):
    data, rb, rg, alpha, k = draw(9, n=90), 0.9, 0.7, 0.6, 3
    past = history(data)
    vectors = np.zeros((8, 7))
    for u, mine in enumerate(past):
        n = len(mine)
        if not n:
            continue
        hot = np.array([[float(i in basket) for i in range(7)] for basket in mine])
        hot *= rb ** (n - 1 - np.arange(n))[:, None]
        sizes = [1] * n if n < groups else [n // groups] * (groups - n % groups) + [n // groups + 1] * (n % groups)
        edges = np.r_[0, np.cumsum(sizes)]
        for g in range(len(sizes)):
            vectors[u] += rg ** (groups - 1 - g) * hot[edges[g] : edges[g + 1]].mean(0) / len(sizes)
    pool = [u for u in range(8) if past[u] and (among is None or u in among)]
    expected = np.zeros((8, 7))
    for u in range(8):
        others = sorted((v for v in pool if v != u), key=lambda v: (((vectors[u] - vectors[v]) ** 2).sum(), v))[:k]
        expected[u] = alpha * vectors[u] + (1 - alpha) * vectors[others].mean(0)
    ranker = TIFUKNN(k, rb, rg, alpha, groups, among).fit(data)
    users = np.array([u for u in range(8) if past[u]])
    np.testing.assert_allclose(
        dense(ranker, users, 7), np.where(expected > 0, expected, -np.inf)[users], rtol=1e-9, atol=1e-12
    )
