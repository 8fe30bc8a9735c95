"""How friendships begin and what friends do, round by round."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from synthlogs.draws import sigmoid
from synthlogs.friends.people import DAY, People
from synthlogs.settings import FriendsConfig

ACTIONS = ("friend_request", "accept", "message", "like", "comment")
REQUEST, ACCEPT, MESSAGE, LIKE, COMMENT = range(5)
REASONS = ("friend of a friend", "community", "region", "anyone")
FRIEND_OF_FRIEND, COMMUNITY, REGION, ANYONE = range(4)
ROUNDS = 24
CANDIDATES = 8

Events = dict[str, NDArray]


class Network:
    """The friendships so far, and who has asked whom; a round adds to both."""

    def __init__(self, people: People, config: FriendsConfig) -> None:
        self.people, self.config, self.users = people, config, config.users
        self.asked = np.zeros(0, np.int64)
        self.source = np.zeros(0, np.int32)
        self.target = np.zeros(0, np.int32)
        self.starts = np.zeros(self.users + 1, np.int64)
        self.waiting: list[Events] = []

    def rounds(self) -> Iterator[tuple[Events, Events]]:
        """Yield for every round its events, and the friendships its requests lead to."""
        edges = np.linspace(0, self.config.days * DAY, ROUNDS + 1).astype(np.int64)
        for number, (begin, end) in enumerate(pairwise(edges.tolist())):
            rng = np.random.default_rng([self.config.seed, 1, number])
            self._begin(begin)
            request = self._requests(begin, end, rng)
            friendship = self._answers(request, rng)
            self.waiting.append(friendship)
            yield _together([*self._events(request, friendship, rng), *self._chat(begin, end, rng)]), friendship

    def _begin(self, now: int) -> None:
        """Friendships that have been accepted by now are known from here on."""
        known = [{name: column[one["second"] < now] for name, column in one.items()} for one in self.waiting]
        self.waiting = [
            {name: column[one["second"] >= now] for name, column in one.items()}
            for one in self.waiting
            if len(one["second"])
        ]
        ends = [
            np.concatenate([one[name] for one in known]) if known else np.zeros(0, int) for name in ("actor", "target")
        ]
        source, target = np.concatenate([self.source, *ends]), np.concatenate([self.target, *ends[::-1]])
        order = np.argsort(source, kind="stable")
        self.source, self.target = source[order].astype(np.int32), target[order].astype(np.int32)
        self.starts = np.searchsorted(self.source, np.arange(self.users + 1))

    def _requests(self, begin: int, end: int, rng: np.random.Generator) -> Events:
        people = self.people
        here = people.joined <= begin
        actor = np.repeat(np.arange(self.users), rng.poisson(people.sociability * self.config.requests / ROUNDS * here))
        target, reason = self._wanted(actor, rng)
        pair = np.minimum(actor, target) * self.users + np.maximum(actor, target)
        pair, first = np.unique(pair, return_index=True)
        place = np.minimum(np.searchsorted(self.asked, pair), len(self.asked) - 1)
        new = self.asked[place] != pair if len(self.asked) else np.ones(len(pair), bool)
        new &= (actor != target)[first] & here[target[first]]
        self.asked = np.sort(np.concatenate([self.asked, pair[new]]))
        kept = np.sort(first[new])
        second = begin + (rng.random(len(kept)) * (end - begin)).astype(np.int64)
        return {"second": second, "actor": actor[kept], "target": target[kept], "reason": reason[kept]}

    def _wanted(self, actor: NDArray, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Whom each actor [n] asks, and why."""
        people, kind = self.people, rng.random(len(actor))
        through = self._friend(self._friend(actor, rng), rng)
        close = np.where(kind < 0.7, rng.random(len(actor)), (kind - 0.7) / 0.3)
        reason = np.searchsorted([0.8, 0.94], close, side="right") + COMMUNITY
        community, region = people.community[actor], people.region[actor]
        first = np.select(
            [reason == COMMUNITY, reason == REGION], [people.first[community], people.region_first[region]], 0
        )
        size = np.select(
            [reason == COMMUNITY, reason == REGION], [people.size[community], people.region_size[region]], self.users
        )
        best, liked = actor.copy(), np.full(len(actor), -np.inf)
        for _ in range(CANDIDATES):
            candidate = first + (rng.random(len(actor)) * size).astype(np.int64)
            likes = people.closeness(actor, candidate) + rng.gumbel(0.0, 0.1, len(actor))
            better = (likes > liked) & (candidate != actor)
            best, liked = np.where(better, candidate, best), np.where(better, likes, liked)
        # The other end of a friend's friendship may be oneself.
        closed = (kind < 0.7) & (through >= 0) & (through != actor)
        return np.where(closed, through, best), np.where(closed, FRIEND_OF_FRIEND, reason)

    def _friend(self, user: NDArray, rng: np.random.Generator) -> NDArray[np.int64]:
        """A friend of each user [n], or -1 for who has none or is none."""
        degree = np.where(user >= 0, self.starts[user + 1] - self.starts[user], 0)
        at = self.starts[user] + (rng.random(len(user)) * degree).astype(np.int64)
        found = np.full(len(user), -1)
        some = degree > 0
        found[some] = self.target[at[some]]
        return found

    def _answers(self, request: Events, rng: np.random.Generator) -> Events:
        odds = 1.2 + self.people.closeness(request["actor"], request["target"])
        odds += 0.8 * (request["reason"] == FRIEND_OF_FRIEND)
        second = request["second"] + 60 + rng.exponential(1.5 * DAY, len(odds)).astype(np.int64)
        kept = (rng.random(len(odds)) < sigmoid(odds)) & (second < self.config.days * DAY)
        return {name: column[kept] for name, column in (request | {"second": second}).items()}

    def _events(self, request: Events, friendship: Events, rng: np.random.Generator) -> list[Events]:
        """The requests, what they followed and what followed them."""
        likes = (rng.random(len(request["actor"])) < 0.3) * rng.integers(1, 3, len(request["actor"]))
        of = np.repeat(np.arange(len(likes)), likes)
        actor, target, second = (request[name][of] for name in ("actor", "target", "second"))
        before = second - 60 - rng.exponential(DAY, len(of)).astype(np.int64)
        there = before >= np.maximum(self.people.joined[actor], self.people.joined[target])
        return [
            _events(REQUEST, request["actor"], request["target"], request["second"]),
            _events(ACCEPT, friendship["target"], friendship["actor"], friendship["second"]),
            _events(LIKE, actor[there], target[there], before[there]),
        ]

    def _chat(self, begin: int, end: int, rng: np.random.Generator) -> list[Events]:
        """What friends do with one another in the round."""
        edge = rng.integers(0, max(1, len(self.source)), rng.poisson(0.12 * len(self.source)))
        actor, target = self.source[edge].astype(np.int64), self.target[edge].astype(np.int64)
        kept = rng.random(len(edge)) < np.exp(self.people.closeness(actor, target))
        actor, target = actor[kept], target[kept]
        second = begin + (rng.random(len(actor)) * (end - begin)).astype(np.int64)
        action = np.array([MESSAGE, LIKE, COMMENT])[np.searchsorted([0.5, 0.85], rng.random(len(actor)), side="right")]
        answered = (action == MESSAGE) & (rng.random(len(actor)) < 0.6)
        later = second[answered] + 60 + rng.exponential(3 * 3600, int(answered.sum())).astype(np.int64)
        return [
            _events(action, actor, target, second),
            _events(MESSAGE, target[answered], actor[answered], later),
        ]


def _events(action: NDArray | int, actor: NDArray, target: NDArray, second: NDArray) -> Events:
    return {"second": second, "actor": actor, "action": np.broadcast_to(action, actor.shape), "target": target}


def _together(parts: list[Events]) -> Events:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
