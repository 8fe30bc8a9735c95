"""Files and folders that appear whole or not at all, strict JSON, hashes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from runkit import files
from runkit.files import (
    MARK,
    atomic_file,
    atomic_folder,
    content_hash,
    file_hash,
    folder_hash,
    read_json,
    remove_folder,
    sweep,
    write_json,
    write_yaml,
)


@pytest.fixture(params=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return request.param


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def publish(final: Path, text: str, kind: str = "model") -> None:
    with atomic_folder(final, kind) as folder:
        (folder / "a").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text(text)


def test_a_file_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    final = tmp_path / "new" / "a.csv"
    with atomic_file(final) as path:
        assert path.parent == final.parent and path.suffix == ".csv" and not final.exists()
        path.write_text("one")
    assert final.read_text() == "one" and names(final.parent) == ["a.csv"]
    with pytest.raises(KeyboardInterrupt), atomic_file(final) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert final.read_text() == "one" and names(final.parent) == ["a.csv"]
    with pytest.raises(IsADirectoryError, match="needs the name of a file"), atomic_file(tmp_path / "new"):
        pass


def test_a_linked_file_is_written_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a").write_text("old")
    (tmp_path / "a").symlink_to(tmp_path / "far" / "a")
    with atomic_file(tmp_path / "a") as path:
        path.write_text("new")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "far" / "a").read_text() == "new"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, exchange: str) -> None:
    final = tmp_path / "models.v1"
    publish(final, "one")
    assert names(final) == [MARK, "a", "deep"] and read_json(final / MARK) == {"kind": "model"}
    publish(final, "two")
    assert (final / "deep" / "b").read_text() == "two"
    with pytest.raises(ValueError, match="no"), atomic_folder(final, "model") as folder:
        (folder / "a").write_text("half")
        raise ValueError("no")
    assert (final / "a").read_text() == "two" and names(tmp_path) == ["models.v1"]


@pytest.mark.parametrize("what", ["folder", "file", "kind", "broken mark", "link"])
def test_what_we_did_not_write_is_never_replaced(tmp_path: Path, exchange: str, what: str) -> None:
    final = tmp_path / "models"
    if what in ("file", "link"):
        (tmp_path / "mine").write_text("mine")
        (tmp_path / "mine").rename(final) if what == "file" else final.symlink_to(tmp_path / "mine")
    else:
        final.mkdir()
        (final / "mine").write_text("mine")
        if what != "folder":
            (final / MARK).write_text('{"kind": "data"}' if what == "kind" else "{")
    for act in (lambda: publish(final, "new"), lambda: remove_folder(final, "model")):
        with pytest.raises(FileExistsError, match="needs another name or to be moved away"):
            act()
    assert (final.read_text() if final.is_file() else (final / "mine").read_text()) == "mine"
    assert len(names(tmp_path)) == (2 if what == "link" else 1)


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path, exchange: str) -> None:
    final = tmp_path / "models"
    with pytest.raises(FileExistsError, match="never replaced"), atomic_folder(final, "model"):
        final.mkdir()
        (final / "mine").write_text("mine")
    assert names(tmp_path) == ["models"] and names(final) == ["mine"]


def test_an_empty_folder_is_taken_and_a_marked_one_removed(tmp_path: Path) -> None:
    final = tmp_path / "models"
    final.mkdir()
    with pytest.raises(FileExistsError):
        remove_folder(final, "model")
    publish(final, "one")
    remove_folder(final, "model")
    remove_folder(final, "model")
    assert names(tmp_path) == []


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def hidden(name: str, process: int, role: str, host: str = files._HOST) -> str:
    return f".{name}.{host}-{process}-0123abcd.{role}"


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    final = tmp_path / "models"
    publish(final, "one")
    kept = {
        hidden("models", os.getppid(), "new"),
        hidden("models", dead_process(), "new", host="00000000"),
        hidden("other", dead_process(), "new"),
        f"{hidden('models', dead_process(), 'new')}.bak",
        ".models.tmp",
        "models",
    }
    swept = {hidden("models", dead_process(), "new"), hidden("models", os.getpid(), "old")}
    for name in (kept | swept) - {"models"}:
        (tmp_path / name / "x").mkdir(parents=True)
    publish(final, "two")
    assert set(names(tmp_path)) == kept


def test_a_folder_set_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    final = tmp_path / "models"
    publish(final, "old")
    final.rename(tmp_path / hidden("models", dead_process(), "old"))
    (tmp_path / hidden("models", dead_process(), "new")).mkdir()
    sweep(final)
    assert (final / "a").read_text() == "old" and names(tmp_path) == ["models"]


def test_json_is_strict_and_plain(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {"n": np.float32("nan"), "i": [np.int64(3), float("inf")], "a": np.eye(2), 4: tmp_path, "ü": {"b", "a"}}
    write_json(path, content | {"t": (True, None)})
    assert json.loads(path.read_text("utf-8")) == {
        "n": None,
        "i": [3, None],
        "a": [[1.0, 0.0], [0.0, 1.0]],
        "4": str(tmp_path),
        "ü": ["a", "b"],
        "t": [True, None],
    }
    assert read_json(tmp_path / "none.json") == {}


@pytest.mark.parametrize("content", [b"{", b'{"a": NaN}', b"[1]", b"\xff", b"", b"[" * 100_000])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: .*needs"):
        read_json(tmp_path / "a.json")


def test_yaml_keeps_order_and_numbers_that_are_none(tmp_path: Path) -> None:
    write_yaml(tmp_path / "a.yaml", {"z": float("inf"), "a": (1, tmp_path)})
    text = (tmp_path / "a.yaml").read_text()
    assert text.index("z") < text.index("a:") and yaml.safe_load(text) == {"z": float("inf"), "a": [1, str(tmp_path)]}


def test_hashes_are_of_names_and_bytes(tmp_path: Path) -> None:
    publish(tmp_path / "one", "same")
    publish(tmp_path / "two", "same", kind="other")
    assert folder_hash(tmp_path / "one") == folder_hash(tmp_path / "two")
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "c")
    assert folder_hash(tmp_path / "one") != folder_hash(tmp_path / "two")
    assert file_hash(tmp_path / "one" / "a") == file_hash(tmp_path / "two" / "c")
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": (2,), "a": 1}) != content_hash({"a": 1, "b": [3]})
