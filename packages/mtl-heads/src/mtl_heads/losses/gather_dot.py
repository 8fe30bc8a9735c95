"""Scores of a query against its own list of items, without ever holding the gathered item vectors [N, S, D]."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Gathered bytes at a time where pieces are gathered.
CHUNK_BYTES = 1 << 26


def gather_dot(queries: Tensor, table: Tensor, items: Tensor) -> Tensor:
    """s[n, j] = queries[n] . table[items[n, j]], in the wider of both dtypes (at least float32).

    The forward multiplies vector by vector (on a CPU) or gathers a piece at a time; the backward is two weighted
    embedding bags (for the table after sorting the item numbers), so memory is O(N S + N D + I D) in both directions
    and the result is deterministic on CPU. One operator to ``torch.compile``, forward and backward.

    Args:
        queries: [N, D].
        table: item vectors [I, D].
        items: rows of the table [N, S], int64.

    Returns:
        Scores [N, S].

    Raises:
        ValueError: When shapes do not fit.
        IndexError: On an item that is no row of the table (on CUDA a device assert).
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
    wide = queries.to(dtype), table.to(dtype)
    if not items.numel():
        return torch.zeros(items.shape, dtype=dtype, device=items.device)
    with torch.autocast(queries.device.type, enabled=False):
        return (_one_by_one if queries.device.type == "cpu" else _in_pieces)(*wide, items)


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
    return grad.new_empty(items.shape[0], table.shape[1])


@torch.library.custom_op("mtl_heads::gather_dot_table", mutates_args=())
def _table_gradient(grad: Tensor, queries: Tensor, items: Tensor, rows: int) -> Tensor:
    """One bag for each item: the (row, grad) pairs in which it occurs."""
    if not items.numel():
        return torch.zeros(rows, queries.shape[1], dtype=grad.dtype, device=grad.device)
    flat, s = items.reshape(-1), items.shape[1]
    order = flat.to(torch.int32).argsort(stable=True)
    counts = torch.bincount(flat, minlength=rows)
    weights = grad.reshape(-1).index_select(0, order)
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
        grad_table = _table_gradient(grad, queries, items, table.shape[0]).to(table.dtype)
    return grad_queries, grad_table, None


def _one_by_one(queries: Tensor, table: Tensor, items: Tensor) -> Tensor:
    """What an embedding bag's gradient for its weights is: each bag's query times each of its vectors."""
    low, high = items.aminmax()
    if low < 0 or high >= len(table):
        raise IndexError(f"items: got {int(low)} .. {int(high)}, needs rows of the table, 0 .. {len(table) - 1}")
    n, s = items.shape
    starts, bags = torch.arange(0, n * s, s), torch.arange(n).repeat_interleave(s)
    scores = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        queries, table, items.reshape(-1), starts, bags, 0
    )
    return scores.view(n, s)


def _in_pieces(queries: Tensor, table: Tensor, items: Tensor, budget: int = CHUNK_BYTES) -> Tensor:
    """Gather and multiply, so many vectors at a time that launches cost less than copies."""
    (n, d), s = queries.shape, items.shape[1]
    scores = torch.empty(n, s, dtype=queries.dtype, device=queries.device)
    step = max(1, budget // (s * d * scores.element_size()))
    for first in range(0, n, step):
        piece = items[first : first + step]
        vectors = table.index_select(0, piece.reshape(-1)).view(len(piece), s, d)
        torch.bmm(vectors, queries[first : first + step, :, None], out=scores[first : first + step, :, None])
    return scores


_forward.register_autograd(_backward, setup_context=_keep)


def _working_dtype(queries: Tensor, table: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(queries.dtype, table.dtype), torch.float32)
