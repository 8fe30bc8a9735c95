"""Checksums: every damaged file is named."""

from __future__ import annotations

import numpy as np
import pytest

import seqdata
from seqdata import checksums, cli, layout

KEYS = {"user": "user", "time": "time", "time_unit": "s", "progress": False}


@pytest.fixture
def store(tmp_path, oracle):
    log = oracle.log(rows=300)
    built = seqdata.build(log[:200], tmp_path / "s", **KEYS)
    return seqdata.append(built, log[200:], progress=False)


def test_whole_stores_are_whole(store):
    assert store.verify() == []
    assert seqdata.compact(store).verify() == []


@pytest.mark.parametrize("how", ["flip", "cut", "grow", "remove"])
def test_every_damaged_file_is_named(store, how):
    current = store.path / "fitted" / f"{store.schema['generation']:05d}"
    files = [path for path in [*store.path.glob("shards/**/*"), *current.rglob("*")] if path.is_file()]
    files += [store.path / "schema.json"]
    assert len(files) > 12
    for path in files:
        raw = path.read_bytes()
        if how == "flip":
            path.write_bytes(raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:])
        elif how == "remove":
            path.unlink()
        else:
            path.write_bytes(raw[:-1] if how == "cut" else raw + b"x")
        found = store.verify()
        assert len(found) == 1 and str(path) in found[0], (path, found)
        path.write_bytes(raw)
    assert store.verify() == []


def test_an_append_blesses_no_damage(store, oracle):
    path = store.path / "shards" / "00000" / "time.npy"
    raw = path.read_bytes()
    path.write_bytes(raw[:-3] + bytes([raw[-3] ^ 4]) + raw[-2:])
    later = seqdata.append(store, oracle.log(seed=5, rows=50), progress=False)
    assert [str(path) in one for one in later.verify()] == [True]


def test_checksums_that_lead_outside_are_not_followed(store):
    path = store.path / "fitted" / "00001" / "checksums.json"
    files = {"../../secret": {"bytes": 1, "crc32": "00000000"}}
    path.write_text(layout.to_json(checksums._signed(files)))
    assert "checksums.json is missing or damaged" in store.verify()[0]


def test_verify_on_the_command_line(store, capsys):
    assert cli.main(["verify", str(store.path)]) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    path = store.path / "shards" / "00001" / "time.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert cli.main(["verify", str(store.path)]) == 1
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize("at", range(0, 128, 3))
def test_a_flipped_bit_in_a_header_is_damage(tmp_path, at):
    path = tmp_path / "a.npy"
    layout.write_array(path, np.arange(14))
    raw = bytearray(path.read_bytes())
    for bit in range(8):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :])
        try:
            values = layout.read_array(path, (14,))
        except layout.StoreError as error:
            assert "a.npy" in str(error)
        else:
            # another type of the same size, or a space that is none: the checksum tells
            assert values.shape == (14,)
