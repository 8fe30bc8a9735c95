"""Judge the network beside the baselines that usually win: one cutoff, the whole catalogue, the same users for all.

RUN/compare.md          one row a ranker: NDCG@10 with its interval, the difference to the best baseline, slices
    metrics.json        all of it
    plots/calibration.png
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rankers
from purchase.config import Config
from purchase.features import pair_features
from purchase.network import Recommender
from purchase.prepare import FIRST, PACKAGES, Prepared, open_prepared
from purchase.ranking import NetworkRanker, excluded
from purchase.train import load_network
from rankers import Evaluation, Interactions, LambdaRank, Popularity, Ranker, union
from rankers.evaluate import bootstrap
from runkit.compare import markdown_table, text_table
from runkit.files import atomic_file
from runkit.plots import calibration
from runkit.progress import progress
from runkit.run import Run

KS = (5, 10, 20)
MAIN = "ndcg@10"
DAY = 86_400
log = logging.getLogger("purchase")


def evaluate(config: Config) -> str:
    """Write ``compare.md`` and ``metrics.json``; return the table."""
    run = Run(config.run_dir)
    with run.command("evaluate", config, PACKAGES) as facts:
        prepared = open_prepared(config)
        network = load_network(config, prepared)
        judged = Judged(config, prepared)
        facts |= {"users": len(judged.users), "users_without_history": judged.strangers}
        lists, chances = ranked(config, prepared, network, judged.users)
        found = {name: judged.of(one) for name, one in lists.items()}
        rows = table(found, judged.share)
        run.add_metrics("evaluate", {"rankers": _metrics(found), **facts})
        with atomic_file(run.folder / "compare.md") as path:
            path.write_text(markdown_table(rows))
        hits = judged.hits(lists["network"][:, :10])
        title = "Of users who buy: do they buy what is listed?"
        calibration(run.plots / "calibration.png", chances.ravel(), hits.ravel(), title)
    return text_table(rows)


class Judged:
    """Who bought what in the target window.

    Args:
        config: all settings
        prepared: the log
    """

    def __init__(self, config: Config, prepared: Prepared) -> None:
        self.rows, self.items, self.strangers = prepared.targets(prepared.split.test_start, prepared.split.target)
        self.users = np.unique(self.rows)
        # Of all users known before the cutoff.
        self.share = len(self.users) / len(prepared.history())
        if not len(self.users):
            raise ValueError(
                f"split: got no {prepared.split.target} after the cutoff by a user known before it, needs one"
            )
        if 0 < config.evaluate.judged < len(self.users):
            drawn = np.random.default_rng(config.seed).permutation(self.users)
            self.users = np.sort(drawn[: config.evaluate.judged])
        past = interactions(prepared, None)
        own = np.isin(past.user, self.users)
        # For cold items it is enough that somebody had them, who is judged or not.
        anybody = np.unique(past.item)
        self.seen = (np.r_[past.user[own], np.full(len(anybody), -1)], np.r_[past.item[own], anybody])

    def of(self, lists: NDArray[np.int64]) -> Evaluation:
        """Every metric of lists [U, K]."""
        return rankers.evaluate(self.users, lists, self.rows, self.items, KS, seen=self.seen)

    def hits(self, lists: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each listed item was bought [U, K]."""
        bought = {(int(user), int(item)) for user, item in zip(self.rows, self.items, strict=True)}
        pairs = ((int(u), int(i)) for u, line in zip(self.users, lists, strict=True) for i in line)
        return np.array([pair in bought for pair in pairs]).reshape(lists.shape)


def ranked(
    config: Config, prepared: Prepared, network: Recommender, users: NDArray[np.int64]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.float64]]:
    """The lists [U, 20] of every ranker, and the network's chance of each of its first ten [U, 10].

    Where a ranker knows no further candidate the list goes on with the most popular items.
    """
    k, split = max(KS), prepared.split
    exclude = excluded(prepared.history(), config.rules.exclude, prepared.num_items)
    fitted = fit_rankers(config, prepared, network, None)
    popular = Popularity(config.evaluate.half_life_days * DAY).fit(interactions(prepared, None, config))
    spare, _ = popular.recommend(users, 2 * k, exclude)
    lists = {}
    for name, ranker in progress(fitted.items(), "rank", "ranker"):
        lists[name], _ = ranker.recommend(users, k, exclude)
    if config.evaluate.rerank:
        before = fit_rankers(config, prepared, network, split.valid_start)
        hidden = excluded(prepared.history(split.valid_start), config.rules.exclude, prepared.num_items)
        rows, items, _ = prepared.targets(split.valid_start, split.target)
        known = prepared.history(split.valid_start).lengths() > 0
        taught = np.unique(rows[known[rows]])
        if len(taught):
            for name, without in (("rerank", set()), ("rerank without network", {"network"})):
                sources = [one for one in before if one not in without]
                model = _Reranker(config, prepared, sources)
                if model.fit(before, taught, rows, items, hidden):
                    lists[name] = model.recommend(fitted, users, exclude)
    return {name: filled(one, spare) for name, one in lists.items()}, _chances(
        fitted["network"], users, lists["network"][:, :10]
    )


