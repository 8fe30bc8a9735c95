"""A folder appears whole, and nothing that was not generated is lost."""

import os
import subprocess
import sys

import pytest

from synthlogs import folder as module
from synthlogs.folder import MARK, whole_folder, write_mark

FILES = ("*.txt", "deep/*.txt")


def write(final, text):
    with whole_folder(final, FILES) as new:
        (new / "deep").mkdir()
        (new / "deep" / "a.txt").write_text(text)
        write_mark(new, {"log": "test"})


@pytest.mark.parametrize("exchange", [True, False])
def test_a_generated_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    final = tmp_path / "new" / "log"
    write(final, "one")
    write(final, "two")
    assert (final / "deep" / "a.txt").read_text() == "two"
    assert [path.name for path in final.parent.iterdir()] == ["log"]


@pytest.mark.parametrize("foreign", ["mine.csv", "deep/mine.csv", "empty/", "link"])
def test_a_folder_with_something_foreign_is_left_alone(tmp_path, foreign):
    final = tmp_path / "log"
    write(final, "one")
    if foreign.endswith("/"):
        # Empty folders hold nothing that could be lost, files do.
        (final / foreign).mkdir()
        (final / foreign / "mine").write_text("mine")
    elif foreign == "link":
        (final / foreign).symlink_to(tmp_path)
    else:
        (final / foreign).write_text("mine")
    with pytest.raises(FileExistsError, match="left alone"):
        write(final, "two")
    assert (final / "deep" / "a.txt").read_text() == "one"


def test_a_folder_without_the_mark_or_a_file_is_left_alone_and_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"a\.txt"):
        write(tmp_path, "two")
    with pytest.raises(FileExistsError, match="is a file"):
        write(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "one")
    assert (tmp_path / "empty" / MARK).exists()


def test_what_appears_while_the_log_is_drawn_is_not_lost(tmp_path):
    final = tmp_path / "log"
    with pytest.raises(FileExistsError), whole_folder(final, FILES):
        final.mkdir()
        (final / "mine").write_text("mine")
    assert (final / "mine").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_failure_leaves_nothing_and_what_killed_processes_left_is_swept(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    killed = tmp_path / f".log.synthlogs-{int(dead.stdout)}.tmp"
    running = tmp_path / f".log.synthlogs-{os.getppid()}.tmp"
    for path in (killed, running):
        path.mkdir()
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "log", FILES):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == [running]
