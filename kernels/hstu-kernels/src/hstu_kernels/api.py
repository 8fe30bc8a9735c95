"""The public functions: contract, checks, choice of backend."""

import operator

import torch
from torch import Tensor

from hstu_kernels import ops
from hstu_kernels.dispatch import check_backend
from hstu_kernels.problem import Problem, check_static


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
    num_contextual: int | Tensor = 0,
    max_attn_len: int = 0,
    min_full_attn_len: int = 0,
    position_weight: Tensor | None = None,
    timestamps: Tensor | None = None,
    time_weight: Tensor | None = None,
    time_shift: int = 0,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend within each sequence of a packed batch.

    S_ij = alpha * q_i·k_j + bias_ij; out_i = sum over j of mask_ij * SiLU(S_ij) / divisor_i * v_j. All of it happens
    tile by tile, so that memory is linear in the number of rows, and so do the gradients of q, k, v and both tables.

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
        num_contextual: int or [B], that many first rows see all rows that are not targets. Where they and the targets
            are more rows than the sequence has, its rows see themselves only, as in generative-recommenders.
        max_attn_len: rows further apart than this do not see each other; 0 for no window.
        min_full_attn_len: that many last rows before the targets, and the targets, ignore the window; 0 for none.
        position_weight: table [1 or H, 2*N - 1] with N >= max_seqlen; bias += position_weight[h, N - 1 + (j - i)].
        timestamps: int64 seconds [T].
        time_weight: table [1 or H, K + 1]; bias += time_weight[h, min(floor(ln(max(|dt|, 1)) / 0.301), K)] with
            dt = ts[i + time_shift] - ts[j].
        time_shift: 0, or 1 for the time of the next row, as the published model has it (the last row keeps its own).
        dropout: probability with which a weight is dropped; those kept are divided by 1 - dropout.
        seed: of the dropout, drawn from torch's generator when None. A seed drops the same weights on every backend.
        backend: "reference", "cpu", "triton" or "cuda"; None picks the fastest that can run these tensors.

    Returns:
        out [Tq, H, Dv] in the dtype of q.

    Raises:
        ValueError: an argument breaks its contract; the message names it, what it got and what it needs.
        RuntimeError: the backend asked for cannot run on this machine; the message says why.

    Source: Zhai et al., "Actions Speak Louder than Words" (2024), eq. 2 and 3; masks as in generative-recommenders.
    """
    check_backend(backend)
    if isinstance(num_contextual, int):
        if num_contextual < 0:
            raise ValueError(f"num_contextual: got {num_contextual}, needs 0 or more")
        contextual = offsets.new_full((max(offsets.shape[0] - 1, 0),), num_contextual) if num_contextual else None
    else:
        contextual = num_contextual
    if not isinstance(max_seqlen, (int, torch.SymInt)):
        try:
            max_seqlen = operator.index(max_seqlen)
        except TypeError:
            raise ValueError(f"max_seqlen: got {max_seqlen!r}, needs an integer") from None
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, needs 64 bits with a sign")
    if dropout == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64)
    elif isinstance(seed, int):
        seed = torch.tensor(seed, dtype=torch.int64)
    elif not seed.is_floating_point():
        seed = seed.to(torch.int64)
    problem = Problem(
        q=q,
        k=k,
        v=v,
        offsets=offsets,
        q_offsets=q_offsets,
        num_targets=num_targets,
        num_contextual=contextual,
        position_weight=position_weight,
        timestamps=timestamps,
        time_weight=time_weight,
        row_divisor=divisor if isinstance(divisor, Tensor) else None,
        seed=seed,
        max_seqlen=max_seqlen,
        alpha=float(max(q.shape[-1], 1) ** -0.5 if alpha is None else alpha),
        divisor=1.0 if isinstance(divisor, Tensor) else float(max(max_seqlen, 1) if divisor is None else divisor),
        causal=causal,
        max_attn_len=max_attn_len,
        min_full_attn_len=min_full_attn_len,
        time_shift=time_shift,
        dropout=float(dropout),
    )
    check_static(problem)
    return ops.attention(problem, backend)
