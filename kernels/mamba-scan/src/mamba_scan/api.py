"""The public functions: contract, checks, choice of backend."""

from torch import Tensor

from mamba_scan import ops
from mamba_scan.problem import ScanProblem, canonical, require


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
        backend: "reference", "cpu" or "triton"; None picks the fastest that can run these tensors.

    Returns:
        out, shaped as u and in its dtype; with return_last_state also last_state [b or S, d, n] in the dtype of the
        computation: float32 (float64 for float64 inputs), complex if A is complex.

    Raises:
        ValueError: an argument breaks its contract; the message names it, what it got and what it needs.
        RuntimeError: the backend asked for cannot run on this machine; the message says why.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), algorithm 2.
    """
    _check_backend(backend)
    p = canonical(
        ScanProblem(u, delta, A, B, C, D, z, delta_bias, initial_state, offsets, delta_softplus=bool(delta_softplus))
    )
    out, last = ops.scan(p, backend)
    return (out, last) if return_last_state else out


selective_scan_fn = selective_scan


def available_backends() -> dict[str, str]:
    """Return ``{name: "ok" or the reason why not}`` for every backend; builds the native module where it is missing."""
    return {name: ops.backend_status(name) for name in ops.BACKENDS}


def _check_backend(backend: str | None) -> None:
    known = ", ".join(map(repr, ops.BACKENDS))
    require(backend is None or backend in ops.BACKENDS, "backend", repr(backend), f"None or one of {known}")
