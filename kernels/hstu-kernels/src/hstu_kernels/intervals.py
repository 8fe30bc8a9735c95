"""The masks of the op as intervals of keys for each query row, as kernels that walk over tiles want them."""

import torch
from torch import Tensor

from hstu_kernels.problem import Problem, positions


def row_intervals(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return int32 ``lo``, ``hi``, ``own`` [Tq]: row i sees the keys lo <= j < hi of its sequence, and own <= j <= i.

    ``own`` is i itself but for targets in groups, who see those before them in their group.

    Ids as in the published mask: contextual rows share id 0, targets share ``last_id``, the history counts up between
    them, so that every condition on ids is an interval of positions.

    Args:
        p: a checked problem; offsets, targets, contextual rows and windows are what counts.
    """
    n = p.offsets.long().diff()
    batch, at = positions(p.offsets, p.offsets if p.q_offsets is None else p.q_offsets)

    def by_row(x: Tensor | None) -> Tensor | int:
        return 0 if x is None else x.long()[batch]

    n = n[batch]
    contextual, targets = torch.as_tensor(by_row(p.num_contextual), device=p.q.device), by_row(p.num_targets)
    first = (contextual - 1).clamp(min=0)
    last_id = n - first - targets
    row_id = (at - first).clamp(min=0).minimum(last_id)

    def begin_of(least: Tensor) -> Tensor:
        """Least position whose id is not below ``least``."""
        position = torch.where(least > last_id, n, (least + first).minimum(n))
        return position.where(least > last_id.clamp(max=0), torch.zeros_like(n))

    windowed = torch.full_like(n, p.max_attn_len > 0, dtype=torch.bool)
    if p.min_full_attn_len:
        windowed = windowed & (row_id < last_id - p.min_full_attn_len)
    low = torch.where(windowed, begin_of(row_id - p.max_attn_len), 0)
    high = begin_of(row_id)
    if not p.causal:
        history = begin_of(last_id)
        above = torch.where(windowed, begin_of(row_id + p.max_attn_len + 1).minimum(history), history)
        after = begin_of(row_id + 1)
        # A history row sees both sides, contextual rows have nothing on their left, targets nothing on their right.
        alone = (after == at + 1) & (high == at)
        right_only = ~alone & (high <= low)
        low = torch.where(right_only, after, low)
        high = torch.where(alone, above.maximum(after), torch.where(right_only, above, high))
    if p.num_contextual is not None:
        whole = (contextual > 0) & (row_id == 0) & (last_id > 0)
        low = torch.where(whole, 0, low)
        high = torch.where(whole, high.maximum(begin_of(last_id)), high)
    before = at - (n - targets)
    own = torch.where(before < 0, at, at - before % p.target_group_size)
    return low.int(), high.maximum(low).int(), own.int()
