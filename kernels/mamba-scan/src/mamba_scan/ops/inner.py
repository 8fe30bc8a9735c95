"""The inside of a Mamba block as one op: convolution, projections, scan, gate and output projection.

Of everything between the input and the output projection only the input, the small projection and the chunk states are
kept; the backward pass computes the rest again.
"""

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mamba_scan.checks import check_offset_values
from mamba_scan.dispatch import choose
from mamba_scan.ops.refusals import once, refuse_transforms
from mamba_scan.ops.scan import saved_states
from mamba_scan.problem import ConvProblem, ScanProblem


@dataclass
class InnerProblem:
    """Arguments in the order of the op's; xz is [b, l, 2d], or packed [T, 2d] when offsets are given."""

    xz: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    dt_bias: Tensor | None
    A: Tensor
    D: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    conv_state: Tensor | None
    ssm_state: Tensor | None
    offsets: Tensor | None

    def conv(self) -> ConvProblem:
        x = self.columns(self.xz[..., : self.A.shape[0]])
        return ConvProblem(x, self.conv_weight, self.conv_bias, None, self.conv_state, self.offsets, silu=True)

    def scan(self, u: Tensor, projected: Tensor) -> ScanProblem:
        """The scan inside the block, of its convolved input and what ``x_proj`` made of it."""
        rank, states = self.dt_proj_weight.shape[1], self.A.shape[1]
        dt, B, C = projected.split([rank, states, states], dim=-1)
        delta = self.columns(dt @ self.dt_proj_weight.T)
        z = self.columns(self.xz[..., self.A.shape[0] :])
        B, C = (self.columns(x).unsqueeze(1) for x in (B, C))
        return ScanProblem(
            u, delta, self.A, B, C, self.D, z, self.dt_bias, self.ssm_state, self.offsets, delta_softplus=True
        )

    def columns(self, rows: Tensor) -> Tensor:
        """[b, l, d] as [b, d, l], the layout of the ops, and back; packed rows stay."""
        return rows if self.offsets is not None else rows.mT


_NAMES = [field.name for field in fields(InnerProblem)]
_OPTIONAL = {"conv_bias", "dt_bias", "D", "out_bias", "conv_state", "ssm_state", "offsets"}
_INNER = ", ".join(f"Tensor{'?' if name in _OPTIONAL else ''} {name}" for name in _NAMES)

torch.library.define(
    "mamba_scan::inner", f"({_INNER}, bool states, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(
    "mamba_scan::inner_backward",
    f"(Tensor? dout, Tensor? dconv, Tensor? dlast, Tensor projected, Tensor saved, {_INNER}, str backend) "
    f"-> ({', '.join(['Tensor'] * (len(_NAMES) - 1))})",
)


