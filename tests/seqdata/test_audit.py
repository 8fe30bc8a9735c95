"""The audit finds what is planted, and nothing where nothing is."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

import seqdata
from seqdata.cli import main

DAY = 86_400
START = 19_000 * DAY
CUT = START + 60 * DAY


def clean_log(rows: int = 4000) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    time = START + np.sort(rng.choice(90 * DAY, rows, replace=False))
    return pd.DataFrame(
        {"user": rng.integers(0, 80, rows), "time": time, "item": rng.integers(0, 30, rows), "price": rng.random(rows)}
    )


def build(log: pd.DataFrame, folder, **options) -> seqdata.Store:
    options = {"fit_before": CUT * 1_000_000} | options
    return seqdata.build(
        log, folder / "s", user="user", time="time", time_unit="s", progress=False, overwrite=True, **options
    )


def levels(report: seqdata.Report, check: str) -> set[str]:
    return {finding.level for finding in report.of(check)}


def test_a_clean_store_is_clean(tmp_path):
    report = seqdata.audit(
        build(clean_log(), tmp_path), labels=(CUT * 1_000_000, (CUT + DAY) * 1_000_000), inputs_before=CUT * 1_000_000
    )
    assert report.worst == "note"
    for check in ("vocabulary", "label window", "duplicates", "clock jump"):
        assert levels(report, check) == {"ok"}, check
    assert report.per_day.sum() == 4000
    assert report.lengths.sum() == 80


def test_vocabulary_fitted_after_the_cutoff(tmp_path):
    for options in ({"fit_before": None}, {"fit_before": (CUT + 5) * 1_000_000}):
        report = seqdata.audit(build(clean_log(), tmp_path, **options), cutoff=CUT * 1_000_000)
        assert levels(report, "vocabulary") == {"error"}
        assert "past the cutoff" in report.of("vocabulary")[0].message
    assert levels(seqdata.audit(build(clean_log(), tmp_path, fit_before=None)), "vocabulary") == {"warning"}


def test_vocabulary_that_lies_about_its_cutoff(tmp_path):
    log = clean_log()
    log.loc[log.index[-5:], "item"] = 99
    # the schema says that nothing after the cutoff was seen, the ids say otherwise
    store = build(log, tmp_path, fit_before=None)
    schema = store.path / "schema.json"
    schema.write_text(schema.read_text().replace('"fit_before": null', f'"fit_before": {CUT * 1_000_000}'))
    report = seqdata.audit(seqdata.open_store(store.path))
    assert "error" in levels(report, "vocabulary")
    assert "item: 1 value(s) have an id but no event before" in report.of("vocabulary")[1].message


def test_label_window_rows_in_the_inputs(tmp_path):
    store, window = build(clean_log(), tmp_path), (CUT * 1_000_000, (CUT + 14 * DAY) * 1_000_000)
    late = seqdata.audit(store, labels=window, inputs_before=(CUT + DAY) * 1_000_000)
    inside = int(((clean_log().time >= CUT) & (clean_log().time < CUT + DAY)).sum())
    assert [(f.level, f.value) for f in late.of("label window")] == [("error", inside)]
    whole = seqdata.audit(store, labels=window)
    assert [f.level for f in whole.of("label window")] == ["error", "error"]


def test_appending_properly_is_no_leak(tmp_path):
    log = clean_log()
    old = log[log.time < CUT - 20 * DAY]
    store = build(old, tmp_path, fit_before=(CUT - 20 * DAY) * 1_000_000)
    store = seqdata.append(store, log[log.time >= CUT - 20 * DAY], fit_before=CUT * 1_000_000, progress=False)
    report = seqdata.audit(store)
    assert report.worst == "note"
    assert "error" in levels(seqdata.audit(store, cutoff=(CUT - DAY) * 1_000_000), "vocabulary")


def test_statistics_fitted_after_the_cutoff(tmp_path):
    times = {"price mean": CUT * 1_000_000 + 1, "price spread": CUT * 1_000_000}
    report = seqdata.audit(build(clean_log(), tmp_path), statistics=times)
    assert [finding.level for finding in report.of("statistic")] == ["error", "ok"]


def test_duplicates_and_ties(tmp_path):
    log = clean_log()
    tie = log.iloc[[7]].assign(item=log.item.iloc[7] + 1)
    report = seqdata.audit(build(pd.concat([log, log.iloc[:40], log.iloc[:1], tie]), tmp_path))
    assert report.of("duplicates")[0].value == pytest.approx(41 / 4042)
    assert report.of("duplicates")[0].level == "warning"
    assert report.of("ties")[0].value == pytest.approx(42 / 4042)


def test_cold_users_and_values(tmp_path):
    log = clean_log()
    log.loc[log.time >= CUT, "item"] += 25
    log.loc[log.time >= CUT, "user"] += 40
    report = seqdata.audit(build(log, tmp_path))
    late, early = log[log.time >= CUT], log[log.time < CUT]
    cold = 1 - np.isin(late.user.unique(), early.user.unique()).mean()
    assert report.of("cold users")[0].value == pytest.approx(cold)
    assert report.of("cold values")[0].value == pytest.approx((~late.item.isin(early.item)).mean())
    assert report.of("cold values")[0].level == "warning"


@pytest.mark.parametrize("plant", ["far", "zero", "bulk"])
def test_clock_jumps(tmp_path, plant):
    log = clean_log()
    if plant == "bulk":
        log.loc[log.index[1000:1200], "time"] = log.time[1000]
    else:
        log.loc[log.index[0], "time"] = START - 4000 * DAY if plant == "far" else 0
    report = seqdata.audit(build(log, tmp_path))
    assert "warning" in levels(report, "clock jump")


def test_missing_and_dropped(tmp_path):
    log = clean_log()
    log["note"] = [None] * 3990 + ["x"] * 10
    log["user"] = log.user.astype("Int64")
    log.loc[:99, "user"] = None
    report = seqdata.audit(build(log, tmp_path, null_user="drop"))
    assert report.nulls["note"] == pytest.approx(3890 / 3900)
    assert {finding.message.split(":")[0]: finding.level for finding in report.of("missing values")} == {
        "note": "warning"
    }
    assert report.of("dropped rows")[0].value == pytest.approx(100 / 4000)


def test_chunks_do_not_matter(tmp_path, monkeypatch):
    log = pd.concat([clean_log(), clean_log()[:50]])
    store = build(log, tmp_path, shards=2)
    whole = seqdata.audit(store)
    monkeypatch.setattr(sys.modules["seqdata.audit"], "CHUNK", 100)
    assert [(f.level, f.message) for f in seqdata.audit(store).findings] == [
        (f.level, f.message) for f in whole.findings
    ]


def test_command_line(tmp_path, capsys):
    store = build(clean_log(), tmp_path)
    assert main(["audit", str(store.path)]) == 0
    shown = capsys.readouterr().out
    assert "events per day" in shown
    cut, later = "2022-03-08", "2022-03-20"
    assert (
        main(["audit", str(store.path), "--cutoff", cut, "--labels", cut, later, "--html", str(tmp_path / "r.html")])
        == 1
    )
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") >= 2
    assert "label window" in page
    assert main(["audit", str(store.path), "--cutoff", cut, "--fail-on", "never"]) == 0
    assert main(["audit", str(store.path), "--statistic", "mean", "2023-01-01"]) == 1


def test_rows_that_only_became_unknown_are_no_duplicates(tmp_path):
    rows = np.arange(2000)
    log = pd.DataFrame({"user": rows // 10, "time": np.where(rows % 10 < 5, 1, 9), "c": rows})
    options = {"user": "user", "time": "time", "time_unit": "s", "fit_before": 5_000_000, "progress": False}
    report = seqdata.audit(seqdata.build(log, tmp_path / "s", **options))
    assert [(one.level, one.value) for one in report.of("duplicates")] == [("ok", 0), ("note", 0.4)]
    twice = pd.concat([log, log[:30]])
    report = seqdata.audit(seqdata.build(twice, tmp_path / "t", **options))
    assert report.of("duplicates")[0].value == 15 / 2030


@pytest.mark.parametrize("name", ["offsets", "time", "users", "000_c"])
@pytest.mark.parametrize("old", [False, True])
def test_damage_is_named_and_ends(tmp_path, name, old):
    log = pd.DataFrame({"user": np.arange(400) % 40, "time": np.arange(400), "c": np.arange(400) % 7})
    store = seqdata.build(log, tmp_path / "s", user="user", time="time", time_unit="s", progress=False)
    assert seqdata.audit(store).of("damage")[0].level == "ok"
    if old:
        (store.path / "fitted" / "00000" / "checksums.json").unlink()
        assert [one.level for one in seqdata.audit(store).of("damage")] == ["warning"]
    path = store.path / "shards" / "00000" / f"{name}.npy"
    values = np.load(path)
    values[20:22] = values[30:28:-1] + 500
    np.save(path, values)
    report = seqdata.audit(seqdata.open_store(store.path))
    assert report.worst == "error"
    for finding in report.of("damage")[old:]:
        assert f"{name}.npy" in finding.message or f"{name} does not" in finding.message
    report.to_html(tmp_path / "r.html")
    assert "error" in report.to_text()
