"""The definition: every operation as one loop over time in plain torch. Slow, exact, any device, any dtype."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_scan.problem import ConvProblem, ScanProblem
from mamba_scan.problem_ssd import SSDProblem


def unavailable() -> str | None:
    """The reference runs wherever torch runs."""
    return None


def supports(p: ScanProblem | ConvProblem | SSDProblem) -> str | None:
    """The reference takes every problem of the contract."""
    return None


def scan(p: ScanProblem) -> tuple[Tensor, Tensor]:
    """Scan segment after segment; differentiable by autograd.

    With dt = softplus(delta + delta_bias): h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t; y_t = <C_t, h_t> (for complex A
    twice the real part) + D u_t; out_t = y_t * silu(z_t).

    Args:
        p: a problem in canonical form.

    Returns:
        out, shaped as u and in its dtype, and last_state [S, d, n].
    """
    if p.offsets is None:
        start = p.initial_state if p.initial_state is not None else p.A.new_zeros(p.segments, *p.A.shape)
        out, last = _scan_rows(p, p.u, p.delta, p.B, p.C, p.z, start.to(p.state_dtype))
        return out, last
    outs, lasts = [], []
    bounds = p.offsets.tolist()
    for s, (begin, end) in enumerate(pairwise(bounds)):
        start = p.initial_state[s : s + 1] if p.initial_state is not None else p.A.new_zeros(1, *p.A.shape)
        row = slice(begin, end)
        z = None if p.z is None else p.z[row].mT[None]
        B, C = (x[row].permute(1, 2, 0)[None] for x in (p.B, p.C))
        out, last = _scan_rows(p, p.u[row].mT[None], p.delta[row].mT[None], B, C, z, start.to(p.state_dtype))
        outs.append(out[0].mT)
        lasts.append(last)
    last_state = torch.cat(lasts) if lasts else p.A.new_zeros(0, *p.A.shape, dtype=p.state_dtype)
    return torch.cat([*outs, p.u[:0]]), last_state


def scan_forward(p: ScanProblem, saved: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scan without a graph, the last state into ``last`` if given. Nothing goes into ``saved``: it is not needed.

    Args:
        p: a problem in canonical form.
        saved: room for states, which other backends use.
        last: [S, d, n], overwritten.

    Returns:
        As ``scan``.
    """
    out, state = scan(p)
    return torch.empty_like(p.u).copy_(out), state.clone() if last is None else last.copy_(state)


