"""Progress bars that can be turned off for the whole process."""

from __future__ import annotations

import sys

from tqdm import tqdm

_enabled = True


def show_progress(enabled: bool) -> None:
    """Turn all progress bars of this process on or off."""
    global _enabled
    _enabled = enabled


def progress(total: int, what: str, unit: str) -> tqdm:
    """Return a bar on stderr that says `what` is being done and counts up to `total` `unit`s."""
    return tqdm(total=total, desc=what, unit=f" {unit}s", disable=not _enabled, file=sys.stderr, mininterval=0.5)
