"""Scores of a query against its own list of items, without ever holding the gathered item vectors [N, S, D]."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Gathered bytes at a time: what stays in a CPU cache without too many turns; more where launches cost more than copies.
CHUNK_BYTES = {"cpu": 1 << 22}
CHUNK_BYTES_DEVICE = 1 << 26


def gather_dot(queries: Tensor, table: Tensor, items: Tensor) -> Tensor:
    """s[n, j] = queries[n] . table[items[n, j]], in the wider of both dtypes (at least float32).

    The forward gathers a cache-sized piece at a time; the backward is two weighted embedding bags (for the table after
    sorting the item numbers), so memory is O(N S + N D + I D) in both directions and the result is deterministic on
    CPU.

    :param queries: [N, D].
    :param table: item vectors [I, D].
    :param items: rows of the table [N, S], int64.
    :return: scores [N, S].
    :raises ValueError: when shapes do not fit.
    """
    if queries.dim() != 2 or table.dim() != 2 or queries.shape[1] != table.shape[1]:
        raise ValueError(f"queries [N, D] and table [I, D] must fit, got {tuple(queries.shape)}, {tuple(table.shape)}")
    if items.dim() != 2 or len(items) != len(queries):
        raise ValueError(f"items must be [{len(queries)}, S], got {tuple(items.shape)}")
    with torch.autocast(queries.device.type, enabled=False):
        scores: Tensor = _GatherDot.apply(queries, table, items)
    return scores


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, table: Tensor, items: Tensor) -> Tensor:
        ctx.save_for_backward(queries, table, items)
        dtype = _working_dtype(queries, table)
        (n, d), s = queries.shape, items.shape[1]
        scores = torch.empty(n, s, dtype=dtype, device=queries.device)
        budget = CHUNK_BYTES.get(queries.device.type, CHUNK_BYTES_DEVICE)
        step = max(1, budget // max(1, s * d * scores.element_size()))
        for first in range(0, n, step):
            piece = items[first : first + step]
            vectors = table.index_select(0, piece.reshape(-1)).to(dtype).view(len(piece), s, d)
            query = queries[first : first + step].to(dtype)[:, :, None]
            torch.bmm(vectors, query, out=scores[first : first + step][:, :, None])
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        queries, table, items = ctx.saved_tensors
        dtype, s = grad.dtype, items.shape[1]
        if not items.numel():
            return torch.zeros_like(queries), torch.zeros_like(table), None
        grad_queries = grad_table = None
        with torch.autocast(queries.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                bags = F.embedding_bag(items, table.to(dtype), per_sample_weights=grad.contiguous(), mode="sum")
                grad_queries = bags.to(queries.dtype)
            if ctx.needs_input_grad[1]:
                # One bag for each item: the (row, grad) pairs in which it occurs.
                flat = items.reshape(-1)
                order = flat.to(torch.int32).argsort(stable=True)
                counts = torch.bincount(flat, minlength=len(table))
                starts = counts.cumsum(0) - counts
                weights = grad.reshape(-1)[order]
                bags = F.embedding_bag(order // s, queries.to(dtype), starts, per_sample_weights=weights, mode="sum")
                grad_table = bags.to(table.dtype)
        return grad_queries, grad_table, None


def _working_dtype(queries: Tensor, table: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(queries.dtype, table.dtype), torch.float32)
