"""The keep mask of attention dropout: a hash of (seed, head, row, column), the same in every backend and direction."""

from typing import TypeVar

from torch import Tensor

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)
MASK32 = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


def keep_threshold(dropout: float) -> int:
    """Return the 32-bit threshold: a weight is kept where its hash is not below it.

    Args:
        dropout: probability of dropping a weight.
    """
    return min(round(dropout * 2**32), MASK32)


def keep_mask(seed: Tensor, dropout: float, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return True where a weight is kept; head, row and col broadcast.

    Args:
        seed: int64 scalar.
        dropout: probability of dropping a weight.
        head: head index.
        row: row of the query in the packed k, so that a cached call and a full one drop the same weights.
        col: position of the key in its sequence.

    Returns:
        bool, in the shape that head, row and col broadcast to.

    The mixer is the 32-bit finaliser found by the hash-prospector search (two multiplications, bias 0.17).
    """
    key = _mix((seed_key(int(seed)) + head * GOLDEN) & MASK32)
    key = _mix((key + row) & MASK32)
    return _mix(key ^ ((col * GOLDEN) & MASK32)) >= keep_threshold(dropout)


def seed_key(seed: int) -> int:
    """Return the 32 bits that all heads start from."""
    return _mix(_mix(seed & MASK32) ^ ((seed >> 32) & MASK32))


def _mix(x: IntOrTensor) -> IntOrTensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)
