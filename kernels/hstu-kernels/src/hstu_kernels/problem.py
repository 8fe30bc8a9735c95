"""One attention problem as every backend sees it, and the checks that it must pass."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """Arguments of ``hstu_attention`` with the defaults filled in; field for field the schema of the registered op."""

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    q_offsets: Tensor | None
    num_targets: Tensor | None
    num_contextual: Tensor | None
    position_weight: Tensor | None
    timestamps: Tensor | None
    time_weight: Tensor | None
    row_divisor: Tensor | None
    seed: Tensor | None
    bias: Tensor | None
    block_table: Tensor | None
    max_seqlen: int
    alpha: float
    divisor: float
    causal: bool
    max_attn_len: int
    min_full_attn_len: int
    target_group_size: int
    time_shift: int
    dropout: float

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def keys(self) -> Tensor:
        """k as rows [., H, Dqk]; of pages, those of one page after another."""
        return self.k.flatten(0, -3)

    @property
    def values(self) -> Tensor:
        """v as rows [., H, Dv]."""
        return self.v.flatten(0, -3)

    @cached_property
    def slots(self) -> Tensor | None:
        """Where the packed rows of k and v lie within ``keys`` and ``values``, int64 [T]; None without pages."""
        if self.block_table is None:
            return None
        batch, position = positions(self.offsets, self.offsets)
        size = self.k.shape[1]
        return self.block_table.long()[batch, position // size] * size + position % size

    @cached_property
    def bias_begin(self) -> Tensor:
        """First entry of each sequence within a head's line of the bias, int64 [B]."""
        lengths = self.offsets.long().diff()
        sizes = lengths * (lengths if self.q_offsets is None else self.q_offsets.long().diff())
        return sizes.cumsum(0) - sizes

    def gathered(self) -> "Problem":
        """The same problem with packed k and v instead of pages."""
        return replace(self, k=self.keys[self.slots], v=self.values[self.slots], block_table=None)

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 for all others."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


