"""The users of the generated network: communities, positions, and what they say of themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synthlogs.draws import children, zipf
from synthlogs.settings import FriendsConfig

DAY = 86400
SPACE, REGIONS = 8, 12
TAGS, COMMUNITY_TAGS, INTERESTS = 500, 8, 5


@dataclass(frozen=True)
class People:
    """Users [U]; those of a community are contiguous, and so are the communities [C] of a region."""

    community: NDArray[np.int64]
    first: NDArray[np.int64]
    size: NDArray[np.int64]
    region: NDArray[np.int64]
    region_first: NDArray[np.int64]
    region_size: NDArray[np.int64]
    position: NDArray[np.float32]
    sociability: NDArray[np.float64]
    joined: NDArray[np.int64]
    identity: NDArray[np.int32]
    shown_region: NDArray[np.int64]
    age: NDArray[np.int64]
    interests: NDArray[np.int64]

    @classmethod
    def draw(cls, config: FriendsConfig, rng: np.random.Generator) -> People:
        """Draw everything about the users that does not change."""
        users = config.users
        communities = max(1, users // config.community_size)
        weight = rng.permutation(zipf(np.arange(communities), 0.8, shift=2.0))
        community = children(communities, users, rng, weight)
        size = np.bincount(community, minlength=communities)
        region = np.sort(rng.integers(0, REGIONS, communities))[community]
        region_size = np.bincount(region, minlength=REGIONS)
        centre = rng.normal(size=(communities, SPACE)).astype(np.float32)
        position = centre[community] + 0.6 * rng.normal(size=(users, SPACE)).astype(np.float32)
        late = rng.random(users) < 0.5
        tags = rng.integers(0, TAGS, (communities, COMMUNITY_TAGS))
        own = tags[community[:, None], rng.integers(0, COMMUNITY_TAGS, (users, INTERESTS))]
        sociability = np.exp(rng.normal(0.0, 1.1, users))
        return cls(
            community=community,
            first=np.cumsum(size) - size,
            size=size,
            region=region,
            region_first=np.cumsum(region_size) - region_size,
            region_size=region_size,
            position=position,
            sociability=sociability / sociability.mean(),
            joined=np.where(late, rng.random(users) * 0.8 * config.days * DAY, 0).astype(np.int64),
            identity=rng.permutation(users).astype(np.int32),
            shown_region=np.where(rng.random(users) < 0.9, region, rng.integers(0, REGIONS, users)),
            age=np.rint(rng.normal(35, 10, communities)[community] + 6 * rng.normal(size=users))
            .clip(13, 99)
            .astype(int),
            interests=np.where(rng.random(own.shape) < 0.75, own, rng.integers(0, TAGS, own.shape)),
        )

    def closeness(self, one: NDArray, other: NDArray) -> NDArray[np.float64]:
        """Return minus the squared distance / 8 of each pair of users [n]."""
        apart = self.position[one] - self.position[other]
        return -np.einsum("nk,nk->n", apart, apart).astype(np.float64) / SPACE