def fit_rankers(config: Config, prepared: Prepared, network: Recommender, moment: int | None) -> dict[str, Ranker]:
    """The network and every baseline with what is known at a moment (the cutoff if None)."""
    settings, past = config.evaluate, interactions(prepared, moment, config)
    half_life = settings.half_life_days * DAY
    makers: dict[str, Any] = {
        "popularity": lambda: Popularity(half_life),
        "repeat": lambda: rankers.RepeatItems(half_life),
        "knn": rankers.ItemKNN,
        "ials": lambda: rankers.IALS(settings.factors, seed=config.seed),
        "lmf": lambda: rankers.LogisticMF(settings.factors, seed=config.seed),
        "ease": rankers.EASE,
    }
    found: dict[str, Ranker] = {
        "network": NetworkRanker(network, prepared.history(moment), config.split.target, config.model.max_len)
    }
    for name in progress(settings.rankers, "fit", "ranker"):
        log.info("fitting %s", name)
        found[name] = makers[name]().fit(past)
    return found


def interactions(prepared: Prepared, moment: int | None, config: Config | None = None) -> Interactions:
    """What is known at a moment (the cutoff if None), weighed by the kinds of events where a config is given."""
    view = prepared.history(moment)
    past = view.gather(["item_id", "event_type", "timestamp"])
    found = Interactions(
        user=np.repeat(np.arange(len(view)), view.lengths()),
        item=past["item_id"].astype(np.int64) - FIRST,
        time=past["timestamp"],
        num_users=len(view),
        num_items=prepared.num_items,
        event=past["event_type"].astype(np.int64) - FIRST,
    )
    return found if config is None else found.weighted(dict(enumerate(config.evaluate.event_weights)))


def filled(lists: NDArray[np.int64], spare: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lists [U, K] whose empty places hold the spare items [U, 2 K] that they lack, in their order."""
    wide = np.concatenate([lists, spare], 1)
    row = np.arange(len(wide))[:, None]
    order = np.lexsort((np.broadcast_to(np.arange(wide.shape[1]), wide.shape), wide), axis=1)
    ordered = wide[row, order]
    again = np.zeros(wide.shape, bool)
    again[row, order] = np.c_[np.zeros(len(wide), bool), ordered[:, 1:] == ordered[:, :-1]]
    first = np.argsort(again | (wide < 0), axis=1, kind="stable")[:, : lists.shape[1]]
    return np.where((again | (wide < 0))[row, first], -1, wide[row, first])


def table(found: dict[str, Evaluation], share: float) -> list[dict[str, Any]]:
    """One row a ranker, best first; the difference is to the best baseline, of the same users.

    Args:
        found: the rankers
        share: of all users, those with a target
    """
    baselines = [name for name in found if name != "network" and not name.startswith("rerank")]
    best = max(baselines, key=lambda name: found[name].means()[MAIN]) if baselines else None
    rows = []
    for name, one in sorted(found.items(), key=lambda pair: -pair[1].means()[MAIN]):
        means = one.means()
        row: dict[str, Any] = {"ranker": name, MAIN: means[MAIN], "95 %": _interval(one.interval(MAIN))}
        if best is not None and name != best:
            row[f"less {best}"] = _interval(bootstrap(one.minus(found[best], MAIN)))
        row |= {metric: means[metric] for metric in ("recall@10", "mrr@10")}
        row |= {
            f"{part}, {int(one.means(part)['users'])} users": one.means(part)[MAIN]
            for part in ("repeat", "new", "cold")
        }
        row["all users"] = means[MAIN] * share
        rows.append({key: None if value != value else value for key, value in row.items()})
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


class _Reranker:
    """Trees over the candidates of some rankers, learnt on the validation window."""

    def __init__(self, config: Config, prepared: Prepared, sources: list[str]) -> None:
        self.config, self.prepared, self.sources = config, prepared, sources
        self.model = LambdaRank(rounds=config.evaluate.rounds, seed=config.seed)

    def fit(self, fitted: dict[str, Ranker], users: Any, rows: Any, items: Any, exclude: Any) -> bool:
        """Learn from who bought what; False where no candidate was bought."""
        candidates, features = self._candidates(fitted, users, exclude, self.prepared.split.valid_start)
        relevance = candidates.relevance(rows, items)
        if not relevance.any():
            log.warning("no candidate of the validation window was bought: nothing to learn a re-ranker from")
            return False
        self.model.fit(candidates, features, relevance)
        return True

    def recommend(self, fitted: dict[str, Ranker], users: Any, exclude: Any) -> NDArray[np.int64]:
        candidates, features = self._candidates(fitted, users, exclude, self.prepared.split.test_start)
        return self.model.recommend(candidates, features, max(KS))[0]

    def _candidates(self, fitted: dict[str, Ranker], users: Any, exclude: Any, moment: int) -> Any:
        chosen = {name: (fitted[name], self.config.evaluate.candidates) for name in self.sources}
        candidates = union(chosen, users, exclude)
        past = interactions(self.prepared, moment)
        return candidates, np.c_[
            candidates.features(), pair_features(past, candidates, self.prepared, -(-moment // 1_000_000))
        ]


def _chances(ranker: Any, users: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.float64]:
    """The network's softmax over the catalogue at items [U, K], 0 where there is none [U, K]."""
    found = np.zeros(items.shape)
    for first in range(0, len(users), 500):
        here = slice(first, first + 500)
        scores = ranker._scores(users[here])
        chance = np.exp(scores - scores.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        found[here] = np.take_along_axis(chance, np.maximum(items[here], 0), 1)
    return np.where(items >= 0, found, 0.0)


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.4f} .. {interval[1]:.4f}"


def _metrics(found: dict[str, Evaluation]) -> dict[str, Any]:
    return {
        name: {part: one.means(part) for part in one.values} | {"interval": {MAIN: list(one.interval(MAIN))}}
        for name, one in found.items()
    }
