"""What the page shows of runs on images: loads by noise level, and figures only they have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("bokeh", reason="the extra [monitor] is not installed")
pytest.importorskip("tsdownsample", reason="the extra [monitor] is not installed")

from trinity.monitor.charts import View
from trinity.monitor.heat import (
    ALL_LAYERS,
    BY_NOISE,
    COLDEST_EXPERT,
    HOTTEST_EXPERT,
    load_choices,
    load_picture,
)
from trinity.monitor.history import History
from trinity.monitor.library import Library
from trinity.monitor.page import EXPERTS, LOGITS, Page

WHOLE = View(0, math.inf)
LOAD = [[[1, 3], [2, 2], [0, 0]], [[2, 2], [4, 0], [1, 1]]]
"""Two layers, three ranges of noise levels, two experts; nothing in the last range of the first."""
RATIOS = [[[0.5, 1.5], [1, 1], [np.nan, np.nan]], [[1, 1], [2, 0], [1, 1]]]


def _record(step: int, load: Any = None) -> dict[str, Any]:
    record = {"kind": "train", "step": step, "loss": 1.0, "load": [[3, 1], [2, 2]]}
    if load is not None:
        record |= {"load_by_sigma": load, "sigma_information": 0.1, "sigma_max_vio": 1.0}
    return record


def _write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.mkdir(parents=True)
    (path / "config.toml").write_text("seed = 1\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _history(tmp_path: Path, records: list[dict[str, Any]]) -> History:
    (tmp_path / "cache").mkdir(parents=True)
    history = History(_write(tmp_path / "run", records) / "metrics.jsonl", tmp_path / "cache")
    while history.catch_up():
        pass
    return history


def test_a_layer_by_noise_level(tmp_path: Path) -> None:
    history = _history(tmp_path, [_record(step, LOAD) for step in (1, 2)])
    assert history.load_shape == (2, 2)
    assert history.num_ranges == 3
    for layer in (0, 1):
        picture = load_picture(history, WHOLE, f"{layer}{BY_NOISE}", mean=False)
        assert picture is not None
        expected = np.array(RATIOS[layer], np.float32).reshape(-1, 1).repeat(2, 1)
        np.testing.assert_array_equal(picture.values, expected)
        assert picture.labels == {1.0: "σ 0–0.33", 3.0: "σ 0.33–0.67", 5.0: "σ 0.67–1"}
    hottest = load_picture(history, WHOLE, HOTTEST_EXPERT + BY_NOISE, mean=False)
    assert hottest is not None
    np.testing.assert_array_equal(hottest.values[:, 0], [1.5, 1, np.nan, 1, 2, 1])
    assert hottest.labels == {1.5: "layer 0", 4.5: "layer 1"}
    plain = load_picture(history, WHOLE, "0", mean=False)
    assert plain is not None
    np.testing.assert_array_equal(plain.values[:, 0], [1.5, 0.5])


def test_long_runs_keep_extremes_and_a_range_without_images_is_no_extreme(tmp_path: Path) -> None:
    hot = [[[1, 3], [2, 2], [0, 8]], LOAD[1]]
    records = [_record(step, hot if step == 3001 else LOAD) for step in range(1, 5001)]
    history = _history(tmp_path, records)
    far = load_picture(history, WHOLE, "0" + BY_NOISE, mean=False)
    mean = load_picture(history, WHOLE, "0" + BY_NOISE, mean=True)
    hottest = load_picture(history, WHOLE, HOTTEST_EXPERT + BY_NOISE, mean=False)
    coldest = load_picture(history, WHOLE, COLDEST_EXPERT + BY_NOISE, mean=False)
    assert far is not None
    assert mean is not None
    assert hottest is not None
    assert coldest is not None
    assert far.bin_steps > 1
    assert sorted(set(far.values[5].tolist())) == [1.0, 2.0]
    assert mean.values[1].tolist() == [1.5] * mean.values.shape[1]
    assert sorted(set(hottest.values[2].tolist())) == [1.0, 2.0]
    assert set(coldest.values[4].tolist()) == {0.0}


def test_what_can_be_chosen(tmp_path: Path) -> None:
    of_images = _history(tmp_path / "images", [_record(1, LOAD)])
    plain = [ALL_LAYERS, HOTTEST_EXPERT, COLDEST_EXPERT, "0", "1"]
    by_noise = [HOTTEST_EXPERT, COLDEST_EXPERT, "0", "1"]
    assert load_choices(of_images) == [*plain, *(choice + BY_NOISE for choice in by_noise)]
    of_text = _history(tmp_path / "text", [_record(1)])
    assert of_text.num_ranges == 0
    assert load_choices(of_text) == plain
    # The choice of the run that was shown before.
    picture = load_picture(of_text, WHOLE, "1" + BY_NOISE, mean=False)
    assert picture is not None
    assert picture.values.tolist() == [[1.0], [1.0]]


def test_loads_survive_the_cache_and_steps_that_go_back(tmp_path: Path) -> None:
    history = _history(tmp_path, [_record(step, LOAD) for step in range(1, 10)])
    history.save()
    with history.metrics.open("a") as file:
        file.write(json.dumps(_record(5, LOAD)) + "\n")
    again = History(history.metrics, tmp_path / "cache")
    again.catch_up()
    assert again.num_ranges == 3
    assert again.bands["load_by_sigma"].num_bins == 6
    assert again.bands["load_by_sigma_layers"].num_bins == 6


def test_figures_that_only_some_runs_have(tmp_path: Path) -> None:
    logits = {"kind": "instruments", "step": 1, "logit_max": 3.0, "router_drift": 0.1}
    _write(tmp_path / "runs/text", [_record(1), logits])
    _write(tmp_path / "runs/images", [_record(1, LOAD)])
    with Library(tmp_path / "runs", tmp_path / "cache") as library:
        library.read_all(library.states)
        page = Page(library)
        for names, shown in (
            (["text"], {"logit_max"}),
            (["images"], {"sigma_information", "sigma_max_vio"}),
            (["text", "images"], {"logit_max", "sigma_information", "sigma_max_vio"}),
        ):
            page.select(names, names[0])
            page.update(WHOLE, None)
            visible = {
                key
                for tab in (EXPERTS, LOGITS)
                for chart, _, key in page._by_run[tab]
                if chart.figure.visible
            }
            special = {"logit_max", "sigma_information", "sigma_max_vio"}
            assert visible & special == shown
            assert visible - special == {
                *("max_vio_max", "load_entropy", "dead_experts", "bias_norm"),
                *("attention_logit_max", "router_logit_rms", "router_drift"),
            }
