"""What is parsed once and kept: columns, bands, rewinds, torn and rewritten files, the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trinity.monitor.bands import Band
from trinity.monitor.history import History
from trinity.monitor.loads import LAYER_LOAD, LOAD
from trinity.monitor.sampling import bucket_means, pick


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "time": 1e9 + step, "loss": 5.0 - step / 100, **more}


def write(path: Path, records: Iterable[Any], mode: str = "w") -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """Where a run's record is; not written yet."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "metrics.jsonl"


def open_history(metrics: Path, name: str = "cache") -> History:
    cache = metrics.parent.parent / name
    cache.mkdir(exist_ok=True)
    history = History(metrics, cache)
    while history.catch_up():
        pass
    return history


def losses(history: History) -> list[float]:
    return history.tables["train"].live_column("loss").tolist()


def test_numbers_become_columns_and_late_keys_are_nan_before(metrics: Path) -> None:
    write(metrics, [train(1), train(2, mfu=None), train(3, mfu=0.5, accepted=False)])
    table = open_history(metrics).tables["train"]
    assert table.column("step").tolist() == [1, 2, 3]
    np.testing.assert_array_equal(table.column("mfu"), [np.nan, np.nan, 0.5])
    assert table.column("accepted")[2] == 0
    assert np.isnan(table.column("no such key")).all()


def test_values_that_are_not_finite_are_read_as_such(metrics: Path) -> None:
    lines = [train(1), train(2, loss=float("nan")), train(3, loss=float("-inf")), train(4)]
    write(metrics, lines)
    np.testing.assert_array_equal(losses(open_history(metrics)), [4.99, np.nan, -np.inf, 4.96])


def test_a_torn_line_waits_for_its_end(metrics: Path) -> None:
    write(metrics, [train(1)])
    whole = json.dumps(train(2)) + "\n"
    with metrics.open("a") as file:
        file.write(whole[:20])
    history = open_history(metrics)
    assert losses(history) == [4.99]
    with metrics.open("a") as file:
        file.write(whole[20:])
    history.catch_up()
    assert losses(history) == [4.99, 4.98]
    assert history.num_damaged == 0


@pytest.mark.parametrize(
    "line", ['{"kind": "tr', "[1, 2]", '{"kind": "train"}', '{"kind": 3, "step": 1}', "\x00\x00"]
)
def test_a_line_that_is_no_record_is_passed_over(metrics: Path, line: str) -> None:
    write(metrics, [train(1)])
    with metrics.open("a") as file:
        file.write(line + "\n")
    write(metrics, [train(2)], "a")
    history = open_history(metrics)
    assert losses(history) == [4.99, 4.98]
    assert history.num_damaged == 1


def test_odd_values_do_not_stop_the_others(metrics: Path) -> None:
    odd = train(2, mfu="fast", grad_norm=10**400, rank_ms=["a"], load=[[1], [1, 2]], max_vio=[])
    write(metrics, [train(1, mfu=1.0, grad_norm=1.0), odd, train(3, mfu=1.0, grad_norm=1.0)])
    table = open_history(metrics).tables["train"]
    np.testing.assert_array_equal(table.column("mfu"), [1, np.nan, 1])
    np.testing.assert_array_equal(table.column("grad_norm"), [1, np.inf, 1])


def test_a_rewind_abandons_what_lies_beyond(metrics: Path) -> None:
    rewind = {"kind": "event", "step": 5, "event": "rewind", "to_step": 2, "text": "back"}
    again = [train(step, loss=1.0) for step in (3, 4)]
    write(metrics, [*(train(s) for s in range(1, 6)), rewind, *again])
    history = open_history(metrics)
    table = history.tables["train"]
    assert table.live_column("step").tolist() == [1, 2, 3, 4]
    assert losses(history) == [4.99, 4.98, 1.0, 1.0]
    assert [table.column("step")[a:b].tolist() for a, b in table.abandoned()] == [[3, 4, 5]]
    assert history.events == [rewind]


def test_a_rewind_counts_before_its_steps_are_gone_over_again(metrics: Path) -> None:
    rewind = {"kind": "event", "step": 3, "event": "rewind", "to_step": 1, "text": ""}
    write(metrics, [train(1), train(2), train(3), rewind])
    assert losses(open_history(metrics)) == [4.99]


def test_steps_that_go_back_without_a_rewind_count_once(metrics: Path) -> None:
    write(metrics, [train(1), train(2), train(3), train(2, loss=1.0)])
    assert losses(open_history(metrics)) == [4.99, 1.0]


def test_two_rewinds_to_the_same_step(metrics: Path) -> None:
    rewind = {"kind": "event", "step": 3, "event": "rewind", "to_step": 1, "text": ""}
    write(metrics, [train(1), train(2), train(3), rewind, train(2), rewind, train(2, loss=0.5)])
    table = open_history(metrics).tables["train"]
    assert table.live_column("loss").tolist() == [4.99, 0.5]
    assert sum(b - a for a, b in table.abandoned()) == 3


