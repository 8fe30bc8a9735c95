"""Scores of a query against its own list of items, without ever holding the gathered item vectors [N, S, D]."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Gathered bytes at a time: what stays in a CPU cache without too many turns; more where launches cost more than copies.
CHUNK_BYTES = {"cpu": 1 << 22}
CHUNK_BYTES_DEVICE = 1 << 26


def gather_dot(queries: Tensor, table: Tensor, items: Tensor) -> Tensor:
    """s[n, j] = queries[n] . table[items[n, j]], in the wider of both dtypes (at least float32).

    The forward gathers a cache-sized piece at a time; the backward is two weighted embedding bags (for the table after
    sorting the item numbers), so memory is O(N S + N D + I D) in both directions and the result is deterministic on
    CPU. One operator to ``torch.compile``, forward and backward.

    Args:
        queries: [N, D].
        table: item vectors [I, D].
        items: rows of the table [N, S], int64.

    Returns:
        Scores [N, S].

    Raises:
        ValueError: When shapes do not fit.
    """
    if queries.dim() != 2 or table.dim() != 2 or queries.shape[1] != table.shape[1]:
        raise ValueError(f"queries [N, D] and table [I, D] must fit, got {tuple(queries.shape)}, {tuple(table.shape)}")
    if items.dim() != 2 or len(items) != len(queries):
        raise ValueError(f"items must be [{len(queries)}, S], got {tuple(items.shape)}")
    scores: Tensor = _forward(queries, table, items)
    return scores


@torch.library.custom_op("mtl_heads::gather_dot", mutates_args=())
def _forward(queries: Tensor, table: Tensor, items: Tensor) -> Tensor:
    dtype = _working_dtype(queries, table)
    (n, d), s = queries.shape, items.shape[1]
    scores = torch.empty(n, s, dtype=dtype, device=queries.device)
    budget = CHUNK_BYTES.get(queries.device.type, CHUNK_BYTES_DEVICE)
    step = max(1, budget // max(1, s * d * scores.element_size()))
    with torch.autocast(queries.device.type, enabled=False):
        for first in range(0, n, step):
            piece = items[first : first + step]
            vectors = table.index_select(0, piece.reshape(-1)).to(dtype).view(len(piece), s, d)
            query = queries[first : first + step].to(dtype)[:, :, None]
            torch.bmm(vectors, query, out=scores[first : first + step][:, :, None])
    return scores


@_forward.register_fake
def _(queries: Tensor, table: Tensor, items: Tensor) -> Tensor:
    return queries.new_empty(items.shape, dtype=_working_dtype(queries, table))


@torch.library.custom_op("mtl_heads::gather_dot_queries", mutates_args=())
def _queries_gradient(grad: Tensor, table: Tensor, items: Tensor) -> Tensor:
    if not items.numel():
        return torch.zeros(len(items), table.shape[1], dtype=grad.dtype, device=grad.device)
    with torch.autocast(grad.device.type, enabled=False):
        return F.embedding_bag(items, table.to(grad.dtype), per_sample_weights=grad.contiguous(), mode="sum")


@_queries_gradient.register_fake
def _(grad: Tensor, table: Tensor, items: Tensor) -> Tensor:
    return grad.new_empty(len(items), table.shape[1])


@torch.library.custom_op("mtl_heads::gather_dot_table", mutates_args=())
def _table_gradient(grad: Tensor, queries: Tensor, items: Tensor, rows: int) -> Tensor:
    """One bag for each item: the (row, grad) pairs in which it occurs."""
    if not items.numel():
        return torch.zeros(rows, queries.shape[1], dtype=grad.dtype, device=grad.device)
    flat, s = items.reshape(-1), items.shape[1]
    order = flat.to(torch.int32).argsort(stable=True)
    counts = torch.bincount(flat, minlength=rows)
    weights = grad.reshape(-1)[order]
    with torch.autocast(grad.device.type, enabled=False):
        return F.embedding_bag(
            order // s, queries.to(grad.dtype), counts.cumsum(0) - counts, per_sample_weights=weights, mode="sum"
        )


@_table_gradient.register_fake
def _(grad: Tensor, queries: Tensor, items: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, queries.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    queries, table, items = ctx.saved_tensors
    grad_queries = grad_table = None
    if ctx.needs_input_grad[0]:
        grad_queries = _queries_gradient(grad, table, items).to(queries.dtype)
    if ctx.needs_input_grad[1]:
        grad_table = _table_gradient(grad, queries, items, len(table)).to(table.dtype)
    return grad_queries, grad_table, None


_forward.register_autograd(_backward, setup_context=_keep)


def _working_dtype(queries: Tensor, table: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(queries.dtype, table.dtype), torch.float32)
