"""Progress bars with one switch for all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_enabled = True


def show_progress(enabled: bool) -> None:
    """Turn all progress bars of this process on or off; an `App` does it by the setting ``progress``."""
    global _enabled
    _enabled = enabled


def progress(what: Iterable[Any] | int | None, desc: str, unit: str = "it") -> tqdm:
    """Return a bar on stderr over an iterable, or one that counts up to a number.

    Args:
        what: what is gone through, or how many `unit`s there will be; None where nobody knows
        desc: what is being done
        unit: what is counted, singular
    """
    over: dict[str, Any] = {"total": what} if what is None or isinstance(what, int) else {"iterable": what}
    return tqdm(**over, desc=desc, unit=f" {unit}s", disable=not _enabled, file=sys.stderr, mininterval=0.5)
