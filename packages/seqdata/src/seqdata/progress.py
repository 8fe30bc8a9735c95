"""A progress bar with the time left, on standard error, only where somebody looks at it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Progress:
    """`update(done)` redraws at most five times a second; `total` may be None where nobody knows it."""

    def __init__(self, label: str, total: int | None, unit: str, shown: bool) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.shown = shown and sys.stderr.isatty()
        self.begin = self.drawn = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self.shown and now - self.drawn > 0.2:
            self.drawn = now
            self._draw(done, now - self.begin)

    def after(self, before: int) -> Callable[[int], None]:
        """An `update` that counts on from `before`."""
        return lambda done: self.update(before + done)

    def close(self, done: int) -> None:
        if self.shown:
            self._draw(done, time.monotonic() - self.begin)
            sys.stderr.write("\n")

    def _draw(self, done: int, seconds: float) -> None:
        speed = done / seconds if seconds > 0 else 0.0
        line = f"{self.label:<10} {done:>13,} {self.unit} {speed:>12,.0f}/s {_clock(seconds)}"
        if self.total:
            share = min(done / self.total, 1.0)
            left = _clock(seconds * (1 - share) / share) if share > 0 else "?"
            line = (
                f"{self.label:<10} [{'#' * int(24 * share):<24}] {share:>4.0%} of {self.total:,} {self.unit}"
                f" {speed:>12,.0f}/s, {left} left"
            )
        sys.stderr.write("\r\x1b[K" + line)
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )
