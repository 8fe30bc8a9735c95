"""The dashboard shows what the run's files hold: its functions, its page, and the page in a real browser."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import ltv.dashboard as dashboard
from runkit.run import Run

PAGE = Path(dashboard.__file__).with_name("page.py")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(autouse=True)
def main_module_kept(monkeypatch):
    # AppTest leaves the page behind as __main__, and every process spawned later would run the page.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


def test_runs_are_found_by_their_evaluations(trained, tmp_path):
    assert dashboard.find_runs(trained.parent) == {"small": trained}
    assert dashboard.find_runs(trained) == {"small": trained}
    assert dashboard.find_runs(tmp_path) == {}
    assert dashboard.splits_of(trained) == ["val"]


def test_what_a_killed_evaluation_left_is_no_split(trained, tmp_path):
    for name in (".val.4711.tmp", ".val.0abc-4711-00000000.new"):
        (tmp_path / "run" / "evaluation" / name).mkdir(parents=True)
        shutil.copy(trained / "evaluation" / "val" / "rows.parquet", tmp_path / "run" / "evaluation" / name)
    assert dashboard.find_runs(tmp_path) == {} and dashboard.splits_of(tmp_path / "run") == []


def test_histogram_counts_every_row_once(trained):
    table = dashboard.load_evaluated(trained, "val").predictions
    columns = {"true": table["true_d7"].to_numpy(), "predicted": table["revenue_d7"].to_numpy()}
    counts = dashboard.log_histogram(columns).groupby("series")["rows"].sum()
    assert dict(counts) == {"true": len(table), "predicted": len(table)}
    zeros = dashboard.log_histogram({"none": np.zeros(3)})
    assert zeros["rows"].sum() == 3


def test_a_row_is_predicted_and_explained_as_in_the_files(trained):
    data, pipe = dashboard.load_evaluated(trained, "val"), dashboard.pipeline_of(trained)
    for number in (0, 7, data.rows.num_rows - 1):
        row = data.rows.slice(number, 1)
        said = dashboard.predict_row(pipe, row)
        assert row["row_id"][0].as_py() == data.predictions["row_id"][number]
        for name, value in said.items():
            assert value == data.predictions[name][number], name
        batch = row.combine_chunks().to_batches()[0]
        parts = pipe.explain(batch, "d7")[1]
        table = dashboard.contributions(pipe, row, "d7", most=5)
        assert len(table) == 6
        assert table["contribution"].sum() == pytest.approx(parts[0, :-1].sum())


def test_what_if_changes_what_the_model_reads_and_only_that(trained):
    data, pipe = dashboard.load_evaluated(trained, "val"), dashboard.pipeline_of(trained)
    row = data.rows.slice(3, 1)
    columns = dashboard.scalar_columns(data.rows, pipe)
    assert {"country", "release_msrp", "last_buy"} <= set(columns)
    assert not {"row_id", "cpm", "buyer_d7", "iap_revenue_d28"} & set(columns)
    assert dashboard.with_values(row, {"country": row["country"][0].as_py()}).equals(row)
    other = dashboard.with_values(row, {"release_msrp": 1.0, "weekday": 6})
    assert other["release_msrp"].to_pylist() == [1.0] and other.schema == row.schema
    names, moved = pipe.builder.names, pipe.builder.transform(other.to_batches()[0])
    before = pipe.builder.transform(row.combine_chunks().to_batches()[0])
    changed = {names[i] for i in np.flatnonzero(~np.isclose(moved[0], before[0], equal_nan=True))}
    assert changed and all(
        "release_msrp" in n or "weekday" in n or n == "device_price_spend" or n == "is_weekend" for n in changed
    )


def test_the_page_shows_the_numbers_of_the_run(trained):
    testing = pytest.importorskip("streamlit.testing.v1", reason="the dashboard's page needs streamlit")
    app = testing.AppTest.from_function(_page, args=(str(trained.parent),), default_timeout=120).run()
    assert not app.exception
    shown = {one.label: one.value for one in app.metric}
    metrics = Run(trained).metrics()["val"]
    horizon = app.sidebar.selectbox[2].value
    assert shown["rows"] == f"{int(metrics[horizon]['rows']):,}"
    assert shown[f"MSLE {horizon}"] == f"{metrics[horizon]['msle']:.4f}"
    assert shown["Gini"] == f"{metrics[horizon]['gini']:.3f}"
    app.sidebar.selectbox[3].set_value("country").run()
    assert not app.exception
    part = {one.label: one.value for one in app.metric}
    values = dashboard.load_evaluated(trained, "val").predictions["country"]
    country = app.sidebar.multiselect[0].value
    assert part["rows"] == f"{int((values == country[0]).sum()):,}" != shown["rows"]
    app.multiselect(key="changed").set_value(["release_msrp"]).run()
    app.number_input(key="value_release_msrp").set_value(5000.0).run()
    assert not app.exception
    assert {"now", "what if", "change"} <= set(app.dataframe[-3].value.columns)


def test_the_page_says_what_to_do_where_there_is_no_run(tmp_path):
    testing = pytest.importorskip("streamlit.testing.v1", reason="the dashboard's page needs streamlit")
    app = testing.AppTest.from_function(_page, args=(str(tmp_path),), default_timeout=60).run()
    assert not app.exception and "ltv train" in app.error[0].value


def test_the_page_works_in_a_browser(trained, tmp_path):
    pytest.importorskip("streamlit", reason="the dashboard's page needs streamlit")
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with serving(trained.parent) as address, playwright.sync_playwright() as driver:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        quiet += ["--disable-background-networking", "--disable-component-update"]
        window = driver.chromium.launch(executable_path=browser, args=quiet)
        page = window.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(address)
        tabs = page.get_by_role("tab")
        tabs.first.wait_for(timeout=90_000)
        page.locator("canvas, svg.marks").first.wait_for(timeout=60_000)
        names = [tab.inner_text() for tab in tabs.all()]
        assert names[:4] == ["Distributions", "Probability and revenue", "Deciles, lift, calibration", "One user"]
        for number, tab in enumerate(tabs.all()):
            tab.click()
            page.wait_for_timeout(800)
            assert page.locator('[data-testid="stException"]').count() == 0, names[number]
            shot = tmp_path / f"{number}.png"
            page.screenshot(path=shot)
            assert shot.stat().st_size > 15_000, names[number]
        tabs.nth(3).click()
        page.get_by_role("heading", name="What if").wait_for(timeout=30_000)
        page.get_by_role("combobox", name="Change").click()
        page.keyboard.type("release_msrp")
        page.keyboard.press("Enter")
        # Only a rerun of the page, with a prediction of the changed row, shows the field for the value.
        page.get_by_label("release_msrp (now").wait_for(timeout=60_000)
        assert page.locator('[data-testid="stException"]').count() == 0
        window.close()


@contextlib.contextmanager
def serving(runs):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ltv.cli", "dashboard", "--runs", str(runs), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=1).close()
                break
            time.sleep(0.25)
        yield f"http://localhost:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def _page(runs):
    from ltv.page import main

    main(runs)
