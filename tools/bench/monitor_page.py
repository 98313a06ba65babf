"""How long the page of ``trinity monitor`` takes to open, and a new event to be seen on it.

Makes long runs from a formula, serves them from a process of its own and opens them in a headless
Chromium. "Cold" has no cache: the page shows first what it has parsed so far. "Warm" is every
later time. Requests to any host but the server, and errors of the console, are counted.

    python tools/bench/monitor_page.py --runs 20 --steps 100000 --dir /tmp/long-runs
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

LAYERS, EXPERTS = 7, 16
TOKENS = 4096
CONFIG = "[model]\nhidden_size = {hidden}\n[optim.muon]\nlr = {lr}\n[data]\nseed = {seed}\n"
IDLE = """
const d = window.Bokeh && Bokeh.documents[0];
if (!d) return false;
return ['loss', 'grad_norm', 'lr_muon', 'load'].every(name => {
  const model = d.get_model_by_name(name);
  const view = model && Bokeh.index.find_one(model);
  return !!view && view.has_finished();
});
"""
STEPS_OF_MARKS = """
const found = [];
const d = window.Bokeh && Bokeh.documents[0];
for (const m of d ? d._all_models.values() : [])
  if (m.name && m.name.startsWith('marks ')) found.push(...m.data.step);
return found;
"""
POINTS_OF_LOSS = """
let n = 0;
const d = window.Bokeh && Bokeh.documents[0];
for (const m of d ? d._all_models.values() : [])
  if (m.name && m.name.startsWith('points loss')) n += m.data.step.length;
return n;
"""


def synthesize(run_dir: Path, num_steps: int, seed: int) -> None:
    """Write a run: a power law with noise, one-step spikes, a skip and its event."""
    rng = np.random.default_rng(seed)
    steps = np.arange(1, num_steps + 1)
    loss = 2.1 + 0.02 * seed + 9 * (steps + 20.0) ** -0.35 + 0.03 * rng.standard_normal(num_steps)
    grad = np.exp(0.2 * rng.standard_normal(num_steps)) * (0.3 + 3 * steps**-0.3)
    spikes = set(rng.integers(num_steps // 10, num_steps, 3).tolist())
    loads = [_load(rng) for _ in range(256)]
    run_dir.mkdir(parents=True)
    (run_dir / "config.toml").write_text(CONFIG.format(hidden=256, lr=1e-2 / (1 + seed), seed=seed))
    with (run_dir / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.write(json.dumps(_event(0, "started", f"seed {seed}")) + "\n")
        for i, step in enumerate(steps.tolist()):
            is_spike = step in spikes
            if is_spike:
                file.write(json.dumps(_event(step, "skip", "loss 6.1, score 9.3: skipped")) + "\n")
            file.write(_train(step, loss[i] + 3 * is_spike, grad[i] * (1 + 20 * is_spike), loads))
            if step % 10 == 0:
                file.write(_instruments(step, loss[i]))
            if step % 500 == 0:
                values = {"kind": "validation", "step": step, "time": 1e9 + step, "loss": loss[i]}
                file.write(
                    json.dumps({**values, "web": loss[i] + 0.1, "code": loss[i] - 0.4}) + "\n"
                )
    (run_dir / "heartbeat").write_text(str(num_steps))


def _load(rng: np.random.Generator) -> tuple[str, str]:
    loads = rng.multinomial(TOKENS, rng.dirichlet(np.full(EXPERTS, 30.0), LAYERS))
    vio = loads.max(axis=1) / (TOKENS / EXPERTS) - 1
    return json.dumps(loads.tolist()), json.dumps([round(float(v), 4) for v in vio])


def _train(step: int, loss: float, grad: float, loads: list[tuple[str, str]]) -> str:
    load, vio = loads[random.randrange(len(loads))]
    lr = 1e-2 * min(1.0, step / 1000)
    return (
        f'{{"kind": "train", "step": {step}, "time": {1.7e9 + 0.8 * step}, "loss": {loss}, '
        f'"grad_norm": {grad}, "batch_het": 0.01, "z": 60.5, "balance_loss": 7.1, '
        f'"max_vio_max": 0.6, "max_vio_mean": 0.4, "max_vio_share": 0.04, "max_vio_slope": 0.0, '
        f'"load_entropy": 0.98, "dead_experts": 0, "loss_score": 0.2, "grad_score": 0.1, '
        f'"loss_drift": 0.01, "num_skipped": 0, "accepted": true, "clip_factor": 1.0, '
        f'"lr_muon": {lr}, "lr_adamw": {lr / 3}, "num_tokens_seen": {step * TOKENS}, '
        f'"next_row": {step * 8}, "tokens_per_s": {5000 + 300 * loss}, '
        f'"step_s": {0.8 + loss / 99}, '
        f'"mfu": 0.31, "peak_memory_bytes": 1446682624, "muon_exchange_bytes": 0, '
        f'"max_vio": {vio}, "load": {load}}}\n'
    )


def _instruments(step: int, loss: float) -> str:
    values: dict[str, Any] = {"kind": "instruments", "step": step, "time": 1.7e9 + 0.8 * step}
    values |= {f"grad_norm_{part}": loss / 5 for part in ("matrix", "router", "table", "vector")}
    values |= {f"update_ratio_{part}": loss / 90 for part in ("matrix", "router", "table")}
    values |= {"bias_norm": 0.1, "router_logit_rms": 1.4, "attention_logit_max": 9 + loss}
    values |= {"logit_max": 12 + loss, "logit_mean": -1.0, "straggler": 1.02, "bias_step": 0.001}
    values |= {"bias_norm_layers": [0.1] * LAYERS, "rank_ms": [9.0, 9.1, 8.8, 9.4]}
    return json.dumps(values) + "\n"


def _event(step: int, event: str, text: str) -> dict[str, Any]:
    return {"kind": "event", "step": step, "time": time.time(), "event": event, "text": text}


def browser() -> webdriver.Chrome:
    """A headless Chromium that records its console and its requests."""
    options = Options()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument("--window-size=1440,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options)


def wait(condition: Any, limit_s: float = 60.0) -> float:
    """Seconds until ``condition()`` holds; infinite if it does not within the limit."""
    start = time.perf_counter()
    while time.perf_counter() - start < limit_s:
        if condition():
            return time.perf_counter() - start
        time.sleep(0.05)
    return float("inf")


def serve(directory: Path, port: int, cache: Path) -> subprocess.Popen[bytes]:
    """Start the server in a process of its own."""
    code = (
        "from pathlib import Path; from trinity.monitor.command import monitor_command; "
        f"monitor_command(Path({str(directory)!r}), host='127.0.0.1', port={port}, export=None)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def strangers(driver: webdriver.Chrome, port: int) -> tuple[list[str], list[str]]:
    """Requests to anything but the server, and errors of the console."""
    requests = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests.append(message["params"]["request"]["url"])
    ours = (f"127.0.0.1:{port}", "")
    foreign = [url for url in requests if urlsplit(url).netloc not in ours]
    errors = [e["message"] for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    return foreign, errors


def open_page(url: str, port: int) -> Iterator[tuple[str, str]]:
    """Open the page once and yield what was seen and how long it took."""
    driver = browser()
    try:
        start = time.perf_counter()
        driver.get(url)
        idle = wait(lambda: driver.execute_script(IDLE))
        yield "opened, all drawn", f"{time.perf_counter() - start:.2f} s" if idle < 60 else "never"
        wait(lambda: driver.execute_script(POINTS_OF_LOSS) > 0)
        yield "first curve", f"{time.perf_counter() - start:.2f} s"
        yield "points of loss", str(driver.execute_script(POINTS_OF_LOSS))
        foreign, errors = strangers(driver, port)
        yield "requests elsewhere, console errors", f"{len(foreign)}, {len(errors)}"
        for line in foreign + errors:
            yield "!", line[:200]
    finally:
        driver.quit()


def event_delay(url: str, metrics: Path, step: int) -> str:
    """Seconds from an event's line being written to its mark on the open page."""
    driver = browser()
    try:
        driver.get(url)
        wait(lambda: driver.execute_script(IDLE))
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_event(step, "skip", "written while the page is open")) + "\n")
        seen = wait(lambda: step in driver.execute_script(STEPS_OF_MARKS))
        drawn = wait(lambda: driver.execute_script(IDLE))
        return f"{seen + drawn:.2f} s"
    finally:
        driver.quit()


