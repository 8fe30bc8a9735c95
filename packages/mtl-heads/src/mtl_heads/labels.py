"""Labels are checked where they come in: one outside its range is an error that names the task, not a silent lesson."""

import torch
from torch import Tensor


def check_labels(labels: Tensor, fits: Tensor, mask: Tensor | None, task: str, needs: str) -> None:
    """Refuse present labels that do not fit.

    Eager code raises. Under ``torch.compile``, and on CUDA where nothing else waits for the device (labels without a
    mask), the check runs on the device without a wait and ends the run with the same message.

    Args:
        labels: of any shape.
        fits: bool, same shape; True = in range.
        mask: bool, the labels' shape or its first axes; True = present.
        task: the task's name.
        needs: what a label must be.

    Raises:
        ValueError: On a present label that does not fit.
    """
    if mask is not None:
        fits = fits | ~mask.reshape(mask.shape + (1,) * (fits.dim() - mask.dim()))
    if torch.compiler.is_compiling() or (labels.is_cuda and mask is None):
        torch._assert_async(fits.all(), f"targets of task {task!r}: got a label out of range, needs {needs}")
    elif not bool(fits.all()):
        wrong = labels[~fits].unique()
        shown = ", ".join(f"{value:.10g}" for value in wrong[:3].tolist()) + (", ..." if len(wrong) > 3 else "")
        raise ValueError(
            f"targets of task {task!r}: got {shown}, needs {needs} "
            "(a missing label is NaN, TaskSpec's `missing` value, or False in the mask)"
        )


def whole_below(labels: Tensor, size: int) -> Tensor:
    """Where labels are whole numbers 0 .. size - 1 (bool, same shape)."""
    inside = (labels >= 0) & (labels < size)
    return inside & (labels == labels.floor()) if labels.is_floating_point() else inside
