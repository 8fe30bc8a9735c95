"""Problems drawn at random, and one way to compare all results and gradients of two runs."""

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

# Triton looks at it when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mamba_scan import selective_scan

SIZES = (1, 2, 3, 7, 17, 33, 64, 65, 130)
STATES = (1, 7, 16, 64, 256)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory nobody wrote to holds NaN, so that reading it shows. One thread: these problems are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def draw(
    seed: int, dtype: torch.dtype, complex_A: bool = False, small: bool = False, states: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Arguments of ``selective_scan`` with everything drawn: layout, sizes, strides, groups, what is optional."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    packed = rng.random() < 0.5
    groups = rng.choice((1, 1, 2, 3))
    d = groups * rng.choice((1, 2, 5) if small else (1, 2, 5, 16, 21, 70))
    n = rng.choice(states or ((1, 2, 7, 16) if small else STATES))
    sizes = (1, 2, 3, 7, 9) if small else SIZES[:5] if n > 16 else SIZES

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def maybe(x: Tensor) -> Tensor | None:
        return x if rng.random() < 0.7 else None

    args: dict[str, Any] = {}
    if packed:
        lengths = [rng.choice((0, *sizes)) for _ in range(rng.randint(1, 4))]
        args["offsets"] = torch.tensor(
            [0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=rng.choice((torch.int32, torch.int64))
        )
        rows, segments = sum(lengths), len(lengths)
        signal = (lambda: normal(rows, d)) if rng.random() < 0.5 else (lambda: normal(rows, 2 * d)[:, d:])
    else:
        segments, length = rng.randint(1, 3), rng.choice(sizes)
        signal = (
            (lambda: normal(segments, d, length)) if rng.random() < 0.5 else (lambda: normal(segments, length, d).mT)
        )

    def coefficient() -> Tensor:
        if packed:
            shape: tuple[int, ...] = (rows, n) if groups == 1 and rng.random() < 0.5 else (rows, groups, n)
            return normal(*shape)
        if rng.random() < 0.3:
            return normal(d, n, dtype=complex_dtype if complex_A else dtype)
        last = length * 2 if complex_A else length
        return normal(segments, n, last) if groups == 1 and rng.random() < 0.5 else normal(segments, groups, n, last)

    args["u"], args["delta"] = signal(), signal() * 0.5
    args["A"] = -torch.rand(d, n, generator=generator, dtype=torch.float64).to(real) * 2
    if complex_A:
        args["A"] = torch.complex(args["A"], normal(d, n, dtype=real))
    args["B"], args["C"] = coefficient(), coefficient()
    args["D"], args["z"], args["delta_bias"] = (
        maybe(normal(d, dtype=real)),
        maybe(signal()),
        maybe(normal(d, dtype=real)),
    )
    args["delta_softplus"] = rng.random() < 0.7
    if not args["delta_softplus"]:
        # Without softplus a negative step grows the state: keep the steps positive and the numbers finite.
        args["delta"] = args["delta"].abs() * 0.2
        args["delta_bias"] = None if args["delta_bias"] is None else args["delta_bias"].abs() * 0.1
    args["initial_state"] = maybe(normal(segments, d, n, dtype=complex_dtype if complex_A else real))
    return args


def run(args: dict[str, Any], backend: str | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Output, last state and, for a drawn direction of both, the gradient of every tensor."""
    tensors = {
        name: x.detach().requires_grad_() for name, x in args.items() if isinstance(x, Tensor) and name != "offsets"
    }
    out, last = selective_scan(**{**args, **tensors}, return_last_state=True, backend=backend)
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, last)]
    grads = torch.autograd.grad([out, last], list(tensors.values()), directions)
    for (name, x), grad in zip(tensors.items(), grads, strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype, name
    return {
        "out": out.detach(),
        "last_state": last.detach(),
        **{f"d{k}": g for k, g in zip(tensors, grads, strict=True)},
    }


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every result within ``tolerance`` of the size of the wanted one (root mean square over root mean square)."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        y = got[name]
        assert y.shape == x.shape and y.dtype == x.dtype, name
        wide = torch.complex128 if x.is_complex() else torch.float64
        error, size = (y.to(wide) - x.to(wide)).norm().item(), x.to(wide).norm().item()
        assert error <= tolerance * (size + x.numel() ** 0.5 * 1e-3), f"{name}: error {error:.2e} of size {size:.2e}"


@pytest.fixture(scope="session")
def drawn() -> Callable[..., dict[str, Any]]:
    return draw


@pytest.fixture(scope="session")
def results() -> Callable[..., dict[str, Tensor]]:
    return run


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    return assert_close
