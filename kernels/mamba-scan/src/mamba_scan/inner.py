"""The inside of the published Mamba block as one function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_scan import ops
from mamba_scan.api import causal_conv1d, selective_scan
from mamba_scan.checks import check_flags, check_optional_tensors, check_tensors, require
from mamba_scan.dispatch import check_backend


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor:
    """Run all of a Mamba block between its in-projection and its output: convolution, projections, scan, gate.

    The rows of x_proj_weight give the step size's low-rank input, then B, then C, the latter two where they are not
    given. Without given B and C, biases and norms of theirs, for a real A and with softplus, it is one fused op that
    computes everything between again in the backward pass; else the ops run one after the other.

    Args:
        xz: [b, 2 * d, l], what is scanned and its gate.
        conv1d_weight: [d, 1, width].
        conv1d_bias: [d].
        x_proj_weight: [rank + n + n, d]; n less for each of B and C given; 2 * n for each where A is complex.
        delta_proj_weight: [d, rank].
        out_proj_weight: [e, d].
        out_proj_bias: [e].
        A: [d, n], real or complex.
        B: given instead of projected, as for ``selective_scan``.
        C: like B.
        D: [d].
        delta_bias: [d].
        B_proj_bias: [n], or [2 * n] where A is complex; added to a projected B.
        C_proj_bias: like B_proj_bias.
        delta_softplus: whether the steps go through softplus.
        checkpoint_lvl: 0 or 1, as published; changes no result.
        b_rms_weight: [n], weights of a root-mean-square norm of a projected B, for a real A.
        c_rms_weight: like b_rms_weight.
        dt_rms_weight: [d], of a norm of the step sizes before bias and softplus.
        b_c_dt_rms_eps: of these norms.
        backend: as for ``selective_scan``.

    Returns:
        [b, l, e] in the dtype of xz.

    Raises:
        ValueError: an argument breaks its contract.
        RuntimeError: the backend asked for cannot run on this machine.
    """
    check_backend(backend)
    check_tensors(xz=xz, conv1d_weight=conv1d_weight, x_proj_weight=x_proj_weight, A=A)
    check_tensors(delta_proj_weight=delta_proj_weight, out_proj_weight=out_proj_weight)
    biases = {"B_proj_bias": B_proj_bias, "C_proj_bias": C_proj_bias}
    norms = {"b_rms_weight": b_rms_weight, "c_rms_weight": c_rms_weight}
    check_optional_tensors(conv1d_bias=conv1d_bias, out_proj_bias=out_proj_bias, B=B, C=C, D=D, delta_bias=delta_bias)
    check_optional_tensors(**biases, **norms, dt_rms_weight=dt_rms_weight)
    check_flags(delta_softplus=delta_softplus)
    require(checkpoint_lvl in (0, 1), "checkpoint_lvl", repr(checkpoint_lvl), "0 or 1")
    require(A.dim() == 2, "A", A, "[d, n]")
    d, parts = A.shape[0], A.shape[1] * (2 if A.is_complex() else 1)
    require(xz.dim() == 3 and xz.shape[1] == 2 * d, "xz", xz, f"[b, {2 * d}, l], d = {d} as in A")
    right = delta_proj_weight.dim() == 2 and delta_proj_weight.shape[0] == d
    require(right, "delta_proj_weight", delta_proj_weight, f"[{d}, rank]")
    rank = delta_proj_weight.shape[1]
    right = conv1d_weight.dim() == 3 and conv1d_weight.shape[:2] == (d, 1)
    require(right, "conv1d_weight", conv1d_weight, f"[{d}, 1, width]")
    sizes = [rank, parts if B is None else 0, parts if C is None else 0]
    right = x_proj_weight.shape == (sum(sizes), d)
    require(right, "x_proj_weight", x_proj_weight, f"{[sum(sizes), d]}: rank, B and C where not given")
    right = out_proj_weight.dim() == 2 and out_proj_weight.shape[1] == d
    require(right, "out_proj_weight", out_proj_weight, f"[e, {d}]")
    for name, x, size in (
        ("conv1d_bias", conv1d_bias, d),
        ("out_proj_bias", out_proj_bias, out_proj_weight.shape[0]),
        ("D", D, d),
        ("delta_bias", delta_bias, d),
        ("dt_rms_weight", dt_rms_weight, d),
    ):
        require(x is None or x.shape == (size,), name, x, f"[{size}]")
    for given, names in ((B, ("B_proj_bias", "b_rms_weight")), (C, ("C_proj_bias", "c_rms_weight"))):
        for name in names:
            x = (biases | norms)[name]
            right = x is None or (x.shape == (parts,) and given is None)
            require(right, name, x, f"[{parts}], and B or C not given")
    for name, x in norms.items():
        require(x is None or not A.is_complex(), name, x, "a real A")
    x_proj, delta_proj, out_proj = (w.to(xz.dtype) for w in (x_proj_weight, delta_proj_weight, out_proj_weight))
    out_bias = None if out_proj_bias is None else out_proj_bias.to(xz.dtype)
    weight = conv1d_weight.squeeze(1)
    extras = (B, C, *biases.values(), *norms.values(), dt_rms_weight)
    if delta_softplus and not A.is_complex() and all(x is None for x in extras):
        p = ops.InnerProblem(
            xz.mT, weight, conv1d_bias, x_proj, delta_proj, delta_bias, A, D, out_proj, out_bias, None, None, None
        )
        return ops.inner(p, backend, states=False)[0]

    def normed(rows: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return rows
        wide = torch.promote_types(rows.dtype, torch.float32)
        return F.rms_norm(rows.to(wide), weight.shape, weight.to(wide), b_c_dt_rms_eps).to(rows.dtype)

    def coefficient(rows: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        rows = normed(rows if bias is None else rows + bias.to(rows.dtype), weight)
        # Of complex coefficients real and imaginary parts alternate along the channels here, along time in a scan.
        return rows.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2) if A.is_complex() else rows.mT

    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d(x, weight, conv1d_bias, activation="silu", backend=backend)
    assert isinstance(u, Tensor)
    low, b, c = F.linear(u.mT, x_proj).split(sizes, dim=-1)
    delta = normed(F.linear(low, delta_proj), dt_rms_weight).mT
    B = coefficient(b, B_proj_bias, b_rms_weight) if B is None else B
    C = coefficient(c, C_proj_bias, c_rms_weight) if C is None else C
    y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend=backend)
    assert isinstance(y, Tensor)
    return F.linear(y.mT, out_proj, out_bias)