def test_the_cache_is_continued_and_only_new_bytes_are_parsed(metrics: Path) -> None:
    write(metrics, [train(s, load=[[3, 1]], max_vio=[0.5]) for s in range(1, 50)])
    first = open_history(metrics)
    first.save()
    write(metrics, [train(50)], "a")
    second = open_history(metrics)
    parsed: list[bytes] = []
    third = History(metrics, metrics.parent.parent / "cache")
    third._loads = lambda line: parsed.append(line) or json.loads(line)
    third.catch_up()
    assert len(parsed) == 1
    for history in (second, third):
        assert history.tables["train"].column("step").tolist() == list(range(1, 51))
        np.testing.assert_allclose(history.bands[LOAD].high()[1:50, 0], 1.5)
        assert history.load_shape == (1, 2)


def test_rows_beyond_the_cache_state_are_parsed_again_and_not_doubled(metrics: Path) -> None:
    write(metrics, [train(1)])
    history = open_history(metrics)
    history.save()
    end = metrics.stat().st_size
    write(metrics, [train(2), train(3)], "a")
    history.catch_up()  # a page that is killed here has not saved
    os.truncate(metrics, end)
    write(metrics, [train(2, loss=1.0)], "a")
    assert losses(open_history(metrics)) == [4.99, 1.0]


@pytest.mark.parametrize("damage", ["state.json", "bands", "train-3"])
def test_a_damaged_cache_is_made_anew(metrics: Path, damage: str) -> None:
    write(metrics, [train(1), train(2)])
    open_history(metrics).save()
    cache = metrics.parent.parent / "cache"
    for path in cache.glob(f"{damage}*"):
        path.write_bytes(path.read_bytes()[:10])
    assert losses(open_history(metrics)) == [4.99, 4.98]


def test_a_file_rewritten_on_resume_is_read_anew(metrics: Path) -> None:
    write(metrics, [train(s) for s in range(1, 10)])
    history = open_history(metrics)
    temporary = metrics.with_suffix(".tmp")
    write(temporary, [train(1), train(2), train(3, loss=1.0)])
    os.replace(temporary, metrics)
    history.catch_up()
    assert losses(history) == [4.99, 4.98, 1.0]
    assert history.generation == 1


def test_another_file_that_ends_like_the_old_one_is_noticed(metrics: Path) -> None:
    same_end = {"pad": [7] * 1000}
    write(metrics, [train(1, **same_end)])
    history = open_history(metrics)
    temporary = metrics.with_suffix(".tmp")
    write(temporary, [train(1, **same_end) | {"loss": 1.23}, train(2)])
    os.replace(temporary, metrics)
    history.catch_up()
    assert losses(history) == [1.23, 4.98]


def test_a_file_rewritten_in_place_and_longer_is_noticed(metrics: Path) -> None:
    write(metrics, [train(1), train(2)])
    history = open_history(metrics)
    write(metrics, [train(s, loss=1.0) for s in range(1, 6)])
    while history.catch_up():
        pass
    assert losses(history) == [1.0] * 5


def test_a_run_that_disappears_keeps_what_was_read(metrics: Path) -> None:
    write(metrics, [train(1)])
    history = open_history(metrics)
    metrics.unlink()
    metrics.parent.rmdir()
    assert history.catch_up() is False
    assert losses(history) == [4.99]


def test_one_hot_step_stays_in_the_load_map_of_a_long_run(metrics: Path) -> None:
    fair, hot = [[10, 10, 10, 10]], [[37, 1, 1, 1]]
    write(metrics, [train(s, load=hot if s == 3001 else fair) for s in range(1, 5001)])
    band = open_history(metrics).bands[LOAD]
    assert band.bin_steps == 8
    assert band.farthest(1.0)[3001 // 8].tolist() == pytest.approx([3.7, 0.1, 0.1, 0.1])
    assert band.mean()[3001 // 8, 0] == pytest.approx((7 + 3.7) / 8)


def test_many_experts_are_kept_by_layer_and_exact_where_asked(metrics: Path) -> None:
    loads = np.full((5, 3, 1000), 10)
    loads[3, 2, 7] = 500
    write(metrics, [train(s + 1, load=loads[s].tolist()) for s in range(5)])
    history = open_history(metrics)
    assert LOAD not in history.bands
    assert history.bands[LAYER_LOAD].high()[4, 2] == pytest.approx(500 / 10.49)
    (record,) = history.records_at((4, 4), 10)
    assert record["load"][2][7] == 500


def test_band_forgets_abandoned_bins_and_widens() -> None:
    band = Band(2)
    band.add(np.arange(1, 9), np.ones((8, 2), np.float32))
    band.abandon(5)
    assert band.num_bins == 5
    band.add(np.array([5]), np.full((1, 3), 2.0, np.float32))
    np.testing.assert_array_equal(band.high()[4:, :], [[1, 1, np.nan], [2, 2, 2]])
    again = Band.from_state(band.state())
    np.testing.assert_array_equal(again.high(), band.high())


def test_a_spike_of_one_step_survives_down_sampling() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(3, 0.01, 200_000)
    y[[77_777, 123_457]] = 11.0, -4.0
    y[50_000] = np.nan
    x = np.arange(len(y), dtype=np.float64)
    picked = pick(x, y, 1000)
    assert len(picked) <= 1000
    assert {77_777, 123_457} <= set(picked.tolist())
    assert np.isfinite(y[picked]).all()


def test_bucket_means_leave_out_what_is_not_finite() -> None:
    x, y = np.arange(6.0), np.array([1, 3, np.nan, 5, 7, np.inf])
    assert [part.tolist() for part in bucket_means(x, y, 2)] == [[0.5, 3.5], [2.0, 6.0]]
