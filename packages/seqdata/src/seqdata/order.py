"""A shuffled order of 0..n-1 that needs no memory: position i is computed, not stored."""

from __future__ import annotations

import numpy as np

ROUNDS = 6


class Order:
    """`order(start, stop)` gives places start..stop-1 of a permutation of range(n) drawn from (seed, epoch).

    A Feistel network over the next power of four, walked until it falls inside n (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002). Without shuffle the order is 0, 1, 2, ...
    """

    def __init__(self, n: int, seed: int, epoch: int, shuffle: bool) -> None:
        self.n, self.shuffle = n, shuffle
        self.half = max((max(n - 1, 1).bit_length() + 1) // 2, 1)
        self.mask = np.uint64((1 << self.half) - 1)
        self.keys = np.random.SeedSequence(
            [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, epoch & 0xFFFFFFFF]
        ).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.n

    def __call__(self, start: int, stop: int) -> np.ndarray:
        places = np.arange(start, stop, dtype=np.uint64)
        if not self.shuffle:
            return places.astype(np.int64)
        places = self._network(places)
        outside = np.flatnonzero(places >= self.n)
        while len(outside):
            places[outside] = self._network(places[outside])
            outside = outside[places[outside] >= self.n]
        return places.astype(np.int64)

    def _network(self, places: np.ndarray) -> np.ndarray:
        half = np.uint64(self.half)
        left, right = places >> half, places & self.mask
        for key in self.keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(32)
            left, right = right, left ^ (mixed & self.mask)
        return (left << half) | right
