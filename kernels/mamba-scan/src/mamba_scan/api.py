"""The public functions: contract, checks, choice of backend."""

import torch
from torch import Tensor

from mamba_scan import ops
from mamba_scan.dispatch import check_backend
from mamba_scan.problem import ConvProblem, ScanProblem, SSDProblem, canonical, require


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    offsets: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective scan of Mamba over a batch of sequences, or over packed segments of any lengths.

    With dt = softplus(delta + delta_bias): h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t; y_t = <C_t, h_t> + D u_t;
    out_t = y_t * silu(z_t). Every tensor argument has a gradient, and so has the last state.

    Args:
        u: input [b, d, l], or packed [T, d] when offsets are given; float32, float64, bfloat16 or float16. Any strides.
        delta: step sizes, shaped as u and in its dtype.
        A: [d, n], real or complex.
        B: constant [d, n] or variable [b, n, l] or [b, g, n, l], g a divisor of d; packed [T, n] or [T, g, n]. For a
            complex A, a real variable B holds real and imaginary parts in turn, [..., 2 * l], unless it is complex.
        C: like B.
        D: skip connection [d].
        z: gate, shaped as u and in its dtype.
        delta_bias: [d], added to delta.
        delta_softplus: whether the steps go through softplus (the identity above 20).
        return_last_state: whether to return the state after each sequence as well.
        offsets: int32 or int64 [S + 1]; segment s is the rows offsets[s]..offsets[s + 1]. Empty segments are allowed.
        initial_state: [b, d, n], or [S, d, n] when packed; zero by default.
        backend: "reference", "cpu", "triton" or "cuda"; None picks the fastest that can run these tensors.

    Returns:
        out, shaped as u and in its dtype; with return_last_state also last_state [b or S, d, n] in the dtype of the
        computation: float32 (float64 for float64 inputs), complex if A is complex.

    Raises:
        ValueError: an argument breaks its contract; the message names it, what it got and what it needs.
        RuntimeError: the backend asked for cannot run on this machine; the message says why.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), algorithm 2.
    """
    check_backend(backend)
    p = canonical(
        ScanProblem(u, delta, A, B, C, D, z, delta_bias, initial_state, offsets, delta_softplus=bool(delta_softplus))
    )
    out, last = ops.scan(p, backend)
    return (out, last) if return_last_state else out


selective_scan_fn = selective_scan


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
    B and C are groups of heads.

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
        state_batch_indices: int [b]; row i of the batch uses state[state_batch_indices[i]], no two rows the same.
        backend: as for ``selective_scan``.

    Returns:
        out, shaped as x and in its dtype.

    Raises:
        ValueError: an argument breaks its contract.
        RuntimeError: the backend asked for cannot run on this machine.
    """
    check_backend(backend)
    right = state.dim() in (3, 4) and state.is_floating_point()
    require(right, "state", f"{state.dtype} {list(state.shape)}", "real [b, d, n] or [b, h, p, n]")
    heads = state.dim() == 4
    require(x.dim() == state.dim() - 1, "x", f"{list(x.shape)}", "[b, h, p]" if heads else "[b, d]")
    batch = x.shape[0] if state_batch_indices is None else state.shape[0]
    shape = [batch, *x.shape[1:], A.shape[-1]]
    require(list(state.shape) == shape, "state", f"{list(state.shape)}", f"{shape}")
    current = state if state_batch_indices is None else state[state_batch_indices]
    flat = current.flatten(1, 2) if heads else current

    def signal(t: Tensor) -> Tensor:
        return t.flatten(1).to(x.dtype).unsqueeze(-1)

    def parameter(t: Tensor) -> Tensor:
        return t.flatten(0, 1) if heads else t

    def coefficient(t: Tensor) -> Tensor:
        return (t.unsqueeze(1) if t.dim() == 2 else t).to(x.dtype).unsqueeze(-1)

    # A step is a scan of length one, with dtypes as free as those of a step are.
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
            delta_softplus=bool(dt_softplus),
        )
    )
    with torch.no_grad():
        out = ops.state_update(p, backend)
        if state_batch_indices is not None:
            state[state_batch_indices] = flat.view_as(current)
        elif flat.data_ptr() != state.data_ptr():
            state.copy_(flat.view_as(state))
    return out.view(x.shape)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    offsets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own filter over its own past, in a batch or in packed segments.

    y_t = bias + sum over k of weight[:, width - 1 - k] * x_{t-k}, then the activation. Every tensor argument has a
    gradient, and so have the final states.

    Args:
        x: [b, d, l], or packed [T, d] when offsets are given; float32, float64, bfloat16 or float16. Any strides.
        weight: [d, width], any width of at least 1.
        bias: [d].
        seq_idx: int [b, l] or [T]; taps do not reach across a change of it, and rows where it is negative are zero.
        initial_states: the width - 1 rows before each sequence, [b or S, d, width - 1]; zero by default.
        return_final_states: whether to return the last width - 1 rows of each sequence as well.
        final_states_out: tensor [b or S, d, width - 1] the final states are written to.
        activation: None, "silu" or "swish" (the same).
        offsets: int32 or int64 [S + 1]; segment s is the rows offsets[s]..offsets[s + 1]. Empty segments are allowed.
        backend: as for ``selective_scan``.

    Returns:
        out, shaped as x and in its dtype; with return_final_states also the final states [b or S, d, width - 1].

    Raises:
        ValueError: an argument breaks its contract.
        RuntimeError: the backend asked for cannot run on this machine.
    """
    check_backend(backend)
    require(activation in (None, "silu", "swish"), "activation", repr(activation), 'None, "silu" or "swish"')
    p = ConvProblem(x, weight, bias, seq_idx, initial_states, offsets, silu=activation is not None)
    p.check()
    out, final = ops.conv(p, backend)
    final = final.to(x.dtype)
    if final_states_out is not None:
        shape = list(final.shape)
        require(
            list(final_states_out.shape) == shape, "final_states_out", f"{list(final_states_out.shape)}", f"{shape}"
        )
        final_states_out.detach().copy_(final.detach())
    return (out, final) if return_final_states else out


causal_conv1d_fn = causal_conv1d


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
        cache_seqlens: int [b]; conv_state is then a ring in which row number r of a sequence lies at r % k, and this
            many rows have been seen.
        conv_state_indices: int [b]; row i of the batch uses conv_state[conv_state_indices[i]], no two rows the same.
        backend: as for ``selective_scan``.

    Returns:
        out, shaped as x and in its dtype. Gradients do not flow through the state.

    Raises:
        ValueError: an argument breaks its contract.
        RuntimeError: the backend asked for cannot run on this machine.
    """
    require(x.dim() in (2, 3), "x", f"{list(x.shape)}", "[b, d] or [b, d, l]")
    require(weight.dim() == 2, "weight", f"{list(weight.shape)}", "[d, width]")
    kept, rows = weight.shape[1] - 1, x.unsqueeze(-1) if x.dim() == 2 else x
    wanted = f"[b, d, k] with d = {x.shape[1]} and k >= width - 1 = {kept}"
    right = conv_state.dim() == 3 and conv_state.shape[1] == x.shape[1] and conv_state.shape[2] >= kept
    right = right and (conv_state_indices is not None or conv_state.shape[0] == x.shape[0])
    require(right, "conv_state", f"{list(conv_state.shape)}", wanted)
    state = conv_state.detach() if conv_state_indices is None else conv_state.detach()[conv_state_indices]
    size, length = state.shape[2], rows.shape[2]
    if cache_seqlens is None:
        recent = state[:, :, size - kept :]
        new = torch.cat([state, rows.detach().to(state.dtype)], dim=2)[:, :, length:]
    else:

        def places(begin: int, end: int) -> Tensor:
            steps = torch.arange(begin, end, device=x.device)
            return ((cache_seqlens[:, None] + steps) % size)[:, None].expand(-1, x.shape[1], -1)

        recent = state.gather(2, places(-kept, 0))
        # Of more rows than the ring holds only the newest stay.
        newest = min(length, size)
        new = state.scatter(2, places(length - newest, length), rows.detach()[:, :, length - newest :].to(state.dtype))
    out = causal_conv1d(rows, weight, bias, initial_states=recent.contiguous(), activation=activation, backend=backend)
    if conv_state_indices is None:
        state.copy_(new)
    else:
        conv_state.detach()[conv_state_indices] = new
    assert isinstance(out, Tensor)
    return out.squeeze(-1) if x.dim() == 2 else out


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    *,
    offsets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the scan of Mamba-2 (SSD), whose decay is one scalar a head, over a batch or packed segments.

    With dt = clamp(softplus(dt + dt_bias), *dt_limit): H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T;
    y_t = H_t C_t + D x_t; out_t = y_t * silu(z_t). Every tensor argument has a gradient, and so have the final states.

    Args:
        x: input [b, l, h, p], or packed [T, h, p] when offsets are given; float32, float64, bfloat16 or float16.
        dt: step sizes [b, l, h], or [T, h].
        A: [h], real.
        B: [b, l, g, n] or [T, g, n], g a divisor of h.
        C: like B.
        chunk_size: steps of a chunk within which the Triton backend works with matrix products, at most 64; changes no
            result.
        D: skip connection [h] or [h, p].
        z: gate, shaped as x.
        dt_bias: [h], added to dt.
        initial_states: [b or S, h, p, n]; zero by default.
        dt_softplus: whether the steps go through softplus.
        dt_limit: smallest and largest step.
        return_final_states: whether to return the state after each sequence as well.
        offsets: int32 or int64 [S + 1]; segment s is the rows offsets[s]..offsets[s + 1]. Empty segments are allowed.
        backend: as for ``selective_scan``.

    Returns:
        out, shaped as x and in its dtype; with return_final_states also the final states [b or S, h, p, n], float32
        (float64 for float64 inputs).

    Raises:
        ValueError: an argument breaks its contract.
        RuntimeError: the backend asked for cannot run on this machine.

    Source: Dao and Gu, "Transformers are SSMs" (2024), section 6.
    """
    check_backend(backend)
    low, high = (float(limit) for limit in dt_limit)
    p = SSDProblem(x, dt, A, B, C, D, z, dt_bias, initial_states, offsets, bool(dt_softplus), low, high, chunk_size)
    p.check()
    out, final = ops.ssd(p, backend)
    return (out, final) if return_final_states else out
