"""Sequences of different lengths back to back: values and offsets, nothing padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Jagged:
    """`values` maps field names to arrays [T, ...]; sequence i is rows offsets[i]:offsets[i + 1] of each.

    Arrays are numpy or torch, all of one kind. offsets int64 [B + 1], first 0, last T.
    """

    values: Mapping[str, Any]
    offsets: Any

    def __repr__(self) -> str:
        return f"Jagged({len(self)} sequences, {int(self.offsets[-1])} rows, fields {list(self.values)})"

    @property
    def lengths(self) -> Any:
        """[B] rows per sequence."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def max_len(self) -> int:
        """Rows of the longest sequence, 0 without sequences."""
        return int(self.lengths.max()) if len(self) else 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def torch(self) -> Jagged:
        """The same as torch tensors, without a copy where the memory allows it."""
        if not isinstance(self.offsets, np.ndarray):
            return self
        return Jagged({name: to_tensor(array) for name, array in self.values.items()}, to_tensor(self.offsets))

    def to(self, device: Any, non_blocking: bool = False) -> Jagged:
        """The same on a torch device.

        Args:
            device: a torch device or its name
            non_blocking: do not wait for the copy, which takes pinned memory
        """
        jagged = self.torch()
        values = {name: array.to(device, non_blocking=non_blocking) for name, array in jagged.values.items()}
        return Jagged(values, jagged.offsets.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Jagged:
        """The same in page-locked memory, as torch's DataLoader asks for."""
        jagged = self.torch()
        return Jagged({name: array.pin_memory() for name, array in jagged.values.items()}, jagged.offsets.pin_memory())

    def to_padded(self, max_len: int | None = None, fill: Any = 0, side: str = "right") -> tuple[dict[str, Any], Any]:
        """Pads every sequence to one width.

        Args:
            max_len: the width L, of longer sequences the last rows are kept; None is the longest sequence
            fill: value of padding, one for all or {field: value}
            side: "right" or "left", where padding goes

        Returns:
            {field: [B, L, ...]} and a mask [B, L] that is True on real rows

        Raises:
            ValueError: another side
        """
        if side not in ("right", "left"):
            raise ValueError(f"side={side!r}: needs 'right' or 'left'")
        if not isinstance(self.offsets, np.ndarray):
            padded, mask = Jagged(
                {name: array.numpy() for name, array in self.values.items()}, self.offsets.numpy()
            ).to_padded(max_len, fill, side)
            return {name: to_tensor(array) for name, array in padded.items()}, to_tensor(mask)
        lengths = self.lengths
        width = self.max_len if max_len is None else max_len
        kept = np.minimum(lengths, width)
        column = np.arange(width)
        shift = (width - kept)[:, None] if side == "left" else 0
        position = column[None, :] - shift
        mask = (position >= 0) & (position < kept[:, None])
        rows = ((self.offsets[1:] - kept)[:, None] + position)[mask]
        padded = {}
        for name, array in self.values.items():
            value = fill.get(name, 0) if isinstance(fill, Mapping) else fill
            out = np.full((len(self), width, *array.shape[1:]), value, array.dtype)
            out[mask] = array[rows]
            padded[name] = out
        return padded, mask

    @staticmethod
    def from_padded(values: Mapping[str, Any], mask: Any) -> Jagged:
        """Drops the padding of {field: [B, L, ...]}; mask [B, L] is True on real rows.

        Args:
            values: {field: [B, L, ...]}, numpy or torch
            mask: [B, L] of bool, in the same library

        Returns:
            The real rows of each sequence, in their order
        """
        offsets: Any
        if isinstance(mask, np.ndarray):
            offsets = np.append(np.int64(0), np.cumsum(mask.sum(1)))
        else:
            import torch

            offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return Jagged({name: array[mask] for name, array in values.items()}, offsets)

    def to_keyed_jagged(self, fields: Sequence[str] | None = None) -> dict[str, Any]:
        """The arguments of torchrec's KeyedJaggedTensor: `KeyedJaggedTensor(**jagged.to_keyed_jagged(["item"]))`.

        Args:
            fields: one-dimensional fields of one dtype; None takes all integer ones but "timestamp"

        Returns:
            keys, the K field names; values [K * T], key after key; lengths [K * B]; offsets [K * B + 1]; all torch

        Raises:
            ValueError: a field has more dimensions, or the fields have several dtypes
        """
        import torch

        jagged = self.torch()
        if fields is None:
            whole = (name for name, one in jagged.values.items() if one.ndim == 1 and not one.is_floating_point())
            fields = [name for name in whole if name != "timestamp"]
        kinds = {(jagged[name].dtype, jagged[name].ndim) for name in fields}
        if len(kinds) != 1 or next(iter(kinds))[1] != 1:
            have = {name: f"{one.dtype} {list(one.shape)}" for name, one in jagged.values.items()}
            raise ValueError(
                f"to_keyed_jagged: fields={list(fields)}; needs one-dimensional fields of one dtype: {have}"
            )
        lengths = jagged.lengths.repeat(len(fields))
        return {
            "keys": list(fields),
            "values": torch.cat([jagged[name] for name in fields]),
            "lengths": lengths,
            "offsets": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        }

    def to_nested(self) -> dict[str, Any]:
        """{field: torch.nested tensor of jagged layout}."""
        import torch

        jagged = self.torch()
        return {
            name: torch.nested.nested_tensor_from_jagged(array, jagged.offsets) for name, array in jagged.values.items()
        }

    @staticmethod
    def from_nested(values: Mapping[str, Any]) -> Jagged:
        """Back from {field: torch.nested tensor of jagged layout}; all fields share their offsets.

        Args:
            values: nested tensors [B, *, ...], one a field
        """
        offsets = next(iter(values.values())).offsets()
        return Jagged({name: array.values() for name, array in values.items()}, offsets)


def to_tensor(array: np.ndarray) -> Any:
    """A torch tensor of an array, shared memory where it is writable."""
    import torch

    return torch.from_numpy(array if array.flags.writeable else array.copy())
