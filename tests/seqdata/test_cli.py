"""The command line and its configurations."""

from __future__ import annotations

import subprocess
import sys

import pytest

import seqdata
from seqdata.cli import main
from seqdata.config import load_config, shipped

CONFIG = """
sources:
  buy: ${LOG}/buy.csv
  view: {sql: "SELECT 1 AS user, TIMESTAMP '2022-01-05' AS time, 7 AS item"}
out: unused
user: user
time: time
fit_before: 2022-01-04
fields: {item: {kind: categorical, min_count: 1}}
items: {item: {source: "${LOG}/items.csv", key: item, fields: {colour: categorical}}}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("LOG", str(tmp_path))
    (tmp_path / "buy.csv").write_text("user,time,item\n1,2022-01-01,5\n2,2022-01-02,6\n")
    (tmp_path / "items.csv").write_text("item,colour\n5,red\n6,blue\n")
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "c.yaml"


def test_build_and_info(config, tmp_path, capsys):
    arguments = ["build", "--config", str(config), "--out", str(tmp_path / "s"), "--no-progress"]
    assert main(arguments) == 0
    assert "2 users, 3 events" in capsys.readouterr().out
    store = seqdata.open_store(tmp_path / "s")
    assert store.vocabulary("item").values.tolist() == [5, 6]
    assert store.vocabulary("item.colour").values.tolist() == ["blue", "red"]
    assert main(["info", str(tmp_path / "s")]) == 0
    shown = capsys.readouterr().out
    for text in (
        "users        2 (user, int64)",
        "2022-01-04T00:00:00Z",
        "item: categorical int64, 4 ids",
        "table        buy: 2 rows",
    ):
        assert text in shown
    assert main(arguments) == 2
    assert "overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--fit-before", "2022-01-02", "--shards", "2"]) == 0
    assert seqdata.open_store(tmp_path / "s").vocabulary("item").values.tolist() == [5]


def test_append_and_compact(config, tmp_path, capsys):
    folder = str(tmp_path / "s")
    assert main(["build", "--config", str(config), "--out", folder, "--no-progress"]) == 0
    (tmp_path / "more.csv").write_text("user,time,item\n1,2022-02-01,9\n3,2022-02-02,5\n")
    (tmp_path / "more.yaml").write_text("sources: {buy: '${LOG}/more.csv'}\nfit_before: 2022-03-01\n")
    assert main(["append", folder, "--config", str(tmp_path / "more.yaml"), "--no-progress"]) == 0
    assert "added 2 events" in capsys.readouterr().out
    assert main(["compact", folder]) == 0
    assert "one shard: 3 users, 5 events" in capsys.readouterr().out
    store = seqdata.open_store(folder)
    assert store.vocabulary("item").values.tolist() == [5, 6, 9]
    assert store.vocabulary("item.colour").decode(store.item_column("item", "colour")) == [
        None,
        None,
        "red",
        "blue",
        None,
    ]


def test_mistakes_are_one_line(config, tmp_path, capsys, monkeypatch):
    assert main(["info", str(tmp_path / "nothing")]) == 2
    assert "seqdata info: no store at" in capsys.readouterr().err
    assert main(["build", "--config", "nothing"]) == 2
    assert "the package brings" in capsys.readouterr().err
    monkeypatch.delenv("LOG")
    assert main(["build", "--config", str(config)]) == 2
    assert "${LOG}, which the environment does not set" in capsys.readouterr().err
    config.write_text("sources: x\nuzer: y\n")
    assert main(["build", "--config", str(config)]) == 2
    assert "unknown key(s) ['uzer']" in capsys.readouterr().err
    config.write_text("sources: x\nuser: y\n")
    assert main(["build", "--config", str(config)]) == 2
    assert "lacks 'out'" in capsys.readouterr().err
    config.write_text("a: [")
    assert main(["build", "--config", str(config)]) == 2
    assert "not valid YAML" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    shown = capsys.readouterr().out
    assert "example of a configuration" in shown
    assert "rees46" in shown


def test_shipped_configurations_load(monkeypatch):
    monkeypatch.setenv("FOOTFALL_DATA", "/data")
    assert {"lgsr", "movielens_small", "online_retail", "rees46"} <= set(shipped())
    for name in shipped():
        assert {"sources", "out", "user", "time", "fit_before"} <= set(load_config(name))


def test_import_needs_no_torch():
    code = (
        "import sys; sys.modules.update({n: None for n in ('torch', 'pandas', 'polars', 'dask', 'distributed')});"
        "import seqdata, seqdata.cli; assert seqdata.build\n"
        "try: seqdata.SequenceLoader\n"
        "except ImportError as e: assert 'seqdata[torch]' in str(e)\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_build_and_append_without_a_configuration(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("who,when,x\n1,5,2\n1,5,2\n2,6,3\n")
    (tmp_path / "b.csv").write_text("who,when,x\n2,7,3\n")
    out = str(tmp_path / "s")
    columns = ["--user", "who", "--time", "when", "--time-unit", "s", "--out", out, "--no-progress"]
    assert main(["build", str(tmp_path / "a.csv"), "--dedup", "--field", "x=numeric", *columns]) == 0
    store = seqdata.open_store(out)
    assert store.column("x").tolist() == [2.0, 3.0]
    assert store.time.tolist() == [5_000_000, 6_000_000]
    assert main(["append", out, str(tmp_path / "b.csv"), "--no-progress"]) == 0
    capsys.readouterr()
    assert main(["append", out, str(tmp_path / "b.csv"), "--no-progress"]) == 2
    assert "taken='skip'" in capsys.readouterr().err
    assert main(["append", out, str(tmp_path / "b.csv"), "--taken", "skip"]) == 0
    assert "added 0 events" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["build", "a.csv", "--out", "s", "--user", "who"], 2, "seqdata build: needs --time (or --config)"),
        (["build", "--out", "s"], 2, "seqdata build: needs sources, or --config"),
        (["build", "a.csv", "--out", "s", "--user", "u", "--time", "t", "--field", "x"], 2, "needs NAME=KIND"),
        (["build", "none.csv", "--out", "s", "--user", "u", "--time", "t"], 2, "no such file"),
        (["info", "nowhere"], 2, "no store at"),
        (["info", "."], 1, "not a complete store"),
        (["build", "a.csv", "--out", "/proc/none/s", "--user", "who", "--time", "when", "--time-unit", "s"], 2, ""),
    ],
)
def test_errors_are_one_line_with_a_code(tmp_path, monkeypatch, capsys, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("who,when,x\n1,5,2\n")
    assert main(arguments) == code
    told = capsys.readouterr().err
    assert says in told and told.startswith(f"seqdata {arguments[0]}: ") and told.count("\n") == 1


def test_full_disk_is_one_line_and_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.csv").write_text("who,when\n1,2024-01-01\n")

    def full(file, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqdata.layout.write_all", full)
    monkeypatch.setattr("seqdata.spool.write_all", full)
    command = ["build", str(tmp_path / "a.csv"), "--user", "who", "--time", "when", "--out", str(tmp_path / "s")]
    assert main([*command, "--no-progress"]) == 1
    assert "no space left while building" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"seqdata {seqdata.__version__}\n"
