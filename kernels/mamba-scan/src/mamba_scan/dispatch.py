"""Which backend runs an op: the one asked for, or "auto", the fastest that can take the tensors.

The same text in every kernel package (``python kernels/native.py --sync``). A backend is a module
``<package>.impl.<name>`` with ``unavailable()``, why it cannot run on this machine, and ``supports(problem)``, why it
cannot take these tensors; both return None where nothing is in the way. It is imported when an op first runs.
"""

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch

PACKAGE = __name__.rpartition(".")[0]
BACKENDS = ("reference", "cpu", "triton", "cuda")
# On a card CUDA comes second until both have been measured there.
_FASTEST = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def check_backend(backend: str | None) -> None:
    """Check the name of a backend.

    Args:
        backend: name of a backend, or None for the choice of the package.

    Raises:
        ValueError: it is neither None nor one of ``BACKENDS``.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, needs None or one of {', '.join(map(repr, BACKENDS))}")


def available_backends() -> dict[str, str]:
    """Return ``{name: "ok" or the reason why not}`` for every backend; builds the native module where it is missing."""
    return {name: backend_status(name) for name in BACKENDS}


def backend_status(name: str) -> str:
    """Return "ok" or the reason why the backend cannot run on this machine.

    Args:
        name: one of ``BACKENDS``.
    """
    try:
        return implementation(name).unavailable() or "ok"
    except ImportError as error:
        return str(error)


def choose(backend: str, problem: Any) -> ModuleType:
    """Return the module of a backend.

    Args:
        backend: its name, or "auto" for the fastest one that can take the problem.
        problem: what the op runs on; has a ``device``.

    Returns:
        The module ``<package>.impl.<name>``; for "auto" the reference where no other backend can take the problem, with
        one warning where a backend is missing on this machine.

    Raises:
        RuntimeError: the backend asked for cannot run on this machine.
        ValueError: the backend asked for cannot take these tensors.
    """
    if backend != "auto":
        if (status := backend_status(backend)) != "ok":
            raise RuntimeError(f'backend="{backend}" cannot run here: {status}')
        if reason := implementation(backend).supports(problem):
            raise ValueError(f'backend="{backend}" cannot take these tensors: {reason}')
        return implementation(backend)
    missing = []
    for name in _FASTEST.get(problem.device.type, ()):
        if (status := backend_status(name)) != "ok":
            missing.append(f"{name}: {status}")
        elif implementation(name).supports(problem) is None:
            return implementation(name)
    if missing:
        _warn_once(f"{PACKAGE} runs on the slow reference path, for want of a faster backend: {'; '.join(missing)}")
    return implementation("reference")


def refuse_transforms(name: str, *tensors: Any) -> None:
    """Check that none of the arguments of an op belongs to a ``torch.func`` transform.

    Args:
        name: of the op, for the message.
        *tensors: the op's arguments; what is no tensor is passed over.

    Raises:
        NotImplementedError: one does; says what helps.
    """
    if torch.compiler.is_compiling():
        return
    if any(isinstance(x, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise NotImplementedError(
            f"{name}: torch.func transforms (grad, vjp, jvp, jacrev, vmap) are not supported; use backward or "
            "torch.autograd.grad for gradients, and one packed batch instead of vmap"
        )


@cache
def implementation(name: str) -> ModuleType:
    """Return the module of a backend, able to run or not.

    Args:
        name: one of ``BACKENDS``.

    Raises:
        ImportError: the backend needs a package that is not installed.
    """
    return importlib.import_module(f"{PACKAGE}.impl.{name}")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
