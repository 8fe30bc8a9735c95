"""The definition: every operation as one loop over time in plain torch. Slow, exact, any device, any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_scan.problem import ScanProblem


def unavailable() -> str | None:
    """The reference runs wherever torch runs."""
    return None


def supports(p: ScanProblem) -> str | None:
    """The reference takes every problem of the contract."""
    return None


def scan(p: ScanProblem) -> tuple[Tensor, Tensor]:
    """Scan segment after segment; differentiable by autograd.

    With dt = softplus(delta + delta_bias): h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t; y_t = <C_t, h_t> (for complex A
    twice the real part) + D u_t; out_t = y_t * silu(z_t).

    Returns:
        out, shaped as u and in its dtype, and last_state [S, d, n].
    """
    if p.offsets is None:
        start = p.initial_state if p.initial_state is not None else p.A.new_zeros(p.segments, *p.A.shape)
        out, last = _scan_rows(p, p.u, p.delta, p.B, p.C, p.z, start.to(p.state_dtype))
        return out, last
    outs, lasts = [], []
    bounds = p.offsets.tolist()
    for s, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        start = p.initial_state[s : s + 1] if p.initial_state is not None else p.A.new_zeros(1, *p.A.shape)
        row = slice(begin, end)
        z = None if p.z is None else p.z[row].mT[None]
        B, C = (x[row].permute(1, 2, 0)[None] for x in (p.B, p.C))
        out, last = _scan_rows(p, p.u[row].mT[None], p.delta[row].mT[None], B, C, z, start.to(p.state_dtype))
        outs.append(out[0].mT)
        lasts.append(last)
    last_state = torch.cat(lasts) if lasts else p.A.new_zeros(0, *p.A.shape, dtype=p.state_dtype)
    return torch.cat([*outs, p.u[:0]]), last_state


def scan_forward(p: ScanProblem, saved: Tensor) -> tuple[Tensor, Tensor]:
    """Scan without a graph. Nothing is left in ``saved``: the backward pass runs the scan again."""
    out, last = scan(p)
    return torch.empty_like(p.u).copy_(out), last.clone()


def scan_backward(p: ScanProblem, saved: Tensor, dout: Tensor | None, dlast: Tensor | None) -> dict[str, Tensor]:
    """Gradients of every tensor argument, by autograd through the scan."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    tensors = {name: x.detach().requires_grad_() for name in names if (x := getattr(p, name)) is not None}
    with torch.enable_grad():
        out, last = scan(ScanProblem(**{**p.__dict__, **tensors}))
        pairs = [(y, dy) for y, dy in ((out, dout), (last, dlast)) if dy is not None and y.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in pairs], list(tensors.values()), [dy.to(y.dtype) for y, dy in pairs], allow_unused=True
        )
    return {
        name: torch.zeros_like(x) if grad is None else torch.empty_like(x).copy_(grad)
        for (name, x), grad in zip(tensors.items(), grads, strict=True)
    }


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
