"""Time differences, and the edges of their buckets as integers from float64: all backends agree to the last row."""

import math
from functools import cache

import torch
from torch import Tensor

# Natural-log width of a bucket in the published model (generative-recommenders, research/modeling/sequential/hstu.py).
LOG_WIDTH = 0.301
NEVER = 2**63 - 1
# Differences beyond int64 count as this, one short of the edges that int64 cannot hold.
LONGEST = NEVER - 1


@cache
def bucket_edges(last_bucket: int, device: torch.device) -> Tensor:
    """Return the int64 edges [last_bucket] between the buckets floor(ln(max(|dt|, 1)) / 0.301) of ``|dt|`` seconds.

    Edge ``b - 1`` is the least ``|dt|`` of bucket ``b``; a bucket is the number of edges that are not above ``|dt|``.
    Edges beyond int64 are 2**63 - 1.

    Args:
        last_bucket: number of the last bucket, which has no upper edge.
        device: where the edges go.
    """
    edges = [_first_in(bucket) for bucket in range(1, last_bucket + 1)]
    return torch.tensor(edges, dtype=torch.int64, device=device)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Return ``|a - b|`` of int64 seconds, at most ``LONGEST``: exact where it is smaller, and never wrapped around.

    Args:
        a: int64 seconds.
        b: int64 seconds; broadcasts with a.
    """
    wrapped = torch.maximum(a, b) - torch.minimum(a, b)
    return torch.where(wrapped < 0, LONGEST, wrapped.clamp(max=LONGEST))


def _first_in(bucket: int) -> int:
    low, high = 1, NEVER
    while low < high:
        middle = (low + high) // 2
        if math.floor(math.log(middle) / LOG_WIDTH) >= bucket:
            high = middle
        else:
            low = middle + 1
    return low
