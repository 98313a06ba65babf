"""The page in a real browser: it is drawn, says no word of error, and asks nobody else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("bokeh", reason="the extra [monitor] is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="no chromium and chromedriver on this machine "
        "(apt-get install chromium chromium-driver)",
    ),
]
LIMIT_S = 120.0
COUNT_OF = """
const d = window.Bokeh && Bokeh.documents[0];
for (const m of d ? d._all_models.values() : [])
  if (m.name === arguments[0]) return m.data.step.length;
return -1;
"""
NUM_LINES = """
const models = Array.from(Bokeh.documents[0]._all_models.values());
const plots = models.filter(m => m.renderers && m.x_range);
const name = arguments[0];
return plots.map(p => p.renderers.filter(r => r.data_source?.name === name).length)
  .reduce((a, b) => a + b, 0);
"""
SET = """
for (const m of Bokeh.documents[0]._all_models.values())
  if (m.type === arguments[0]) m[arguments[1]] = arguments[2];
"""
SELECT = """
Bokeh.documents[0].get_model_by_name('runs').selected.indices = arguments[0];
"""
IS_DRAWN = """
const d = window.Bokeh && Bokeh.documents[0];
const model = d && d.get_model_by_name('loss');
const view = model && Bokeh.index.find_one(model);
return !!view && view.has_finished();
"""


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium that keeps its console and its requests."""
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options)
    yield driver
    driver.quit()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of a few steps."""
    path = tmp_path / "runs" / "a"
    path.mkdir(parents=True)
    (path / "config.toml").write_text("seed = 1\n")
    append(
        path, *(line("train", step, loss=3.0, step_s=1.0, load=[[1, 3]]) for step in range(1, 200))
    )
    return path


@pytest.fixture
def address(run_dir: Path, tmp_path: Path) -> Iterator[str]:
    """Where the page is served from by a process of its own."""
    code = (
        "import sys; from pathlib import Path\n"
        "from trinity.monitor.command import monitor_command\n"
        "monitor_command(Path(sys.argv[1]), port=0)"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir.parent)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert server.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
    assert found
    yield found.group()
    server.terminate()
    assert server.wait(timeout=LIMIT_S) == 0


def line(kind: str, step: int, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "time": 1e9 + step, **more}


def append(run_dir: Path, *records: dict[str, Any]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def until(condition: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < LIMIT_S, "not in time"
        time.sleep(0.1)


def check_quiet(driver: Any, server: str) -> None:
    """No error on the console, no request to anything but the server."""
    requests = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [
        urlsplit(request["params"]["request"]["url"])
        for request in requests
        if request["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    hosts = {url.netloc for url in asked if url.scheme not in ("data", "blob", "file")}
    assert hosts <= {server}
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_is_drawn_follows_the_run_and_asks_nobody_else(
    browser: Any, address: str, run_dir: Path
) -> None:
    browser.get(address)
    until(lambda: browser.execute_script(IS_DRAWN))
    until(lambda: browser.execute_script(COUNT_OF, "points loss a") == 199)
    assert browser.execute_script(COUNT_OF, "marks skip") == 0
    append(run_dir, line("event", 200, event="skip", text="now"), line("train", 200, loss=9.0))
    until(lambda: browser.execute_script(COUNT_OF, "marks skip") == 1)
    until(lambda: browser.execute_script(COUNT_OF, "points loss a") == 200)
    browser.execute_script(SET, "Tabs", "active", 3)
    until(lambda: browser.execute_script(COUNT_OF, "points step_s a") == 199)
    until(lambda: browser.execute_script(NUM_LINES, "points step_s a") == 1)
    other = run_dir.parent / "b"
    other.mkdir()
    append(other, *(line("train", step, loss=4.0, step_s=2.0) for step in range(1, 31)))
    until(lambda: browser.execute_script(COUNT_OF, "runs") == 2)
    browser.execute_script(SELECT, [0, 1])
    for name in ("points loss b", "points step_s b"):
        until(lambda name=name: browser.execute_script(COUNT_OF, name) == 30)
        until(lambda name=name: browser.execute_script(NUM_LINES, name) == 1)
    rest = [line("train", step, loss=2.0) for step in range(1, 51)]
    temporary = run_dir / "metrics.tmp"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in rest))
    temporary.replace(run_dir / "metrics.jsonl")
    until(lambda: browser.execute_script(COUNT_OF, "points loss a") == 50)
    shutil.rmtree(run_dir)
    until(lambda: "gone" in browser.execute_script("return Bokeh.documents[0].to_json_string()"))
    check_quiet(browser, urlsplit(address).netloc)


def test_a_report_opens_without_a_server(browser: Any, run_dir: Path, tmp_path: Path) -> None:
    from trinity.monitor.library import Library
    from trinity.monitor.report import write_report

    target = tmp_path / "report.html"
    library = Library(run_dir.parent, tmp_path / "cache")
    write_report(library, target, ["a"])
    browser.get(target.as_uri())
    until(lambda: browser.execute_script(IS_DRAWN))
    assert browser.execute_script(COUNT_OF, "points loss a") == 199
    check_quiet(browser, "")
