"""The public functions: contract, checks, choice of backend."""

import torch
from torch import Tensor

from hstu_kernels import ops
from hstu_kernels.dispatch import check_backend, refuse_transforms
from hstu_kernels.problem import Problem, check_integers, check_number, check_static, check_tensor, check_whole


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_seqlen: int,
    *,
    q_offsets: Tensor | None = None,
    alpha: float | None = None,
    divisor: float | Tensor | None = None,
    causal: bool = True,
    num_targets: Tensor | None = None,
    target_group_size: int = 1,
    num_contextual: int | Tensor = 0,
    max_attn_len: int = 0,
    min_full_attn_len: int = 0,
    position_weight: Tensor | None = None,
    timestamps: Tensor | None = None,
    time_weight: Tensor | None = None,
    time_shift: int = 0,
    bias: Tensor | None = None,
    block_table: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend within each sequence of a packed batch.

    S_ij = alpha * q_i·k_j + bias_ij; out_i = sum over j of mask_ij * SiLU(S_ij) / divisor_i * v_j. All of it happens
    tile by tile, so that memory is linear in the number of rows, and so do the gradients of q, k, v and both tables.
    There are first derivatives only, and no ``torch.func`` transforms.

    Args:
        q: queries [Tq, H, Dqk], float32, float64, bfloat16 or float16.
        k: keys [T, H, Dqk].
        v: values [T, H, Dv].
        offsets: int32 or int64 [B + 1], rows of sequence b are offsets[b]..offsets[b + 1]; empty sequences are allowed.
        max_seqlen: no sequence is longer than this.
        q_offsets: [B + 1] when q holds only the newest rows of each sequence; None when q has all T rows.
        alpha: scale of q·k, Dqk**-0.5 by default. The bias is not scaled.
        divisor: number, or constant tensor [Tq], by which the weights are divided; max_seqlen by default.
        causal: row i sees rows j <= i; otherwise all rows that are not targets.
        num_targets: [B], that many last rows of a sequence are targets: each sees the history and itself, and no other
            row sees it, causal or not.
        target_group_size: targets come in groups of that many, each of which also sees those before it in its group.
        num_contextual: int or [B], that many first rows see all rows that are not targets. Where they and the targets
            are more rows than the sequence has, its rows see themselves only, as in generative-recommenders.
        max_attn_len: rows further apart than this do not see each other; 0 for no window.
        min_full_attn_len: that many last rows before the targets, and the targets, ignore the window; 0 for none.
        position_weight: table [1 or H, 2*N - 1] with N >= max_seqlen; bias += position_weight[h, N - 1 + (j - i)].
        timestamps: int64 seconds [T].
        time_weight: table [1 or H, K + 1]; bias += time_weight[h, min(floor(ln(max(|dt|, 1)) / 0.301), K)] with
            dt = ts[i + time_shift] - ts[j].
            A difference beyond int64 counts as 2**63 - 2 seconds.
        time_shift: 0, or 1 for the time of the next row, as the published model has it (the last row keeps its own).
        bias: [1 or H, P], any further bias, as long as the pairs of a query row and a key of its sequence: those of
            sequence 0 row by row, [m_0, n_0] with m_0 query rows and n_0 keys, then those of sequence 1, and so on.
            P is the sum of m_b * n_b. It has a gradient, which is 0 where the mask hides a pair. Not on "cuda".
        block_table: int32 or int64 [B, pages of a sequence], for k [pages, rows of a page, H, Dqk] and v that lie in
            pages: row r of sequence b is row r % size of page block_table[b, r // size]. What stands behind a
            sequence's last page is not looked at. Not on "cuda".
        dropout: probability with which a weight is dropped; those kept are divided by 1 - dropout.
        seed: of the dropout, drawn from torch's generator when None. A seed drops the same weights on every backend.
        backend: "reference", "cpu", "triton" or "cuda"; None picks the fastest that can run these tensors.

    Returns:
        out [Tq, H, Dv] in the dtype of q.

    Raises:
        ValueError: an argument breaks its contract; the message names it, what it got and what it needs.
        NotImplementedError: called inside of ``torch.func.grad``, ``vmap`` and the like; or, in backward, a second
            derivative is asked for.
        RuntimeError: the backend asked for cannot run on this machine; the message says why.

    Source: Zhai et al., "Actions Speak Louder than Words" (2024), eq. 2 and 3; masks as in generative-recommenders.
    """
    check_backend(backend)
    refuse_transforms("hstu_attention", q, k, v, position_weight, time_weight, bias)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    check_integers("offsets", offsets, q.device)
    max_seqlen = check_whole("max_seqlen", max_seqlen)
    problem = Problem(
        q=q,
        k=k,
        v=v,
        offsets=offsets,
        q_offsets=q_offsets,
        num_targets=num_targets,
        num_contextual=_per_sequence("num_contextual", num_contextual, offsets),
        position_weight=position_weight,
        timestamps=timestamps,
        time_weight=time_weight,
        row_divisor=divisor if isinstance(divisor, Tensor) else None,
        seed=_seed(seed, dropout),
        bias=bias,
        block_table=block_table,
        max_seqlen=max_seqlen,
        alpha=max(q.shape[-1], 1) ** -0.5 if alpha is None else check_number("alpha", alpha),
        divisor=_constant_divisor(divisor, max_seqlen),
        causal=bool(causal),
        max_attn_len=check_whole("max_attn_len", max_attn_len),
        min_full_attn_len=check_whole("min_full_attn_len", min_full_attn_len),
        target_group_size=check_whole("target_group_size", target_group_size),
        time_shift=check_whole("time_shift", time_shift),
        dropout=check_number("dropout", dropout),
    )
    check_static(problem)
    return ops.attention(problem, backend)


def _per_sequence(name: str, count: int | Tensor, offsets: Tensor) -> Tensor | None:
    if isinstance(count, Tensor):
        return count
    number: int = check_whole(name, count)
    if number < 0:
        raise ValueError(f"{name}: got {number}, needs 0 or more")
    return offsets.new_full((max(offsets.shape[0] - 1, 0),), number) if number else None


def _constant_divisor(divisor: float | Tensor | None, max_seqlen: int) -> float:
    if isinstance(divisor, Tensor):
        return 1.0
    return float(max(max_seqlen, 1)) if divisor is None else check_number("divisor", divisor)


def _seed(seed: int | Tensor | None, dropout: float) -> Tensor | None:
    """The seed as a scalar int64 tensor; None where nothing is dropped."""
    if seed is not None and not isinstance(seed, Tensor):
        seed = check_whole("seed", seed)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: got {seed}, needs 64 bits with a sign")
    if dropout == 0.0:
        return None
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64)
    if not isinstance(seed, Tensor):
        return torch.tensor(seed, dtype=torch.int64)
    if seed.numel() != 1 or seed.is_floating_point():
        raise ValueError(f"seed: got dtype {seed.dtype} and shape {list(seed.shape)}, needs one integer")
    return seed.to(torch.int64).reshape(())