def main() -> None:
    """Make the runs where they are missing, time the page, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--dir", type=Path, required=True, help="where long runs are kept")
    parser.add_argument("--port", type=int, default=5101)
    parser.add_argument("--no-cold", action="store_true", help="use the cache of the time before")
    arguments = parser.parse_args()
    directory = arguments.dir / f"{arguments.runs}x{arguments.steps}"
    for seed in range(arguments.runs):
        if not (directory / f"run-{seed:02}").exists():
            synthesize(directory / f"run-{seed:02}", arguments.steps, seed)
    size = sum(path.stat().st_size for path in directory.glob("*/metrics.jsonl"))
    table = Table("case", "what", "value", title=f"{arguments.runs} x {arguments.steps} steps")
    table.add_row("", "metrics.jsonl, together", f"{size / 1e9:.2f} GB")
    cache = directory.parent / f"cache-{directory.name}"
    if not arguments.no_cold:
        shutil.rmtree(cache, ignore_errors=True)
    run_cases(directory, cache, arguments.port, table)
    table.caption = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    Console().print(table)


def run_cases(directory: Path, cache: Path, port: int, table: Table) -> None:
    """Open the page cold, warm by default and warm with all runs; time an event."""
    names = sorted(path.name for path in directory.iterdir())
    one, every = f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/?runs={','.join(names)}"
    is_cold = not cache.exists()
    server = serve(directory, port, cache)
    try:
        time.sleep(4)
        for what, value in open_page(every, port):
            table.add_row("cold, all runs" if is_cold else "first, all runs", what, value)
        start = time.perf_counter()
        if is_cold:
            wait(lambda: len(list(cache.rglob("state.json"))) == len(names), 600)
            table.add_row(
                "cold", "first snapshots of all caches", f"{time.perf_counter() - start:.0f} s"
            )
        time.sleep(60 if is_cold else 0)
        for case, url in (("warm, one run", one), ("warm, all runs", every)):
            for what, value in open_page(url, port):
                table.add_row(case, what, value)
        metrics = directory / names[0] / "metrics.jsonl"
        delay = event_delay(every, metrics, 1000 + int(time.time()) % 98_000)
        table.add_row("warm, all runs", "event written to mark drawn", delay)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
