"""HSTU layers on packed sequences: nn.Modules on top of ``hstu_attention``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hstu_kernels import ops
from hstu_kernels.api import hstu_attention
from hstu_kernels.cache import CacheStep, RaggedKVCache
from hstu_kernels.dispatch import refuse_transforms
from hstu_kernels.problem import check_tensor


@dataclass(frozen=True)
class _Batch:
    """What is the same for all layers of a forward pass."""

    offsets: Tensor
    max_seqlen: int | None
    timestamps: Tensor | None
    num_targets: Tensor | None
    num_contextual: int | Tensor
    step: CacheStep | None = None


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
        alpha: scale of q·k, d_qk**-0.5 by default; the published retrieval model has 1.
        max_attn_len: rows further apart than this do not see each other; 0 for no window.
        min_full_attn_len: that many last rows before the targets, and the targets, ignore the window.
        target_group_size: targets come in groups of that many, whose members see those before them.
        group_norm: norm each head of the attention by itself, with one gain and one shift a head, instead of all heads
            together.
        concat_ua: project [u, a, a * u] instead of a * u, with a the normed attention.
        dropout: of the gated attention output.
        attention_dropout: of the attention weights.
        recompute: keep only the layer's input and the attention output for the backward pass and compute the rest anew
            (the projection, not the attention); for memory, at the price of one projection.
        backend: passed on to ``hstu_attention``.
        device: of the parameters.
        dtype: of the parameters.

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
        alpha: float | None = None,
        max_attn_len: int = 0,
        min_full_attn_len: int = 0,
        target_group_size: int = 1,
        group_norm: bool = False,
        concat_ua: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        recompute: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.d_qk, self.d_v = num_heads, d_qk, d_v
        self.max_seqlen, self.time_shift, self.alpha = max_seqlen, time_shift, alpha
        self.max_attn_len, self.min_full_attn_len = max_attn_len, min_full_attn_len
        self.target_group_size = target_group_size
        self.group_norm, self.concat_ua = group_norm, concat_ua
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.recompute, self.backend = recompute, backend
        wide = num_heads * d_v
        self.input_norm = nn.LayerNorm(d_model, eps=1e-6, device=device, dtype=dtype)
        self.uvqk = nn.Linear(d_model, 2 * num_heads * (d_v + d_qk), bias=False, device=device, dtype=dtype)
        self.attention_norm: nn.LayerNorm | nn.GroupNorm
        if group_norm:
            self.attention_norm = nn.GroupNorm(num_heads, num_heads, eps=1e-6, device=device, dtype=dtype)
        else:
            self.attention_norm = nn.LayerNorm(wide, eps=1e-6, device=device, dtype=dtype)
        self.output = nn.Linear(3 * wide if concat_ua else wide, d_model, device=device, dtype=dtype)
        self.position_weight = _table(2 * max_seqlen - 1, device, dtype) if position_bias else None
        self.time_weight = None if time_buckets is None else _table(time_buckets + 1, device, dtype)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        max_seqlen: int | None = None,
        timestamps: Tensor | None = None,
        cache: RaggedKVCache | None = None,
        *,
        num_targets: Tensor | None = None,
        num_contextual: int | Tensor = 0,
        commit: bool = True,
    ) -> Tensor:
        """Return the layer's output [T, d_model].

        Args:
            x: packed rows [T, d_model].
            offsets: int32 or int64 [B + 1].
            max_seqlen: bound on the lengths of this batch, at most the layer's own, which is the default.
            timestamps: int64 seconds [T]; without them the time bias is left out.
            cache: past rows of each user; x then holds only the new ones, which are appended.
            num_targets: [B], that many last rows of a sequence are targets, as in ``hstu_attention``.
            num_contextual: int or [B], that many first rows see all rows that are not targets; not with a cache.
            commit: append the new rows to the cache. False leaves the cache as it was, to score candidates (targets).

        Returns:
            The output, one row for each row of x.

        Raises:
            ValueError: as ``hstu_attention``; x has another width or dtype than the parameters; a cache with
                time_shift=1, where a row looks at the next row's time, with contextual rows, which see later ones, or
                filled by other layers; targets that would be committed.
        """
        batch = _Batch(offsets, max_seqlen, timestamps, num_targets, num_contextual)
        return _run([self], x, batch, cache, commit)

    def _attend(self, x: Tensor, batch: _Batch, at: int) -> Tensor:
        wide_v, wide_qk = self.num_heads * self.d_v, self.num_heads * self.d_qk
        norm = self.input_norm
        uvqk = ops.norm_project_silu(x, norm.weight, norm.bias, self.uvqk.weight, norm.eps, self.backend)
        u, v, q, k = uvqk.split([wide_v, wide_v, wide_qk, wide_qk], dim=-1)
        q, k = (y.unflatten(-1, (self.num_heads, self.d_qk)) for y in (q, k))
        v = v.unflatten(-1, (self.num_heads, self.d_v))
        offsets, timestamps, q_offsets, block_table = batch.offsets, batch.timestamps, None, None
        if (step := batch.step) is not None:
            # The CUDA kernels read no pages, and gradients would write whole pools of them.
            pages = step.block_table is not None and self.backend != "cuda" and not torch.is_grad_enabled()
            k, v = step.append(at, k, v, pages)
            offsets, q_offsets, timestamps = step.offsets, step.q_offsets, step.timestamps
            block_table = step.block_table if pages else None
        attention = hstu_attention(
            q,
            k,
            v,
            offsets,
            self.max_seqlen if batch.max_seqlen is None else batch.max_seqlen,
            q_offsets=q_offsets,
            alpha=self.alpha,
            divisor=self.max_seqlen,
            num_targets=batch.num_targets,
            target_group_size=self.target_group_size,
            num_contextual=batch.num_contextual,
            max_attn_len=self.max_attn_len,
            min_full_attn_len=self.min_full_attn_len,
            position_weight=self.position_weight,
            timestamps=timestamps,
            time_weight=None if timestamps is None else self.time_weight,
            time_shift=self.time_shift,
            block_table=block_table,
            dropout=self.attention_dropout if self.training else 0.0,
            backend=self.backend,
        )
        gated = F.dropout(self._gate(attention, u), self.dropout, self.training)
        return x + self.output(gated)

    def _gate(self, attention: Tensor, u: Tensor) -> Tensor:
        norm = self.attention_norm
        if not self.group_norm and not self.concat_ua:
            return ops.norm_gate(attention.flatten(1), u, norm.weight, norm.bias, norm.eps, self.backend)
        normed = norm(attention if self.group_norm else attention.flatten(1)).flatten(1)
        return torch.cat([u, normed, normed * u], dim=-1) if self.concat_ua else normed * u


class HSTU(nn.Module):
    """A stack of ``HSTULayer``; each layer has its own tables.

    Args:
        num_layers: layers in the stack.
        d_model: this and the others as in ``HSTULayer``, the same for all layers.
        num_heads: attention heads.
        d_qk: width of q and k per head.
        d_v: width of u and v per head.
        max_seqlen: longest sequence.
        position_bias: learn a bias for each relative position.
        time_buckets: learn a bias for this many + 1 buckets of time difference; None for no time bias.
        time_shift: 0, or 1 to measure time from the next row's timestamp.
        alpha: scale of q·k.
        max_attn_len: window; 0 for none.
        min_full_attn_len: last rows that ignore the window.
        target_group_size: targets of a group.
        group_norm: norm each head of the attention by itself.
        concat_ua: project [u, a, a * u] instead of a * u.
        dropout: of the gated attention output.
        attention_dropout: of the attention weights.
        recompute: less memory for the price of one projection.
        backend: passed on to ``hstu_attention``.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        d_qk: int,
        d_v: int,
        *,
        max_seqlen: int,
        position_bias: bool = True,
        time_buckets: int | None = 128,
        time_shift: int = 0,
        alpha: float | None = None,
        max_attn_len: int = 0,
        min_full_attn_len: int = 0,
        target_group_size: int = 1,
        group_norm: bool = False,
        concat_ua: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        recompute: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make = partial(
            HSTULayer,
            d_model,
            num_heads,
            d_qk,
            d_v,
            max_seqlen=max_seqlen,
            position_bias=position_bias,
            time_buckets=time_buckets,
            time_shift=time_shift,
            alpha=alpha,
            max_attn_len=max_attn_len,
            min_full_attn_len=min_full_attn_len,
            target_group_size=target_group_size,
            group_norm=group_norm,
            concat_ua=concat_ua,
            dropout=dropout,
            attention_dropout=attention_dropout,
            recompute=recompute,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.layers = nn.ModuleList(make() for _ in range(num_layers))

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        max_seqlen: int | None = None,
        timestamps: Tensor | None = None,
        cache: RaggedKVCache | None = None,
        *,
        num_targets: Tensor | None = None,
        num_contextual: int | Tensor = 0,
        commit: bool = True,
    ) -> Tensor:
        """Return the output of the last layer [T, d_model].

        Args:
            x: packed rows [T, d_model].
            offsets: int32 or int64 [B + 1].
            max_seqlen: bound on the lengths of this batch; as in ``HSTULayer.forward``, like all that follows.
            timestamps: int64 seconds [T].
            cache: past rows of each user, one cache for all layers; the new ones are appended.
            num_targets: [B], that many last rows of a sequence are targets.
            num_contextual: int or [B], that many first rows see all rows that are not targets; not with a cache.
            commit: append the new rows to the cache.

        Raises:
            ValueError: as ``HSTULayer.forward``.
        """
        batch = _Batch(offsets, max_seqlen, timestamps, num_targets, num_contextual)
        return _run(list(self.layers), x, batch, cache, commit)


