"""The ablation: equal parameters, resumption, and what the tables say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tools import ablation
from tools.ablation_report import difference, mean_of, rates_table, rows_table, write_document
from tools.ablation_rows import BUILD_UP, TABLES, TOLERANCE, equal_width, num_parameters, row_of

ROWS = ["conv", "mamba2"]
MARKERS = "".join(
    f"before {name}\n<!-- begin: {name} -->\nold\n<!-- end: {name} -->\n"
    for name in ("setting", "rates", "build-up", "ratio")
)


@pytest.mark.parametrize("table", TABLES)
def test_all_rows_of_a_table_have_equally_many_parameters(table: str) -> None:
    counts = [num_parameters(row, equal_width(table, row)) for row in TABLES[table]]
    assert max(counts) / min(counts) - 1 <= TOLERANCE
    keys = [row.key for row in TABLES[table]]
    assert len(set(keys)) == len(keys)
    assert {row.versus for row in TABLES[table]} <= {"", *keys}


def _arguments(directory: Path, repository: Path, cache: Path, *rest: str) -> list[str]:
    corpus = repository / "tests/data/fixtures/corpus.jsonl"
    source = f"{{name='fixture', path='{corpus}', format='jsonl'}}"
    settings = [
        "train.num_steps=3",
        "schedule.warmup_steps=1",
        "schedule.decay_steps=1",
        "train.validation_rows=4",
        "batch.sequence_length=64",
        "data.buffer_documents=8",
        "data.held_out_fraction=0.1",
        "data.tokenizer.vocab_size=400",
        f"data.sources=[{source}]",
        f"data.cache_dir={cache}",
    ]
    return [
        *("--rows", *ROWS, "--only", BUILD_UP, "--seeds", "1", "--factors", "1"),
        *("--results", str(directory / "ablation.json")),
        *("--document", str(directory / "ablation.md")),
        *("--save", "--set", *settings),
        *rest,
    ]


def test_trains_saves_and_continues(tmp_path: Path, repository: Path, data_cache: Path) -> None:
    document, results = tmp_path / "ablation.md", tmp_path / "ablation.json"
    document.write_text(MARKERS, encoding="utf-8")
    arguments = _arguments(tmp_path, repository, data_cache)
    assert ablation.main(arguments) == 0
    saved = json.loads(results.read_text())
    assert sorted(saved["runs"]) == ["build-up/conv/lr1/seed1", "build-up/mamba2/lr1/seed1"]
    assert all(5 < run["held_out"] < 8 for run in saved["runs"].values())
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    text = document.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.count("before") == 4
    shown = f"{saved['runs']['build-up/conv/lr1/seed1']['held_out']:.3f}"
    assert shown in text

    # What is finished stays; what is missing gives the same loss again.
    first = saved["runs"].pop("build-up/conv/lr1/seed1")
    kept = saved["runs"]["build-up/mamba2/lr1/seed1"]
    results.write_text(json.dumps(saved))
    ablation.main(arguments)
    again = json.loads(results.read_text())["runs"]
    assert again["build-up/mamba2/lr1/seed1"] == kept
    assert again["build-up/conv/lr1/seed1"]["held_out"] == first["held_out"]


def test_other_settings_are_trained_anew(tmp_path: Path) -> None:
    job = ablation.Job(BUILD_UP, "conv", 1, 1.0)
    study = ablation.Study(tmp_path / "ablation.json")
    study.keep(job, {"held_out": 3.0})
    assert ablation.Study(study.path).missing([job, job]) == []
    assert ablation.Study(study.path, ("train.num_steps=300",)).missing([job, job]) == [job]
    assert ablation.Study(study.path).missing([job._replace(seed=2)])


def test_learning_rate_is_the_best_mean_and_never_one_that_diverges(tmp_path: Path) -> None:
    study = ablation.Study(tmp_path / "ablation.json")
    found = {("conv", 1.0): 3.0, ("mamba2", 1.0): 3.2, ("conv", 2.0): 2.8, ("mamba2", 2.0): 3.3}
    found |= {("conv", 4.0): 1.0, ("mamba2", 4.0): None}
    for (row, factor), loss in found.items():
        key = ablation.Job(BUILD_UP, row, ablation.TUNING_SEED, factor).key
        study.saved["runs"][key] = {"held_out": loss}
    assert study.best_factor((1.0, 2.0, 4.0), ROWS) == 2.0


def test_means_and_differences_by_hand() -> None:
    mean = mean_of([1.0, 2.0, 3.0])
    assert (mean.value, mean.standard_error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert str(mean) == "2.000 ± 0.577"
    assert str(mean_of([1.5])) == "1.500"
    assert mean_of([-0.25]).signed() == "−0.250"
    saved = _saved({"linear": [3.0, 4.0, 5.0], "conv": [2.5, 3.3, None]})
    change = difference(saved, BUILD_UP, row_of(BUILD_UP, "conv"))
    assert change is not None
    assert change.values == pytest.approx((-0.5, -0.7))
    (line,) = (line for line in rows_table(saved, BUILD_UP) if "convolution over" in line)
    assert "| 2 | 2.900 ± 0.400 | 1 | −0.600 ± 0.100 | 2.93 |" in line


def test_a_run_that_diverged_is_said_so(tmp_path: Path) -> None:
    saved = _saved({"mamba2s": [None]})
    assert rates_table(saved)[-1].endswith("| diverged |")
    document = tmp_path / "ablation.md"
    document.write_text(MARKERS, encoding="utf-8")
    write_document(saved, document)
    assert "diverged" in document.read_text(encoding="utf-8")


def _saved(losses: dict[str, list[float | None]]) -> dict[str, Any]:
    """A saved file with one run per loss."""
    runs = {}
    for row, values in losses.items():
        for seed, loss in enumerate(values, start=1):
            run = {"table": BUILD_UP, "row": row, "seed": seed, "lr_factor": 1.0, "held_out": loss}
            rest = {"parameters": 1000, "intermediate_size": 8, "cpu_s": 1.0, "wall_s": 2.0}
            runs[f"{row}{seed}"] = run | rest
    common = {"lr_factor": 1.0, "muon_lr": 0.01, "adamw_lr": 0.003, "num_steps": 3}
    common |= {"tokens_per_step": 64, "sequence_length": 64, "precision": "bf16", "torch": "2"}
    return {"common": common, "runs": runs}
