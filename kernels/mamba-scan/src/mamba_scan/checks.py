"""The checks of every contract: each raises a ValueError that names the argument, what it got and what it needs."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def require(condition: bool, name: str, got: Any, needs: str) -> None:
    """Raise the ValueError every check of the package raises: argument, what it got, what it needs.

    ``got`` is the argument, described only where it is wrong, or a text already.

    Args:
        condition: what must hold.
        name: of the argument.
        got: the argument, or a text.
        needs: what the argument needs, for the message.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(f"{name}: got {got if isinstance(got, str) else describe(got)}, needs {needs}")


def describe(x: Any) -> str:
    """What an error says of an argument: dtype and shape of a tensor, type and value of anything else."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)}"
    return f"{type(x).__name__} {' '.join(repr(x).split()):.60}"


def check_tensors(**tensors: Any) -> None:
    """Check that arguments are tensors.

    Raises:
        ValueError: one is none; named.
    """
    for name, x in tensors.items():
        require(isinstance(x, Tensor), name, x, "a tensor")


def check_optional_tensors(**tensors: Any) -> None:
    """Check that arguments are tensors or None.

    Raises:
        ValueError: one is neither; named.
    """
    for name, x in tensors.items():
        require(x is None or isinstance(x, Tensor), name, x, "a tensor or None")


def check_real(**tensors: Tensor | None) -> None:
    """Check that tensors, where given, have a real floating dtype.

    Raises:
        ValueError: one has another dtype; named.
    """
    for name, x in tensors.items():
        require(x is None or x.is_floating_point(), name, x, "a real floating dtype")


def check_flags(**flags: Any) -> None:
    """Check that switches are True or False: a tensor in the wrong place would switch something on.

    Raises:
        ValueError: one is neither; named.
    """
    for name, x in flags.items():
        require(isinstance(x, bool), name, x, "True or False")


def check_counts(**counts: Any) -> None:
    """Check that numbers are whole and at least 1.

    Raises:
        ValueError: one is not; named.
    """
    for name, x in counts.items():
        whole = isinstance(x, int | torch.SymInt) and not isinstance(x, bool)
        require(whole and x >= 1, name, x, "a whole number of at least 1")


def check_range(name: str, limits: Any, above: float | None = None) -> tuple[float, float]:
    """Check that limits are two numbers that rise, or are the same, and lie above another if given; return them.

    Args:
        name: of the argument.
        limits: smallest and largest.
        above: what both must lie above; None for no such bound.

    Returns:
        Smallest and largest, as floats.

    Raises:
        ValueError: these are not two numbers in that order, or they lie too low.
    """
    try:
        low, high = (float(limit) for limit in limits)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {describe(limits)}, needs two numbers, smallest and largest") from None
    require(low <= high, name, f"{low} to {high}", "two numbers, the smaller one first")
    require(above is None or low > above, name, f"{low} to {high}", f"numbers above {above}")
    return low, high


def check_device(like: Tensor, **others: Tensor | None) -> None:
    """Check that every tensor lives where the first argument lives.

    Args:
        like: tensor where all others must live.
        **others: tensors by argument name; None is passed over.

    Raises:
        ValueError: one lives elsewhere; named.
    """
    for name, x in others.items():
        if x is not None and x.device != like.device:
            require(False, name, f"a tensor on {x.device}", str(like.device))


def check_offsets(offsets: Any, name: str = "offsets") -> None:
    """Check the form of packed offsets; their values are looked at when the op runs.

    Args:
        offsets: what was given.
        name: of the argument.

    Raises:
        ValueError: these are no int32 or int64 [S + 1].
    """
    right = isinstance(offsets, Tensor) and offsets.dim() == 1 and offsets.shape[0] > 0 and offsets.dtype in INTEGERS
    require(right, name, offsets, "int32 or int64 [S + 1]")


def check_offset_values(offsets: Tensor | None, rows: int, name: str = "offsets") -> None:
    """Check that offsets begin with 0, end with the number of rows and never fall; only where that costs no wait.

    Args:
        offsets: int32 or int64 [S + 1]; on a card they are not looked at.
        rows: number of packed rows.
        name: of the argument.

    Raises:
        ValueError: they begin, end or go on otherwise; says where.
    """
    if offsets is None or offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    require(first == 0, name, f"first value {first}", "0")
    require(last == rows, name, f"last value {last}", f"the number of rows, {rows}")
    falls = offsets[1:] < offsets[:-1]
    if bool(falls.any()):
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"{name}: got {int(offsets[at + 1])} after {int(offsets[at])} at position {at + 1}, "
            "needs offsets that never fall"
        )


def check_slots(name: str, index: Tensor, rows: int, slots: int) -> None:
    """Check which slots the rows of a batch use; values only where that costs no wait and nothing is being compiled.

    Args:
        name: of the argument.
        index: the slot of each row, negative for padding.
        rows: rows of the batch.
        slots: how many slots there are.

    Raises:
        ValueError: the form is wrong, a slot does not exist, or is used twice.
    """
    right = index.dim() == 1 and index.shape[0] == rows and index.dtype in INTEGERS
    require(right, name, index, f"int32 or int64 [{rows}]")
    if torch.compiler.is_compiling() or index.device.type != "cpu":
        return
    used = [slot for slot in index.tolist() if slot >= 0]
    if used and max(used) >= slots:
        at = int((index >= slots).nonzero()[0])
        raise ValueError(f"{name}: got {int(index[at])} at position {at}, needs slots below {slots}")
    if len(set(used)) < len(used):
        twice = next(slot for slot in used if used.count(slot) > 1)
        raise ValueError(f"{name}: got slot {twice} twice, needs every slot at most once")
