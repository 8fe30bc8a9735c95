"""`hatch run fuzz`: every module of this folder in turn until the time is up; exits 1 on a fault.

A module has `tries(seed, seconds) -> dict[str, int]`: it draws cases from `seed` until `seconds` are over, compares
each with an oracle, and returns how many of each kind it tried. A fault is an AssertionError, or any other error, that
names its seed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def main() -> int:
    """Run the modules named, or all, in turn; return 0, or 1 after a fault."""
    parser = argparse.ArgumentParser(prog="hatch run fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=MODULES, help=f"which ones; all: {', '.join(MODULES)}")
    parser.add_argument("--minutes", type=float, default=30, help="how long in all (default: 30)")
    parser.add_argument("--turn", type=float, default=60, help="seconds a module has before the next one's turn")
    parser.add_argument("--seed", type=int, default=0, help="the first turn's seed; every turn has the next one")
    given = parser.parse_args()
    if unknown := set(given.modules) - set(MODULES):
        parser.error(f"modules: got {', '.join(sorted(unknown))}, needs some of {', '.join(MODULES)}")
    end, seed, faults = time.monotonic() + 60 * given.minutes, given.seed, 0
    counts: dict[str, Counter[str]] = {name: Counter() for name in given.modules}
    while time.monotonic() < end:
        for name in given.modules:
            seconds = min(given.turn, end - time.monotonic())
            if seconds <= 0:
                break
            try:
                counts[name].update(importlib.import_module(f"tests.fuzz.{name}").tries(seed, seconds))
            except Exception:
                faults += 1
                print(f"FAULT in {name}, seed {seed}", flush=True)
                traceback.print_exc()
            print(f"{name}, seed {seed}: {_listed(counts[name])}", flush=True)
        seed += 1
    print(f"\n{given.minutes:g} minutes, seeds {given.seed} to {seed - 1}, {faults} faults")
    for name, count in counts.items():
        print(f"  {name:20} {_listed(count)}")
    return 1 if faults else 0


def _listed(count: Counter[str]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in sorted(count.items())) or "nothing yet"


if __name__ == "__main__":
    sys.exit(main())