def scan_backward(
    p: ScanProblem, saved: Tensor, dout: Tensor | None, dlast: Tensor | None, out: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients of every tensor argument, by autograd through the scan, which also goes into ``out`` if given.

    Args:
        p: a problem in canonical form.
        saved: what the forward pass left.
        dout: gradient of the output, shaped as u; None for none.
        dlast: gradient of the last states [S, d, n]; None for none.
        out: shaped as u, overwritten.

    Returns:
        Gradients by argument name, of those arguments that are given.
    """
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    tensors = {name: x.detach().requires_grad_() for name in names if (x := getattr(p, name)) is not None}
    with torch.enable_grad():
        outputs = scan(ScanProblem(**{**vars(p), **tensors}))
        if out is not None:
            out.copy_(outputs[0].detach())
        return _gradients(tensors, outputs, (dout, dlast))


def conv(p: ConvProblem) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own filter over its own past; differentiable by autograd.

    y_t = bias + sum over k of weight[:, width - 1 - k] * x_{t-k}, then silu if asked for. A tap counts only where
    seq_idx is the same at both ends; rows of a negative seq_idx give zero.

    Args:
        p: a checked problem.

    Returns:
        out, shaped as x and in its dtype, and the last width - 1 rows of every segment [S, d, width - 1].
    """
    kept = p.width - 1
    start = p.x.new_zeros(p.segments, p.channels, kept) if p.initial_states is None else p.initial_states
    if p.offsets is None:
        return _conv_rows(p, p.x, p.seq_idx, start.to(p.dtype))
    outs, finals = [], []
    for s, (begin, end) in enumerate(pairwise(p.offsets.tolist())):
        row = slice(begin, end)
        index = None if p.seq_idx is None else p.seq_idx[row][None]
        out, final = _conv_rows(p, p.x[row].mT[None], index, start[s : s + 1].to(p.dtype))
        outs.append(out[0].mT)
        finals.append(final)
    final_states = torch.cat(finals) if finals else p.x.new_zeros(0, p.channels, kept, dtype=p.dtype)
    return torch.cat([*outs, p.x[:0]]), final_states


def conv_forward(p: ConvProblem) -> tuple[Tensor, Tensor]:
    """Convolve without a graph.

    Args:
        p: a checked problem.

    Returns:
        As ``conv``.
    """
    out, final = conv(p)
    return torch.empty_like(p.x).copy_(out), final.contiguous()


def conv_backward(p: ConvProblem, dout: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of every tensor argument, by autograd through the convolution.

    Args:
        p: a checked problem.
        dout: gradient of the output, shaped as x; None for none.
        dfinal: gradient of the final states [S, d, width - 1]; None for none.

    Returns:
        Gradients by argument name, of those arguments that are given.
    """
    names = ("x", "weight", "bias", "initial_states")
    tensors = {name: x.detach().requires_grad_() for name in names if (x := getattr(p, name)) is not None}
    with torch.enable_grad():
        return _gradients(tensors, conv(ConvProblem(**{**vars(p), **tensors})), (dout, dfinal))


def ssd(p: SSDProblem) -> tuple[Tensor, Tensor]:
    """Scan with one scalar decay a head, step by step; differentiable by autograd.

    With dt = clamp(softplus(dt + dt_bias)): H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T; y_t = H_t C_t + D x_t;
    out_t = y_t * silu(z_t).

    Args:
        p: a checked problem.

    Returns:
        out, shaped as x and in its dtype, and the final states [S, h, p, n].
    """
    out, last = scan(p.as_scan())
    return p.from_scan(out).to(p.x.dtype), last.unflatten(1, p.x.shape[-2:])


def ssd_forward(p: SSDProblem) -> tuple[Tensor, Tensor]:
    """Scan without a graph.

    Args:
        p: a checked problem.

    Returns:
        As ``ssd``.
    """
    out, final = ssd(p)
    return torch.empty_like(p.x).copy_(out), final.clone()


def ssd_backward(p: SSDProblem, dout: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of every tensor argument, by autograd through the scan.

    Args:
        p: a checked problem.
        dout: gradient of the output, shaped as x; None for none.
        dfinal: gradient of the final states [S, h, p, n]; None for none.

    Returns:
        Gradients by argument name, of those arguments that are given.
    """
    tensors = p.leaves()
    with torch.enable_grad():
        return _gradients(tensors, ssd(p.replaced(tensors)), (dout, dfinal))


def _gradients(
    tensors: dict[str, Tensor], outputs: tuple[Tensor, Tensor], directions: tuple[Tensor | None, Tensor | None]
) -> dict[str, Tensor]:
    pairs = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, directions, strict=True) if dy is not None]
    pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
    grads: tuple[Tensor | None, ...] = (None,) * len(tensors)
    if pairs:
        ys, dys = zip(*pairs, strict=True)
        grads = torch.autograd.grad(ys, list(tensors.values()), dys, allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else torch.empty_like(x).copy_(grad)
        for (name, x), grad in zip(tensors.items(), grads, strict=True)
    }


def _conv_rows(p: ConvProblem, x: Tensor, seq_idx: Tensor | None, start: Tensor) -> tuple[Tensor, Tensor]:
    length, kept = x.shape[2], p.width - 1
    seen, weight = torch.cat([start, x.to(p.dtype)], dim=2), p.weight.to(p.dtype)
    y = torch.zeros_like(x, dtype=p.dtype)
    for tap in range(p.width):
        term = seen[:, :, kept - tap : kept - tap + length] * weight[:, kept - tap, None]
        if seq_idx is not None:
            same = F.pad(seq_idx[:, tap:] == seq_idx[:, : max(length - tap, 0)], (min(tap, length), 0))
            term = term * same[:, None]
        y = y + term
    if p.bias is not None:
        y = y + p.bias.to(p.dtype)[:, None]
    if p.silu:
        y = F.silu(y)
    if seq_idx is not None:
        y = y * (seq_idx >= 0)[:, None]
    return y.to(x.dtype), seen[:, :, length:]


def _scan_rows(
    p: ScanProblem, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    x, dt, A = u.to(p.dtype), delta.to(p.dtype), p.A.to(p.state_dtype)
    if p.delta_bias is not None:
        dt = dt + p.delta_bias.to(p.dtype)[:, None]
    if p.delta_softplus:
        dt = F.softplus(dt)
    Bs, Cs = (_per_channel(c.to(p.state_dtype), p.channels, x.shape[2]) for c in (B, C))
    ys = []
    for dt_t, x_t, B_t, C_t in zip(dt.unbind(-1), x.unbind(-1), Bs, Cs, strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * x_t)[..., None] * B_t
        y_t = (h * C_t).sum(-1)
        ys.append(2 * y_t.real if h.is_complex() else y_t)
    y = torch.stack(ys, -1) if ys else x
    if p.D is not None:
        y = y + p.D.to(p.dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(p.dtype))
    return y.to(u.dtype), h


def _per_channel(c: Tensor, channels: int, length: int) -> list[Tensor]:
    """Coefficients of every step, [1 or b, d, n] each."""
    if c.dim() == 2:
        return [c[None]] * length
    return list(c.repeat_interleave(channels // c.shape[1], dim=1).unbind(-1))
