"""Statistics that stay exact when a model is made half precision."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose floating buffers ``half()``, ``bfloat16()`` and ``to(dtype)`` move but never narrow."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self.named_buffers(recurse=False))
        module = super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self.get_buffer(name)
            if buffer.is_floating_point() and moved.dtype.itemsize < buffer.dtype.itemsize:
                setattr(self, name, buffer.to(moved.device))
        return module