def positions(offsets: Tensor, q_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sequence [Tq] of each query row and its position [Tq] in there, both int64.

    Args:
        offsets: int32 or int64 [B + 1] of the keys.
        q_offsets: int32 or int64 [B + 1] of the queries, the last rows of each sequence.
    """
    offsets, q_offsets = offsets.long(), q_offsets.long()
    rows = int(q_offsets[-1])
    numbers = torch.arange(len(offsets) - 1, device=offsets.device)
    batch = numbers.repeat_interleave(q_offsets.diff(), output_size=rows)
    row = torch.arange(rows, device=offsets.device)
    return batch, row - q_offsets[1:][batch] + offsets.diff()[batch]


def check_static(p: Problem) -> None:
    """Check what needs no look at tensor contents: ranks, shapes, dtypes, devices, scalars.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    _check_rank("q", p.q)
    if p.block_table is not None:
        _check_pages(p)
    rows, heads, width = p.q.shape
    _need(p.q.dtype in DTYPES, lambda: f"q: got dtype {p.q.dtype}, needs float32, float64, bfloat16 or float16")
    _need(heads >= 1 and width >= 1, lambda: f"q: got shape {list(p.q.shape)}, needs a head or more, a column or more")
    _check_like_q("k", p.k, p.q, p.block_table is not None)
    _check_like_q("v", p.v, p.q, p.block_table is not None)
    _need(p.k.shape[-1] == width, lambda: f"k: got width {p.k.shape[-1]}, needs the width of q, {width}")
    _need(p.v.shape[0] == p.k.shape[0], lambda: f"v: got {p.v.shape[0]} rows, needs as many rows as k, {p.k.shape[0]}")
    check_integers("offsets", p.offsets, p.q.device)
    _need(p.offsets.shape[0] >= 1, lambda: "offsets: got no element, needs batch + 1 elements")
    batch = p.offsets.shape[0] - 1
    if p.q_offsets is None and p.block_table is None:
        _need(rows == p.k.shape[0], lambda: f"q: got {rows} rows, needs as many as k, {p.k.shape[0]}, or q_offsets")
    if p.q_offsets is not None:
        check_integers("q_offsets", p.q_offsets, p.q.device, batch + 1)
    if p.num_targets is not None:
        check_integers("num_targets", p.num_targets, p.q.device, batch)
    if p.num_contextual is not None:
        check_integers("num_contextual", p.num_contextual, p.q.device, batch)
    _need(p.max_seqlen >= 0, lambda: f"max_seqlen: got {p.max_seqlen}, needs a length of at least 0")
    _need(p.max_attn_len >= 0, lambda: f"max_attn_len: got {p.max_attn_len}, needs 0 (no window) or more")
    _need(p.min_full_attn_len >= 0, lambda: f"min_full_attn_len: got {p.min_full_attn_len}, needs 0 or more")
    _need(
        p.target_group_size >= 1, lambda: f"target_group_size: got {p.target_group_size}, needs 1 (each alone) or more"
    )
    _need(
        p.target_group_size == 1 or p.causal,
        lambda: f"target_group_size: got {p.target_group_size} and causal=False, needs causal=True",
    )
    _need(p.time_shift in (0, 1), lambda: f"time_shift: got {p.time_shift}, needs 0 or 1")
    _need(0.0 <= p.dropout < 1.0, lambda: f"dropout: got {p.dropout}, needs a probability in [0, 1)")
    _need(-math.inf < p.alpha < math.inf, lambda: f"alpha: got {p.alpha:g}, needs a finite number")
    _need(0.0 < abs(p.divisor) < math.inf, lambda: f"divisor: got {p.divisor:g}, needs a finite number other than 0")
    if p.seed is not None:
        kind = p.seed.dtype
        _need(kind == torch.int64, lambda: f"seed: got dtype {kind}, needs an integer (int64)")
    if p.row_divisor is not None:
        found = p.row_divisor
        _need(found.device == p.q.device, lambda: f"divisor: got device {found.device}, needs that of q, {p.q.device}")
        _need(
            found.dim() == 1 and found.shape[0] == rows,
            lambda: f"divisor: got shape {list(found.shape)}, needs [{rows}], the rows of q",
        )
        _need(
            not found.requires_grad,
            lambda: "divisor: got a tensor that requires grad, needs a constant tensor (detach it)",
        )
    if p.position_weight is not None:
        _check_table(p, "position_weight", p.position_weight)
        size = p.position_weight.shape[1]
        _need(
            size % 2 == 1 and size >= 2 * p.max_seqlen - 1,
            lambda: (
                f"position_weight: got width {size}, needs an odd width 2*N-1 with N >= max_seqlen ({p.max_seqlen}), "
                f"so at least {max(2 * p.max_seqlen - 1, 1)}"
            ),
        )
    if p.time_weight is not None:
        _check_table(p, "time_weight", p.time_weight)
        _need(p.time_weight.shape[1] >= 1, lambda: "time_weight: got width 0, needs width K+1 with K >= 0")
        if p.timestamps is None:
            raise ValueError("timestamps: got None, needs int64 seconds [T] because time_weight is given")
    if p.timestamps is not None:
        check_timestamps(p.timestamps, None if p.block_table is not None else p.k.shape[0], p.q.device)
    if p.bias is not None:
        _check_table(p, "bias", p.bias)


def check_tensor(name: str, x: object) -> None:
    """Check that an argument is a tensor at all.

    Args:
        name: of the argument.
        x: what was given.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    _need(isinstance(x, Tensor), lambda: f"{name}: got a {type(x).__name__}, needs a tensor")


def check_whole(name: str, x: Any) -> Any:
    """Return an integer argument as it is, or as int where it is another kind of integer.

    Args:
        name: of the argument.
        x: what was given.

    Raises:
        ValueError: it is no integer; names the argument, what it got and what it needs.
    """
    if isinstance(x, (int, torch.SymInt)):
        return x
    try:
        return operator.index(x)
    except TypeError:
        raise ValueError(f"{name}: got {x!r}, needs an integer") from None


def check_number(name: str, x: Any) -> float:
    """Return a number as float.

    Args:
        name: of the argument.
        x: what was given.

    Raises:
        ValueError: it is none; names the argument, what it got and what it needs.
    """
    try:
        return float(x)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: got a {type(x).__name__}, needs a number") from None


def check_timestamps(x: Tensor, rows: int | None, device: torch.device) -> None:
    """Check type, shape and device of timestamps [rows]; with ``rows`` None the contents must tell.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    _need(isinstance(x, Tensor), lambda: f"timestamps: got a {type(x).__name__}, needs a tensor of int64 seconds")
    _need(x.dtype == torch.int64, lambda: f"timestamps: got dtype {x.dtype}, needs int64 seconds")
    _need(
        x.dim() == 1 and (rows is None or x.shape[0] == rows),
        lambda: f"timestamps: got shape {list(x.shape)}, needs {_rows_of_k(rows)}",
    )
    _need(x.device == device, lambda: f"timestamps: got device {x.device}, needs the device of q, {device}")


def check_contents(p: Problem) -> None:
    """Check the integers: offsets, lengths, targets, contextual rows. Runs inside the op, where tracing never sees it.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    offsets = p.offsets.tolist()
    if p.block_table is None:
        lengths = check_offsets("offsets", offsets, p.k.shape[0], "k and v")
    else:
        lengths = check_offsets("offsets", offsets)
        _check_block_table(p, lengths)
    if lengths and max(lengths) > p.max_seqlen:
        b = lengths.index(max(lengths))
        raise ValueError(f"offsets: sequence {b} has length {lengths[b]}, needs at most max_seqlen, {p.max_seqlen}")
    if p.q_offsets is not None:
        new = check_offsets("q_offsets", p.q_offsets.tolist(), p.q.shape[0], "q")
        for b, (rows, length) in enumerate(zip(new, lengths, strict=True)):
            if rows > length:
                raise ValueError(f"q_offsets: sequence {b} has {rows} rows of q, needs at most its {length} rows of k")
    elif p.block_table is not None and offsets[-1] != p.q.shape[0]:
        raise ValueError(f"q: got {p.q.shape[0]} rows, needs as many as offsets say, {offsets[-1]}, or q_offsets")
    if p.row_divisor is not None and not bool((p.row_divisor != 0).all() & p.row_divisor.isfinite().all()):
        raise ValueError("divisor: got a zero or a number that is not finite, needs finite numbers other than 0")
    if p.bias is not None:
        new = lengths if p.q_offsets is None else p.q_offsets.diff().tolist()
        size = sum(rows * length for rows, length in zip(new, lengths, strict=True))
        if p.bias.shape[1] != size:
            raise ValueError(
                f"bias: got width {p.bias.shape[1]}, needs {size}, the sum of query rows times keys over the sequences"
            )
    if p.num_targets is not None:
        for b, (count, length) in enumerate(zip(p.num_targets.tolist(), lengths, strict=True)):
            if not 0 <= count <= length:
                raise ValueError(f"num_targets: got {count} for sequence {b}, needs between 0 and its length {length}")
    if p.num_contextual is not None and p.num_contextual.numel() and int(p.num_contextual.min()) < 0:
        raise ValueError(f"num_contextual: got {int(p.num_contextual.min())}, needs 0 or more")


def check_offsets(name: str, offsets: list[int], total: int | None = None, of: str = "") -> list[int]:
    """Return the lengths of the sequences; ``total`` is the number of rows ``of`` something, None where nobody knows.

    Raises:
        ValueError: the offsets do not start at 0, fall, or do not end at the number of rows.
    """
    if offsets[0] != 0:
        raise ValueError(f"{name}: got {offsets[0]} as first element, needs 0")
    lengths = [after - before for before, after in pairwise(offsets)]
    for b, length in enumerate(lengths):
        if length < 0:
            fall = f"a fall from {offsets[b]} to {offsets[b + 1]} at index {b + 1}"
            raise ValueError(f"{name}: got {fall}, needs a sequence that never falls")
    if total is not None and offsets[-1] != total:
        raise ValueError(f"{name}: got {offsets[-1]} as last element, needs the number of rows of {of}, {total}")
    return lengths


def check_integers(name: str, x: Tensor, device: torch.device, length: int | None = None) -> None:
    """Check that a tensor holds integers in one dimension on this device.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    _need(isinstance(x, Tensor), lambda: f"{name}: got a {type(x).__name__}, needs a tensor of int32 or int64")
    _need(x.dtype in (torch.int32, torch.int64), lambda: f"{name}: got dtype {x.dtype}, needs int32 or int64")
    _need(x.dim() == 1, lambda: f"{name}: got shape {list(x.shape)}, needs one dimension")
    _need(x.device == device, lambda: f"{name}: got device {x.device}, needs the device of q, {device}")
    if length is not None:
        _need(
            x.shape[0] == length,
            lambda: f"{name}: got {x.shape[0]} elements, needs {length}, given the length of offsets",
        )


def _check_pages(p: Problem) -> None:
    _check_pool("k", p.k)
    _check_pool("v", p.v)
    _need(
        p.v.shape[1] == p.k.shape[1],
        lambda: f"v: got pages of {p.v.shape[1]} rows, needs those of k, {p.k.shape[1]}",
    )
    table = p.block_table
    _need(
        isinstance(table, Tensor) and table.dtype in (torch.int32, torch.int64) and table.dim() == 2,
        lambda: f"block_table: got {_kind(table)}, needs int32 or int64 [batch, pages of a sequence]",
    )
    assert table is not None
    batch = p.offsets.shape[0] - 1
    _need(table.shape[0] == batch, lambda: f"block_table: got {table.shape[0]} rows, needs one a sequence, {batch}")
    _need(table.device == p.q.device, lambda: f"block_table: got device {table.device}, needs that of q, {p.q.device}")


def _check_pool(name: str, x: Tensor) -> None:
    _need(
        x.dim() == 4 and x.shape[1] >= 1,
        lambda: f"{name}: got shape {list(x.shape)}, needs [pages, rows of a page, heads, width] with a block_table",
    )


def _check_block_table(p: Problem, lengths: list[int]) -> None:
    assert p.block_table is not None
    size, pages = p.k.shape[1], p.k.shape[0]
    needed = [-(-length // size) for length in lengths]
    if needed and max(needed) > p.block_table.shape[1]:
        b = needed.index(max(needed))
        raise ValueError(
            f"block_table: got {p.block_table.shape[1]} pages a sequence, needs {needed[b]} for the "
            f"{lengths[b]} rows of sequence {b}"
        )
    for b, (row, count) in enumerate(zip(p.block_table.tolist(), needed, strict=True)):
        for page in row[:count]:
            if not 0 <= page < pages:
                raise ValueError(f"block_table: got page {page} for sequence {b}, needs 0 to {pages - 1}")
    if p.timestamps is not None and p.timestamps.shape[0] != sum(lengths):
        raise ValueError(f"timestamps: got {p.timestamps.shape[0]} rows, needs as many as offsets say, {sum(lengths)}")


def _rows_of_k(rows: int | None) -> str:
    return "one dimension" if rows is None else f"[{rows}], the rows of k"


def _kind(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def _check_rank(name: str, x: Tensor) -> None:
    _need(x.dim() == 3, lambda: f"{name}: got shape {list(x.shape)}, needs three dimensions [rows, heads, width]")


def _check_like_q(name: str, x: Tensor, q: Tensor, paged: bool) -> None:
    if not paged:
        _check_rank(name, x)
    heads = q.shape[1]
    _need(x.dtype == q.dtype, lambda: f"{name}: got dtype {x.dtype}, needs the dtype of q, {q.dtype}")
    _need(x.shape[-2] == heads, lambda: f"{name}: got {x.shape[-2]} heads, needs as many heads as q, {heads}")
    _need(x.device == q.device, lambda: f"{name}: got device {x.device}, needs the device of q, {q.device}")


def _check_table(p: Problem, name: str, table: Tensor) -> None:
    heads = p.q.shape[1]
    _need(isinstance(table, Tensor), lambda: f"{name}: got a {type(table).__name__}, needs a tensor [1 or H, width]")
    _need(table.device == p.q.device, lambda: f"{name}: got device {table.device}, needs that of q, {p.q.device}")
    _need(
        table.dim() == 2 and table.shape[0] in (1, heads),
        lambda: f"{name}: got shape {list(table.shape)}, needs [1, width] or [{heads}, width]",
    )
    _need(
        table.dtype in (p.q.dtype, p.compute_dtype),
        lambda: f"{name}: got dtype {table.dtype}, needs {p.q.dtype} (as q) or {p.compute_dtype}",
    )


def _need(ok: bool, message: Callable[[], str]) -> None:
    # The message is made only when it is needed: torch.compile cannot put a symbolic size into a text.
    if not ok:
        raise ValueError(message())