def _run(layers: Sequence[nn.Module], x: Tensor, batch: _Batch, cache: RaggedKVCache | None, commit: bool) -> Tensor:
    refuse_transforms("HSTU", x, *(weight for layer in layers for weight in layer.parameters()))
    check_tensor("x", x)
    if cache is not None:
        _check_cached(layers, batch, commit)
        step = cache.begin(x, batch.offsets, batch.timestamps, layers)
        batch = replace(batch, step=step)
    for at, layer in enumerate(layers):
        assert isinstance(layer, HSTULayer)
        _check_rows(layer, x)
        if layer.recompute and cache is None and torch.is_grad_enabled():
            kept = partial(create_selective_checkpoint_contexts, [torch.ops.hstu_kernels.attention.default])
            x = checkpoint(layer._attend, x, batch, at, use_reentrant=False, context_fn=kept)
        else:
            x = layer._attend(x, batch, at)
    if batch.step is not None and commit:
        batch.step.commit()
    return x


def _check_rows(layer: HSTULayer, x: Tensor) -> None:
    width, dtype = layer.uvqk.weight.shape[1], layer.uvqk.weight.dtype
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"x: got shape {list(x.shape)}, needs [rows, {width}]")
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"x: got dtype {x.dtype}, needs {dtype}, that of the layer's parameters")


def _check_cached(layers: Sequence[nn.Module], batch: _Batch, commit: bool) -> None:
    if any(layer.time_shift for layer in layers):
        raise ValueError("cache: got one with time_shift=1, needs time_shift=0 (a row would change with the next one)")
    if isinstance(batch.num_contextual, Tensor) or batch.num_contextual:
        raise ValueError("num_contextual: got some with a cache, needs 0 (their rows would change with the next ones)")
    if batch.num_targets is not None and commit:
        raise ValueError("num_targets: got some rows to commit to the cache, needs commit=False, or None for events")


def _table(width: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, width, device=device, dtype=dtype).normal_(std=0.02))
