"""Steps that overwrite the states they begin from, for decoding: public functions, and slots of a pool of states."""

from typing import Any

import torch
from torch import Tensor

from mamba_scan import ops
from mamba_scan.api import causal_conv1d
from mamba_scan.checks import (
    INTEGERS,
    check_device,
    check_flags,
    check_optional_tensors,
    check_real,
    check_slots,
    check_tensors,
    require,
)
from mamba_scan.dispatch import check_backend
from mamba_scan.problem import ScanProblem, canonical


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Advance states by one step, in place: one step of ``selective_scan`` for every sequence of a batch.

    For inference; gradients do not flow through it. With heads, every head has its own dt, A and D, and the groups of
    B and C are groups of heads. Dtypes are free: computed in float64 if the state or one of x, dt, B, C, z is float64,
    else in float32.

    Args:
        state: [b, d, n], or with heads [b, h, p, n]; any float dtype, overwritten by the new state.
        x: [b, d] or [b, h, p].
        dt: step sizes, shaped as x.
        A: [d, n] or [h, p, n], real.
        B: [b, n] or [b, g, n].
        C: like B.
        D: [d] or [h, p].
        z: gate, shaped as x.
        dt_bias: [d] or [h, p].
        dt_softplus: whether the steps go through softplus.
        state_batch_indices: int32 or int64 [b]; row i of the batch uses state[state_batch_indices[i]], no two rows the
            same. A negative one is padding: the row's output is zero and no state changes.
        backend: as for ``selective_scan``.

    Returns:
        out, shaped as x and in its dtype.

    Raises:
        ValueError: an argument breaks its contract.
        RuntimeError: the backend asked for cannot run on this machine.
    """
    check_backend(backend)
    check_tensors(state=state, x=x, dt=dt, A=A, B=B, C=C)
    check_optional_tensors(D=D, z=z, dt_bias=dt_bias, state_batch_indices=state_batch_indices)
    check_flags(dt_softplus=dt_softplus)
    require(state.dim() in (3, 4), "state", state, "[b, d, n] or [b, h, p, n]")
    check_real(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    heads = state.dim() == 4
    require(x.dim() == state.dim() - 1, "x", x, "[b, h, p]" if heads else "[b, d]")
    require(A.dim() == state.dim() - 1, "A", A, "[h, p, n]" if heads else "[d, n]")
    for name, c in (("B", B), ("C", C)):
        require(c.dim() in (2, 3), name, c, "[b, n] or [b, g, n]")
    for name, t in (("dt", dt), ("z", z)):
        require(t is None or t.shape == x.shape, name, t, f"the shape of x, {list(x.shape)}")
    for name, t in (("D", D), ("dt_bias", dt_bias)):
        require(t is None or t.shape == x.shape[1:], name, t, f"{list(x.shape[1:])} as in x")
    batch = x.shape[0] if state_batch_indices is None else state.shape[0]
    shape = [batch, *x.shape[1:], A.shape[-1]]
    require(list(state.shape) == shape, "state", f"{list(state.shape)}", f"{shape}")
    if state_batch_indices is not None:
        check_slots("state_batch_indices", state_batch_indices, x.shape[0], batch)
    check_device(state, x=x, state_batch_indices=state_batch_indices)
    current = state if state_batch_indices is None else _taken(state, state_batch_indices)
    flat = current.flatten(1, 2) if heads else current
    # Half precision is computed in float32: signals of one dtype stay as they are, others are not rounded to it.
    dtypes = {t.dtype for t in (x, dt, B, C, z) if t is not None}
    wide = torch.float64 if torch.float64 in dtypes | {state.dtype} else torch.float32
    common = x.dtype if len(dtypes) == 1 and wide == torch.float32 else wide

    def signal(t: Tensor) -> Tensor:
        return t.flatten(1).to(common).unsqueeze(-1)

    def parameter(t: Tensor) -> Tensor:
        return t.flatten(0, 1) if heads else t

    def coefficient(t: Tensor) -> Tensor:
        return (t.unsqueeze(1) if t.dim() == 2 else t).to(common).unsqueeze(-1)

    # A step is a scan of length one.
    p = canonical(
        ScanProblem(
            u=signal(x),
            delta=signal(dt),
            A=parameter(A),
            B=coefficient(B),
            C=coefficient(C),
            D=None if D is None else parameter(D),
            z=None if z is None else signal(z),
            delta_bias=None if dt_bias is None else parameter(dt_bias),
            initial_state=flat,
            offsets=None,
            delta_softplus=dt_softplus,
        )
    )
    with torch.no_grad():
        out = ops.state_update(p, backend).to(x.dtype).view(x.shape)
        if state_batch_indices is not None:
            _put(state, state_batch_indices, flat.view_as(current))
            out = _without_padding(out, state_batch_indices)
        elif flat.data_ptr() != state.data_ptr():
            state.copy_(flat.view_as(state))
    return out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Continue a ``causal_conv1d`` by one or a few steps, with the rows before them kept in ``conv_state``, in place.

    Args:
        x: new rows [b, d] or [b, d, l].
        conv_state: the newest rows so far, oldest first, [b, d, k] with k >= width - 1; overwritten.
        weight: [d, width].
        bias: [d].
        activation: None, "silu" or "swish".
        cache_seqlens: int32 or int64 [b]; conv_state is then a ring in which row number r of a sequence lies at r % k,
            and this many rows have been seen.
        conv_state_indices: int32 or int64 [b]; row i of the batch uses conv_state[conv_state_indices[i]], no two rows
            the same. A negative one is padding: the row's output is zero and no state changes.
        backend: as for ``selective_scan``.

    Returns:
        out, shaped as x and in its dtype. x, weight and bias have gradients; the state has none.

    Raises:
        ValueError: an argument breaks its contract.
        RuntimeError: the backend asked for cannot run on this machine.
    """
    check_tensors(x=x, conv_state=conv_state, weight=weight)
    check_optional_tensors(bias=bias, cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    check_real(x=x, conv_state=conv_state)
    require(x.dim() in (2, 3), "x", x, "[b, d] or [b, d, l]")
    require(weight.dim() == 2, "weight", weight, "[d, width]")
    kept, rows = weight.shape[1] - 1, x.unsqueeze(-1) if x.dim() == 2 else x
    wanted = f"[b, d, k] with d = {x.shape[1]} and k >= width - 1 = {kept}"
    right = conv_state.dim() == 3 and conv_state.shape[1] == x.shape[1] and conv_state.shape[2] >= kept
    right = right and (conv_state_indices is not None or conv_state.shape[0] == x.shape[0])
    require(right, "conv_state", f"{list(conv_state.shape)}", wanted)
    if conv_state_indices is not None:
        check_slots("conv_state_indices", conv_state_indices, x.shape[0], conv_state.shape[0])
        rows = _without_padding(rows, conv_state_indices)
    if cache_seqlens is not None:
        right = cache_seqlens.shape == x.shape[:1] and cache_seqlens.dtype in INTEGERS
        require(right, "cache_seqlens", cache_seqlens, f"int32 or int64 [{x.shape[0]}]")
    check_device(x, conv_state=conv_state, cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    pool = conv_state.detach()
    state = pool if conv_state_indices is None else _taken(pool, conv_state_indices)
    recent, new = _advanced(state, rows.detach().to(state.dtype), kept, cache_seqlens)
    out: Any = causal_conv1d(rows, weight, bias, initial_states=recent, activation=activation, backend=backend)
    if conv_state_indices is None:
        pool.copy_(new)
    else:
        _put(pool, conv_state_indices, new)
        out = _without_padding(out, conv_state_indices)
    return out.view(x.shape) if x.dim() == 2 else out


def _advanced(state: Tensor, rows: Tensor, kept: int, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """The last ``kept`` rows before the new ones, in memory of their own, and the state with the new rows in it."""
    size, length = state.shape[2], rows.shape[2]
    if seen is None:
        return state[:, :, size - kept :].clone(), torch.cat([state, rows], dim=2)[:, :, length:]

    def places(begin: int, end: int) -> Tensor:
        steps = torch.arange(begin, end, device=rows.device)
        return ((seen[:, None] + steps) % size)[:, None].expand(-1, state.shape[1], -1)

    # Of more rows than the ring holds only the newest stay.
    newest = min(length, size)
    new = state.scatter(2, places(length - newest, length), rows[:, :, length - newest :])
    return state.gather(2, places(-kept, 0)), new


def _taken(pool: Tensor, index: Tensor) -> Tensor:
    """The states of a batch, copied; padding has some state, which is never put back."""
    return pool[index.clamp(min=0)]


def _put(pool: Tensor, index: Tensor, states: Tensor) -> None:
    """Put the states of a batch back where they came from, all but padding's."""
    kept = index >= 0
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        pool[index[kept]] = states[kept]
    elif index.shape[0]:
        # Neither asks a card how many rows there are nor lets a shape depend on it: padding repeats what the first row
        # that is none writes, or, where all are padding, writes what stands there.
        source = torch.where(kept, torch.arange(index.shape[0], device=index.device), kept.to(torch.int8).argmax())
        slots = index[source].clamp(min=0)
        real = kept[source].view(-1, *[1] * (states.dim() - 1))
        pool[slots] = torch.where(real, states[source], pool[slots])


def _without_padding(rows: Tensor, index: Tensor) -> Tensor:
    """Rows with zeros where the batch is padding, whatever stood there."""
    return torch.where((index >= 0).view(-1, *[1] * (rows.dim() - 1)), rows, 0)
