"""What every result is written with: where it comes from, and files that appear whole."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(seed: int, *packages: str) -> dict[str, str]:
    """Return date, machine, load, commit, command and seed of this run, and the versions of `packages`."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "commit": git.stdout.strip() or "unknown",
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_shown, sys.argv[1:])]),
        "seed": str(seed),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def machine() -> str:
    """Return the number of cores and the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{os.cpu_count()}-core {names[0] if names else platform.processor() or platform.machine()}"


def header(facts: dict[str, str]) -> str:
    """Return the facts as a paragraph of a results file."""
    return ", ".join(f"`{value}`" if name == "command" else f"{name} {value}" for name, value in facts.items()) + "."


def write(out: Path, report: dict[str, Any], text: str) -> None:
    """Write OUT.json and OUT.md, each in one step."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(report, indent=1) + "\n"), (".md", text)):
        fresh = out.with_suffix(suffix + ".part")
        fresh.write_text(content)
        fresh.replace(out.with_suffix(suffix))


def _shown(word: str) -> str:
    # Where the data lies on this machine says nothing about the result.
    if word.startswith("/"):
        return "DATA"
    return f'"{word}"' if " " in word else word
