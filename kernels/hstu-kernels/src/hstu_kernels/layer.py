"""HSTU layers on packed sequences: nn.Modules on top of ``hstu_attention``."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hstu_kernels import ops
from hstu_kernels.api import hstu_attention
from hstu_kernels.cache import CacheStep, RaggedKVCache


class HSTULayer(nn.Module):
    """LayerNorm, one projection to u, v, q, k with SiLU, jagged attention, LN(attention) * u, projection, residual.

    Args:
        d_model: width of the input and output.
        num_heads: attention heads.
        d_qk: width of q and k per head.
        d_v: width of u and v per head.
        max_seqlen: longest sequence; divisor of the attention weights and half width of the position table.
        position_bias: learn a bias for each relative position.
        time_buckets: learn a bias for this many + 1 buckets of time difference; None for no time bias.
        time_shift: 0, or 1 to measure time from the next row's timestamp (it looks ahead: right for retrieval only).
        dropout: of the gated attention output.
        attention_dropout: of the attention weights.
        recompute: keep only the layer's input and the attention output for the backward pass and compute the rest anew
            (the projection, not the attention); for memory, at the price of one projection.
        backend: passed on to ``hstu_attention``.

    Tables are shared by the heads and start at N(0, 0.02), as in the published model.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_qk: int,
        d_v: int,
        *,
        max_seqlen: int,
        position_bias: bool = True,
        time_buckets: int | None = 128,
        time_shift: int = 0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.d_qk, self.d_v = num_heads, d_qk, d_v
        self.max_seqlen, self.time_shift = max_seqlen, time_shift
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.recompute, self.backend = recompute, backend
        self.input_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.uvqk = nn.Linear(d_model, 2 * num_heads * (d_v + d_qk), bias=False)
        self.attention_norm = nn.LayerNorm(num_heads * d_v, eps=1e-6)
        self.output = nn.Linear(num_heads * d_v, d_model)
        self.position_weight = _table(2 * max_seqlen - 1) if position_bias else None
        self.time_weight = None if time_buckets is None else _table(time_buckets + 1)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        max_seqlen: int | None = None,
        timestamps: Tensor | None = None,
        cache: RaggedKVCache | None = None,
    ) -> Tensor:
        """Return the layer's output [T, d_model].

        Args:
            x: packed rows [T, d_model].
            offsets: int32 or int64 [B + 1].
            max_seqlen: bound on the lengths of this batch, at most the layer's own, which is the default.
            timestamps: int64 seconds [T]; without them the time bias is left out.
            cache: past rows of each user; x then holds only the new ones, which are appended.

        Raises:
            ValueError: as ``hstu_attention``; a cache with time_shift=1, where a row looks at the next row's time.
        """
        return _run([self], x, offsets, max_seqlen, timestamps, cache)

    def _attend(
        self,
        x: Tensor,
        offsets: Tensor,
        max_seqlen: int | None,
        timestamps: Tensor | None,
        step: CacheStep | None,
        at: int,
    ) -> Tensor:
        wide_v, wide_qk = self.num_heads * self.d_v, self.num_heads * self.d_qk
        norm = self.input_norm
        uvqk = ops.norm_project_silu(x, norm.weight, norm.bias, self.uvqk.weight, norm.eps, self.backend)
        u, v, q, k = uvqk.split([wide_v, wide_v, wide_qk, wide_qk], dim=-1)
        q, k = (y.unflatten(-1, (self.num_heads, self.d_qk)) for y in (q, k))
        v, q_offsets = v.unflatten(-1, (self.num_heads, self.d_v)), None
        if step is not None:
            k, v = step.append(at, k, v)
            offsets, q_offsets, timestamps = step.offsets, step.q_offsets, step.timestamps
        attention = hstu_attention(
            q,
            k,
            v,
            offsets,
            self.max_seqlen if max_seqlen is None else max_seqlen,
            q_offsets=q_offsets,
            divisor=self.max_seqlen,
            position_weight=self.position_weight,
            timestamps=timestamps,
            time_weight=None if timestamps is None else self.time_weight,
            time_shift=self.time_shift,
            dropout=self.attention_dropout if self.training else 0.0,
            backend=self.backend,
        ).flatten(1)
        norm = self.attention_norm
        gated = ops.norm_gate(attention, u, norm.weight, norm.bias, norm.eps, self.backend)
        gated = F.dropout(gated, self.dropout, self.training)
        return x + self.output(gated)


class HSTU(nn.Module):
    """A stack of ``HSTULayer``; each layer has its own tables.

    Args:
        num_layers: layers in the stack.
        arguments: those of ``HSTULayer``, for each of the layers.
        options: its keywords.
    """

    def __init__(self, num_layers: int, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HSTULayer(*arguments, **options) for _ in range(num_layers))

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        max_seqlen: int | None = None,
        timestamps: Tensor | None = None,
        cache: RaggedKVCache | None = None,
    ) -> Tensor:
        """Return the output of the last layer [T, d_model]; arguments as in ``HSTULayer.forward``."""
        return _run(list(self.layers), x, offsets, max_seqlen, timestamps, cache)


def _run(
    layers: list[nn.Module],
    x: Tensor,
    offsets: Tensor,
    max_seqlen: int | None,
    timestamps: Tensor | None,
    cache: RaggedKVCache | None,
) -> Tensor:
    step = None
    if cache is not None:
        if any(layer.time_shift for layer in layers):
            raise ValueError(
                "cache: got one with time_shift=1, needs time_shift=0 (a row would change with the next one)"
            )
        step = cache.begin(x, offsets, timestamps)
    for at, layer in enumerate(layers):
        assert isinstance(layer, HSTULayer)
        if layer.recompute and step is None and torch.is_grad_enabled():
            kept = partial(create_selective_checkpoint_contexts, [torch.ops.hstu_kernels.attention.default])
            x = checkpoint(
                layer._attend, x, offsets, max_seqlen, timestamps, None, at, use_reentrant=False, context_fn=kept
            )
        else:
            x = layer._attend(x, offsets, max_seqlen, timestamps, step, at)
    if step is not None:
        step.commit()
    return x


def _table(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, width).normal_(std=0.02))