def inner(p: InnerProblem, backend: str | None, states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op: out [b, l, width] or [T, width], the convolution's final states and the scan's last states.

    Without ``states`` nothing stands in the latter two.

    Args:
        p: the arguments.
        backend: name of a backend; None picks the fastest when the op runs.
        states: whether the states are wanted.
    """
    refuse_transforms("inner", vars(p).values())
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in vars(p).values())
    out, conv, last, _, _ = torch.ops.mamba_scan.inner(*vars(p).values(), states, save, backend or "auto")
    return out, conv, last


@torch.library.impl("mamba_scan::inner", ("cpu", "cuda"))
def _inner(*args: Any) -> tuple[Tensor, ...]:
    p, (states, save, backend) = InnerProblem(*args[: len(_NAMES)]), args[len(_NAMES) :]
    check_offset_values(p.offsets, p.xz.shape[0])
    conv = p.conv()
    backend_module: ModuleType = choose(backend, conv)
    u, final = backend_module.conv_forward(conv)
    projected = p.columns(u) @ p.x_proj_weight.T
    scan = p.scan(u, projected)
    saved = saved_states(scan, save)
    y, last = choose(backend, scan).scan_forward(scan, saved)
    if not states:
        final, last = (x.new_empty(0) for x in (final, last))
    return _project(p, p.columns(y)), final, last, projected, saved


@torch.library.register_fake("mamba_scan::inner")
def _inner_fake(*args: Any) -> tuple[Tensor, ...]:
    p, (states, save, _) = InnerProblem(*args[: len(_NAMES)]), args[len(_NAMES) :]
    conv = p.conv()
    u = torch.empty_like(conv.x)
    projected = p.columns(u) @ p.x_proj_weight.T
    scan = p.scan(u, projected)
    final = p.xz.new_empty((conv.segments, conv.channels, conv.width - 1) if states else 0, dtype=conv.dtype)
    last = p.A.new_empty((scan.segments, scan.channels, scan.states) if states else 0, dtype=scan.state_dtype)
    return _project(p, p.columns(u)), final, last, projected, saved_states(scan, save)


@torch.library.impl("mamba_scan::inner_backward", ("cpu", "cuda"))
def _inner_backward(
    dout: Tensor | None, dconv: Tensor | None, dlast: Tensor | None, projected: Tensor, saved: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    p, backend = InnerProblem(*args[:-1]), args[-1]
    conv = p.conv()
    backend_module: ModuleType = choose(backend, conv)
    u = backend_module.conv_forward(conv)[0]
    scan = p.scan(u, projected)
    if dout is None:
        dout = p.xz.new_zeros(*p.xz.shape[:-1], p.out_weight.shape[0])
    y = torch.empty_like(u)
    grads = backend_module.scan_backward(scan, saved, p.columns(dout @ p.out_weight), dlast, out=y)
    ddelta, dB, dC = (p.columns(g) for g in (grads["delta"], grads["B"].squeeze(1), grads["C"].squeeze(1)))
    rank = p.dt_proj_weight.shape[1]
    dprojected = torch.cat([ddelta @ p.dt_proj_weight, dB, dC], dim=-1)
    du = grads["u"].add_(p.columns(dprojected @ p.x_proj_weight))
    conv_grads = backend_module.conv_backward(conv, du, dconv)
    result = {
        "xz": torch.cat([p.columns(conv_grads["x"]), p.columns(grads["z"])], dim=-1),
        "conv_weight": conv_grads["weight"],
        "conv_bias": conv_grads.get("bias"),
        "x_proj_weight": _outer(dprojected, p.columns(u)),
        "dt_proj_weight": _outer(ddelta, projected[..., :rank]),
        "dt_bias": grads.get("delta_bias"),
        "A": grads["A"],
        "D": grads.get("D"),
        "out_weight": _outer(dout, p.columns(y)),
        "out_bias": None if p.out_bias is None else dout.flatten(0, -2).sum(0),
        "conv_state": conv_grads.get("initial_states"),
        "ssm_state": grads.get("initial_state"),
    }
    return tuple(p.xz.new_empty(0) if result[name] is None else result[name] for name in _NAMES[:-1])


@torch.library.register_fake("mamba_scan::inner_backward")
def _inner_backward_fake(
    dout: Tensor | None, dconv: Tensor | None, dlast: Tensor | None, projected: Tensor, saved: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    tensors = zip(_NAMES[:-1], args, strict=False)
    made = {name: args[0].new_empty(0) if x is None else torch.empty_like(x) for name, x in tensors}
    made["xz"] = args[0].new_empty(args[0].shape)
    return tuple(made.values())


def _project(p: InnerProblem, rows: Tensor) -> Tensor:
    out = rows @ p.out_weight.T
    return out if p.out_bias is None else out.add_(p.out_bias)


def _outer(dy: Tensor, x: Tensor) -> Tensor:
    return dy.flatten(0, -2).T @ x.flatten(0, -2)


def _inner_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.save_for_backward(output[3], output[4], *(x for x in inputs[: len(_NAMES)] if x is not None))
    ctx.given = [x is not None for x in inputs[: len(_NAMES)]]
    ctx.backend = inputs[-1]


def _inner_autograd(
    ctx: Any, dout: Tensor | None, dconv: Tensor | None, dlast: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    projected, saved, *tensors = ctx.saved_tensors
    left = iter(tensors)
    problem = [next(left) if given else None for given in ctx.given]
    found = torch.ops.mamba_scan.inner_backward(dout, dconv, dlast, projected, saved, *problem, ctx.backend)
    grads = once(found, (dout, dconv, dlast))
    needed = ctx.needs_input_grad
    return (*(grad if needed[i] else None for i, grad in enumerate(grads)), None, None, None, None)


torch.library.register_autograd("mamba_scan::inner", _inner_autograd, setup_context=_inner_setup)
