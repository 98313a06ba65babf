"""The page without a browser: what it says of runs, and that it shows what it must."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("bokeh", reason="the extra [monitor] is not installed")
pytest.importorskip("tsdownsample", reason="the extra [monitor] is not installed")

from bokeh.document import Document
from bokeh.models import ColumnDataSource

from trinity.core.errors import ConfigError, DataError
from trinity.monitor.catalog import find_runs, run_state
from trinity.monitor.charts import View
from trinity.monitor.command import monitor_command
from trinity.monitor.heat import ALL_LAYERS, COLDEST_EXPERT, load_picture, rank_picture
from trinity.monitor.library import Library
from trinity.monitor.live import Session
from trinity.monitor.marks import marks_of
from trinity.monitor.server import is_loopback
from trinity.monitor.tables import alarms_html, config_html, journal_html

WHOLE = View(0, math.inf)


def event(step: int, what: str, **more: Any) -> dict[str, Any]:
    return {"kind": "event", "step": step, "time": 1e9 + step, "event": what, "text": what, **more}


def train(step: int, loss: float = 3.0, **more: Any) -> dict[str, Any]:
    return {
        **{"kind": "train", "step": step, "time": 1e9 + step, "loss": loss, "grad_norm": 1.0},
        **{"lr_muon": 0.01, "tokens_per_s": 100.0, "next_row": 8 * step, "load": [[3, 1], [2, 2]]},
        **more,
    }


def make_run(path: Path, records: list[dict[str, Any]], config: str = "seed = 1\n") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").write_text(config)
    (path / "heartbeat").write_text("1")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(lines)
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A directory for runs."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def open_library(runs: Path) -> Library:
    return Library(runs, runs.parent / "cache")


@pytest.fixture
def session_of(runs: Path) -> Iterator[Any]:
    """Opens the page over the runs, with all that they have written already parsed."""
    opened: list[Library] = []

    def opener(*wanted: str) -> Session:
        library = open_library(runs)
        opened.append(library)
        library.read_all(library.states)
        document = Document()
        session = Session(library, document, list(wanted))
        document.add_root(session.root)
        return session

    yield opener
    for library in opened:
        library.__exit__()


def source(session: Session, name: str) -> dict[str, Any]:
    found = session.root.select_one({"type": ColumnDataSource, "name": name})
    assert isinstance(found, ColumnDataSource)
    return dict(found.data)


def test_states_of_runs(runs: Path) -> None:
    make_run(runs / "going", [train(1)])
    make_run(runs / "done", [train(1), event(1, "finished")])
    (runs / "done" / "DONE").touch()
    make_run(runs / "halted", [train(1), event(1, "stopped")])
    make_run(runs / "on-again", [train(1), event(1, "stopped"), event(1, "resumed"), train(2)])
    make_run(runs / "lost", [event(1, "gave_up")])
    quiet = make_run(runs / "deep" / "er" / "quiet", [train(7, tokens_per_s=None)])
    for file in quiet.iterdir():
        os.utime(file, (1e9, 1e9))
    (runs / "new").mkdir()
    (runs / "new" / "config.toml").touch()
    found = {name: run_state(name, path, now=None) for name, path in find_runs(runs).items()}
    assert {name: state.state for name, state in found.items()} == {
        **{"going": "running", "done": "finished", "halted": "stopped", "on-again": "running"},
        **{"lost": "gave up", "deep/er/quiet": "silent", "new": "waiting"},
    }
    assert found["deep/er/quiet"].step == 7
    assert run_state("quiet", quiet, now=1e9 + 300).words == "silent for 5 min"


def test_a_directory_that_is_a_run_is_its_only_one(runs: Path) -> None:
    path = make_run(runs / "one", [])
    make_run(path / "checkpoints" / "inner", [])
    assert list(find_runs(path)) == ["one"]


def test_a_one_step_spike_of_a_long_run_is_on_the_page(runs: Path, session_of: Any) -> None:
    losses = np.random.default_rng(0).normal(3, 0.01, 6000)
    losses[3333] = 9.5
    make_run(runs / "a", [train(s + 1, float(loss)) for s, loss in enumerate(losses)])
    points = source(session_of("a"), "points loss a")
    assert len(points["step"]) < 2000
    assert points["value"].max() == 9.5
    assert points["step"][points["value"].argmax()] == 3334
    assert points["next_row"][points["value"].argmax()] == 8 * 3334


def test_zooming_in_shows_every_step(runs: Path, session_of: Any) -> None:
    make_run(runs / "a", [train(s) for s in range(1, 5001)])
    session = session_of("a")
    assert len(source(session, "points loss a")["step"]) < 2000
    session.page.x_range.update(start=2000, end=2100)
    session._draw()
    shown = source(session, "points loss a")["step"].tolist()
    assert shown == list(range(1999, 2102))


def test_an_event_written_while_the_page_is_open_is_marked(runs: Path, session_of: Any) -> None:
    path = make_run(runs / "a", [train(s) for s in range(1, 11)])
    session = session_of("a")
    assert source(session, "marks skip")["step"] == []
    with (path / "metrics.jsonl").open("a") as file:
        lines = [event(11, "skip"), train(11, math.nan, accepted=False), event(11, "hang")]
        for record in [*lines, event(12, "alarm", severity="page"), train(12, 4.0)]:
            file.write(json.dumps(record) + "\n")
    session.library.read_all(["a"])
    session.tick()
    assert source(session, "marks skip")["step"] == [11]
    assert source(session, "marks skip")["value"] == [3.0]  # a loss that is no number: the last
    assert source(session, "marks gave_up")["text"] == ["hang"]
    assert source(session, "marks page")["value"] == [4.0]
    assert source(session, "points loss a")["step"].tolist() == [*range(1, 11), 12]


def test_steps_that_were_not_applied_are_marked_without_an_event(runs: Path) -> None:
    make_run(runs / "a", [train(1), train(2, 9.0, accepted=False), train(3, accepted=True)])
    library = open_library(runs)
    library.read_all(["a"])
    history = library.history("a")
    assert history is not None
    assert [(mark.step, mark.look) for mark in marks_of(history)] == [(2, "skip")]


def test_abandoned_steps_are_shown_when_asked_for(runs: Path, session_of: Any) -> None:
    rewind = event(4, "rewind", to_step=2)
    lines = [train(1), train(2), train(3, 8.0), train(4, 9.0), rewind, train(3), train(4)]
    make_run(runs / "a", lines)
    session = session_of("a")
    assert source(session, "points loss a")["value"].tolist() == [3.0] * 4
    session._old.active = [0]
    session._draw()
    values = source(session, "abandoned loss a")["value"]
    np.testing.assert_array_equal(values, [8.0, 9.0, np.nan])


def test_a_selected_run_whose_directory_disappears_stays_on_the_page(
    runs: Path, session_of: Any
) -> None:
    path = make_run(runs / "a", [train(1), train(2)])
    make_run(runs / "b", [train(1)])
    session = session_of("a", "b")
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    session.library.look()
    session.library.read_all(["b"])
    session.tick()
    assert session.page.selected == ["b", "a"]
    assert source(session, "points loss a")["step"].tolist() == [1, 2]
    assert "gone" in session.page.alarms.text


def test_an_empty_directory_and_a_run_without_metrics_open(runs: Path, session_of: Any) -> None:
    session = session_of()
    assert "No run here yet" in session._head.text
    (runs / "new").mkdir()
    (runs / "new" / "run.json").write_text("{}")
    session.library.look()
    session.tick()
    session._source.selected.indices = [0]
    session.tick()
    assert session.page.selected == ["new"]
    for tab in range(5):
        session.page.tabs.active = tab
        session.tick()


def test_alarms_come_with_what_to_do_first(runs: Path) -> None:
    told = {"name": "loss_score", "value": 7.25, "severity": "page", "first": "Look at <rows>."}
    bare = {"name": "mfu", "value": "nan"}
    make_run(
        runs / "a",
        [event(5, "alarm", **told), event(9, "alarm", **told), event(6, "alarm", **bare)],
    )
    library = open_library(runs)
    library.read_all(["a"])
    history = library.history("a")
    assert history is not None
    html = alarms_html({"a": history}, library.states, {}, {"a": "disk <full>"})
    assert "PAGE" in html
    assert "2 times, steps 5 to 9" in html
    assert "Look at &lt;rows&gt;." in html
    assert "As for throughput." in html  # the table of instruments has it where the event has not
    assert "disk &lt;full&gt;" in html


def test_text_of_a_run_is_escaped_in_the_journal(runs: Path) -> None:
    evil = [event(1, "skip", text="<script>1</script>"), event(2, "skip", text="b")]
    make_run(runs / "<b>a", [*evil, event(3, "<i>", text="<script>2</script>")])
    library = open_library(runs)
    library.read_all(library.states)
    history = library.history("<b>a")
    assert history is not None
    html = journal_html({"<b>a": history}, {})
    assert "&lt;script&gt;2" in html
    assert "2 times since step 1; last: b" in html
    assert not {"<script>", "<i>"} & set(html.replace(">", ">\n").split())


def test_configurations_are_compared_key_by_key(runs: Path) -> None:
    a = make_run(runs / "a", [], "[optim.muon]\nlr = 0.01\n[data]\nsources = [{name = 'x'}]\n")
    b = make_run(runs / "b", [], "[optim.muon]\nlr = 0.02\n[data]\nsources = [{name = 'x'}]\n")
    html = config_html({"a": a, "b": b}, {})
    assert "optim.muon.lr" in html
    assert "data.sources" not in html
    assert "Select two runs" in config_html({"a": a}, {})
    (a / "config.until-step-40.toml").write_text("[optim.muon]\nlr = 0.5\n")
    html = config_html({"a": a}, {})
    assert "until step 40" in html
    assert "0.5" in html


def test_the_load_map_is_exact_in_a_short_view_and_binned_in_a_long_one(runs: Path) -> None:
    loads = [[[1, 3], [2, 2]] if step == 4000 else [[2, 2], [2, 2]] for step in range(1, 5001)]
    make_run(runs / "a", [train(s + 1, load=load) for s, load in enumerate(loads)])
    library = open_library(runs)
    library.read_all(["a"])
    history = library.history("a")
    assert history is not None
    whole = load_picture(history, WHOLE, ALL_LAYERS, mean=False)
    near = load_picture(history, View(3950, 4050), ALL_LAYERS, mean=False)
    cold = load_picture(history, View(3950, 4050), COLDEST_EXPERT, mean=False)
    one = load_picture(history, View(3950, 4050), "1", mean=False)
    assert None not in (whole, near, cold, one)
    assert whole.bin_steps == 8
    assert whole.values[:, 500].tolist() == [0.5, 1.5, 1.0, 1.0]
    assert (near.bin_steps, near.start, near.values.shape) == (1.0, 3949.5, (4, 101))
    assert near.values[:, 50].tolist() == [0.5, 1.5, 1.0, 1.0]
    assert cold.values[:, 50].tolist() == [0.5, 1.0]
    assert one.values[:, 50].tolist() == [1.0, 1.0]


def test_a_slow_rank_stands_out(runs: Path) -> None:
    readings = [[10, 10, 30, 10] if step == 50 else [10, 10, 10, 10] for step in (40, 50, 60)]
    lines = [
        {"kind": "instruments", "step": 40 + 10 * i, "rank_ms": times}
        for i, times in enumerate(readings)
    ]
    make_run(runs / "a", lines)
    library = open_library(runs)
    library.read_all(["a"])
    history = library.history("a")
    assert history is not None
    picture = rank_picture(history.bands["rank_ms"], mean=False)
    assert picture.values[:, 50].tolist() == [1, 1, 3, 1]
    assert picture.values[:, 59].tolist() == [1, 1, 3, 1]  # until the next reading
    assert picture.values[:, 60].tolist() == [1, 1, 1, 1]


def test_a_report_holds_everything_and_asks_for_nothing(runs: Path, tmp_path: Path) -> None:
    make_run(runs / "a", [train(1), event(1, "skip"), train(2)])
    make_run(runs / "b", [train(1)], "seed = 2\n")
    target = tmp_path / "report.html"
    monitor_command(runs, export=target)
    text = target.read_text()
    assert "Bokeh" in text
    assert "seed" in text
    # Scripts hold addresses that they do not ask; tags that would fetch may not be there.
    tags = re.sub(r"(<script[^>]*>).*?</script>", r"\1", text, flags=re.DOTALL)
    assert not re.search(r"<(script|img|link|iframe)[^>]*(src|href)=", tags)
    assert sorted(path.name for path in (runs / "a").iterdir()) == [
        *("config.toml", "heartbeat", "metrics.jsonl"),
    ]


def test_mistakes_are_named(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        monitor_command(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="'x' is not below"):
        monitor_command(runs, runs=["x"])
    with pytest.raises(DataError, match="no run here"):
        monitor_command(runs, export=tmp_path / "report.html")


def test_two_pages_on_one_run_do_not_share_a_cache(runs: Path) -> None:
    make_run(runs / "a", [train(1)])
    first, second = open_library(runs), open_library(runs)
    caches = set()
    for library in (first, second):
        library.read_all(["a"])
        history = library.history("a")
        assert history is not None
        caches.add(history._cache)
    assert len(caches) == 2


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
