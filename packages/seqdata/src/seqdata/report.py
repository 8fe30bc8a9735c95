"""What an audit found, as text for a terminal and as one HTML file with plots."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

LEVELS = ("ok", "note", "warning", "error")
SPARKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Finding:
    """One result of one check: its level ("ok", "note", "warning", "error"), what was found, and the share or count."""

    level: str
    check: str
    message: str
    value: float = 0.0


@dataclass
class Report:
    """What an audit found; `worst` is the highest level."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    per_day: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    first_day: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    nulls: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        return max((finding.level for finding in self.findings), key=LEVELS.index, default="ok")

    def of(self, check: str) -> list[Finding]:
        """The findings of one check."""
        return [finding for finding in self.findings if finding.check == check]

    def to_text(self) -> str:
        """The report for a terminal."""
        lines = [self.title, ""]
        for finding in sorted(self.findings, key=lambda one: -LEVELS.index(one.level)):
            lines.append(f"  {finding.level:<8} {finding.check:<18} {finding.message}")
        lines += ["", f"  events per day   {_sparks(self.per_day)}  {self._days()}"]
        lines += [f"  events per user  {_sparks(self.lengths)}  1, 2, 4, 8, ... events"]
        return "\n".join(lines)

    def to_html(self, path: Path) -> None:
        """The report as one HTML file, plots included.

        Args:
            path: the file to write
        """
        rows = "".join(
            f'<tr class="{one.level}"><td>{one.level}</td><td>{html.escape(one.check)}</td>'
            f"<td>{html.escape(one.message)}</td></tr>"
            for one in sorted(self.findings, key=lambda one: -LEVELS.index(one.level))
        )
        bins = [f"{1 << i}" for i in range(len(self.lengths))]
        plots = _bars("Events per day", f"day, {self._days()}", "events", _thin(self.per_day, 120), None)
        plots += _bars("Users by number of events", "events per user, up to", "users", self.lengths, bins)
        shares = np.array(list(self.nulls.values()))
        plots += _bars("Missing values", "field", "share of events", shares, list(self.nulls)) if self.nulls else ""
        text = (
            "<!doctype html><html><head><meta"
            f" charset='utf-8'><title>{html.escape(self.title)}</title><style>body{{font:15px/1.5"
            " system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0"
            " 1em}table{border-collapse:collapse;width:100%}td{padding:.3em .6em;border-bottom:1px solid"
            " #ddd;vertical-align:top}.error td:first-child{color:#b00020;font-weight:600}.warning"
            " td:first-child{color:#9a6700;font-weight:600}.ok"
            " td:first-child{color:#1a7f37}svg{display:block;margin:1.5em"
            f" 0}}</style></head><body><h1>{html.escape(self.title)}</h1><table>{rows}</table>{plots}</body></html>\n"
        )
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

    def _days(self) -> str:
        last = self.first_day + len(self.per_day) - 1
        return f"{np.datetime64(self.first_day, 'D')} .. {np.datetime64(last, 'D')}"


def _thin(values: np.ndarray, most: int) -> np.ndarray:
    step = -(-len(values) // most)
    return np.add.reduceat(values, np.arange(0, len(values), step)) if step > 1 else values


def _sparks(values: np.ndarray) -> str:
    values = _thin(values, 60)
    top = max(values.max(), 1)
    return "".join(SPARKS[-(-int(value) * 8 // int(top))] for value in values)


def _bars(title: str, across: str, up: str, values: np.ndarray, names: list[str] | None) -> str:
    width, height, left, base = 720, 200, 70, 150
    top = float(values.max()) or 1.0
    step = (width - left - 10) / max(len(values), 1)
    bars = "".join(
        f'<rect x="{left + i * step:.1f}" y="{base - 120 * value / top:.1f}" width="{max(step - 1, 0.5):.1f}"'
        f' height="{120 * value / top:.1f}" fill="#4a6fa5"/>'
        for i, value in enumerate(values.tolist())
    )
    every = max(len(values) // 12, 1)
    marks = "".join(
        f'<text x="{left + (i + 0.5) * step:.1f}" y="{base + 14}" font-size="10"'
        f' text-anchor="middle">{html.escape(name[:14])}</text>'
        for i, name in enumerate(names or [])
        if i % every == 0
    )
    peak = f"{top:,.0f}" if top > 1 else f"{top:.2f}"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img"><title>{html.escape(title)}</title><text x="{left}" y="16" font-size="13"'
        f' font-weight="600">{html.escape(title)}</text>{bars}{marks}<line x1="{left}" y1="{base}" x2="{width - 10}"'
        f' y2="{base}" stroke="#888"/><text x="{left - 6}" y="36" font-size="10" text-anchor="end">{peak}</text><text'
        f' x="{left - 6}" y="{base}" font-size="10" text-anchor="end">0</text><text x="{left - 6}" y="52"'
        f' font-size="10" text-anchor="end">{html.escape(up)}</text><text x="{(width + left) / 2}" y="{base + 34}"'
        f' font-size="11" text-anchor="middle">{html.escape(across)}</text></svg>'
    )
