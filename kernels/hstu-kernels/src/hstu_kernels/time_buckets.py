"""The edges of the time buckets as integers, computed once from float64, so that all backends agree to the last row."""

import math
from functools import cache

import torch
from torch import Tensor

# Natural-log width of a bucket in the published model (generative-recommenders, research/modeling/sequential/hstu.py).
LOG_WIDTH = 0.301
NEVER = 2**63 - 1


@cache
def bucket_edges(last_bucket: int, device: torch.device) -> Tensor:
    """Return the int64 edges [last_bucket] between the buckets floor(ln(max(|dt|, 1)) / 0.301) of ``|dt|`` seconds.

    Edge ``b - 1`` is the least ``|dt|`` of bucket ``b``; a bucket is the number of edges that are not above ``|dt|``.
    Edges beyond int64 are 2**63 - 1.
    """
    edges = [_first_in(bucket) for bucket in range(1, last_bucket + 1)]
    return torch.tensor(edges, dtype=torch.int64, device=device)


def _first_in(bucket: int) -> int:
    low, high = 1, NEVER
    while low < high:
        middle = (low + high) // 2
        if math.floor(math.log(middle) / LOG_WIDTH) >= bucket:
            high = middle
        else:
            low = middle + 1
    return low
