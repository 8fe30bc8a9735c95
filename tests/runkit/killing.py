"""Kills processes that replace a folder or a file, and says what they left; `test_kills.py` starts it.

A process of its own, because it forks: `python killing.py FOLDER steps|moments TRIES exchange|renames`.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from runkit import files
from runkit.files import MARK, atomic_folder, read_json, sweep, write_json

NAMES = ["a", "b/c"]


def publish(final: Path, text: str) -> None:
    with atomic_folder(final, "model") as folder:
        for name in NAMES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text * 1000)


def found_in(final: Path) -> str:
    """The text that all files of a folder hold; anything else about it is an error."""
    assert sorted(str(p.relative_to(final)) for p in final.rglob("*") if p.is_file()) == sorted([MARK, *NAMES])
    texts = {(final / name).read_text() for name in NAMES}
    assert len(texts) == 1 and read_json(final / MARK) == {"kind": "model"}
    text = texts.pop()
    assert text == text[:1] * 1000
    return text[0]


def forked(act: Callable[[], None], watch: Callable[[int], None] = lambda child: None) -> bool:
    """Whether a child that acts came to its end; `watch` may kill it."""
    child = os.fork()
    if not child:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    watch(child)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), "it failed by itself"
    return status == 0


def dies_at(step: int, act: Callable[[], None]) -> Callable[[], None]:
    """The act, in a process that dies just before it asks the system for the file operation of that number."""

    def acting() -> None:
        left = [step]

        def count(event: str, _: tuple) -> None:
            if event.startswith(("os.", "open", "shutil.", "ctypes.")):
                left[0] -= 1
                # The kill is such an operation itself.
                if left[0] == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        act()

    return acting


def swept(folder: Path, final: Path) -> str:
    sweep(final)
    assert os.listdir(folder) == [final.name], os.listdir(folder)
    return found_in(final)


def steps(folder: Path) -> list[str]:
    """Kill at every step; the next writer, killed too, must not lose anything either."""
    final, step, ends = folder / "model", 0, []
    while True:
        publish(final, "o")
        ended = forked(dies_at(step, lambda: publish(final, "n")))
        for again in range(step % 3):
            forked(dies_at(3 * again + step % 4, lambda: sweep(final)))
        ends.append(swept(folder, final))
        if ended:
            return ends
        step += 1


def moments(folder: Path, tries: int) -> list[str]:
    """Kill at random moments of the time that one replacement takes."""
    final, ends = folder / "model", []
    publish(final, "o")
    began = time.perf_counter()
    assert forked(lambda: publish(final, "o"))
    took = time.perf_counter() - began

    def kill(child: int) -> None:
        time.sleep(random.uniform(0, 1.3 * took))
        os.kill(child, signal.SIGKILL)

    for number in range(tries):
        old, new = "no" if number % 2 else "on"
        if found_in(final) != old:
            publish(final, old)
        forked(lambda new=new: publish(final, new), kill)
        ends.append("n" if swept(folder, final) == new else "o")
    return ends


def file_steps(folder: Path) -> list[str]:
    path, step, ends = folder / "metrics.json", 0, []
    while True:
        write_json(path, {"x": "o"})
        ended = forked(dies_at(step, lambda: write_json(path, {"x": "n"})))
        assert set(read_json(path)) == {"x"}
        ends.append(read_json(path)["x"])
        sweep(path)
        assert os.listdir(folder) == [path.name]
        if ended:
            return ends
        step += 1


if __name__ == "__main__":
    # It is for power cuts; a kill loses nothing that was handed to the system.
    os.fsync = lambda handle: None  # type: ignore[assignment]
    folder, what, tries, way = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    if way == "renames":
        files._exchange = lambda one, other: False
    found = {"steps": lambda: steps(folder), "file": lambda: file_steps(folder)}
    print(json.dumps(found[what]() if what in found else moments(folder, tries)))
