"""The few collective operations the package needs; each is the identity in a single process."""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes of the default group; 1 when there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over processes, as a new tensor without a graph."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_reduce_mean(values: Tensor) -> Tensor:
    """The mean over processes, as a new tensor without a graph."""
    return all_reduce_sum(values) / world_size()
