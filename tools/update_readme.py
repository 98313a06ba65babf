"""Write measured numbers from ``tools/bench/results`` into the README, between its markers.

make train | tee tools/bench/results/make_train.txt
python tools/bench/train_step.py --sequence 1024 --json tools/bench/results/train_step_1024.json
python -m tools.ledger --save; python -m tools.ledger --save --dtype fp32
python -m tools.plan_check --save; python -m tools.plan_memory --save
python -m tools.dit_digits --save
python tools/update_readme.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools/bench/results"
NUM_HEAD_LINES = 4


def train_log() -> str:
    """The beginning and the end of a recorded ``make train``."""
    lines = (RESULTS / "make_train.txt").read_text(encoding="utf-8").rstrip().splitlines()
    lines = [line.rstrip() for line in lines if re.match(r"step|validation|MaxVio|run:", line)]
    steps = [line for line in lines if line.startswith("step")]
    rest = [line for line in lines if not line.startswith("step")]
    shown = [*steps[:NUM_HEAD_LINES], "...", *steps[-2:], *rest]
    return "```\n" + "\n".join(shown) + "\n```"


def step_table() -> str:
    """Ratios of CPU time, one column per sequence length."""
    records = [
        json.loads((RESULTS / f"train_step_{length}.json").read_text(encoding="utf-8"))
        for length in (1024, 4096)
    ]
    heading = "| | " + " | ".join(
        f"sequence {r['sequence']}: CPU ms | vs default | vs best" for r in records
    )
    lines = [heading + " |", "| --- " * 7 + "|"]
    for rows in zip(*(record["rows"] for record in records), strict=True):
        cells = " | ".join(
            f"{row['cpu_ms']:.0f} | {row['vs_default']:.2f} | {row['vs_best']:.2f}" for row in rows
        )
        lines.append(f"| {rows[0]['candidate']} | {cells} |")
    versions = f"torch {records[0]['torch']}, transformers {records[0]['transformers']}"
    return "\n".join(lines) + f"\n\nMeasured with {versions}; higher ratios are faster."


def parity_ledger() -> str:
    """The layouts of the ledger in fp64 and fp32: the largest difference of any column."""
    saved = json.loads((RESULTS / "ledger.json").read_text(encoding="utf-8"))
    columns = list(next(iter(saved["fp64"]["rows"].values())))
    lines = [
        "| layout | ranks | " + " | ".join(columns) + " | all, fp32 |",
        "| --- " * (len(columns) + 3) + "|",
    ]
    for name, row in saved["fp64"]["rows"].items():
        cells = " | ".join(f"{row[column]:.0e}" for column in columns)
        narrow = saved["fp32"]["rows"].get(name)
        worst = f"{max(narrow.values()):.0e}" if narrow else "open"
        ranks = saved["fp64"]["ranks"][name]
        lines.append(f"| {name} | {ranks} | {cells} | {worst} |")
    return "\n".join(lines)


def planner_tables() -> str:
    """Speeds against published runs, peak memory against runs on this machine."""
    runs = json.loads((RESULTS / "plan_check.json").read_text(encoding="utf-8"))
    lines = [
        "| published run | GPUs | tokens/s/GPU | predicted | error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        error = run["predicted"] / run["published"] - 1
        lines.append(
            f"| {run['name']} | {run['gpus']} | {run['published']:,.0f} | "
            f"{run['predicted']:,.0f} | {error:+.0%} |"
        )
    errors = [abs(run["predicted"] / run["published"] - 1) for run in runs]
    lines += [
        "",
        f"Mean size of the error {sum(errors) / len(errors):.0%}.",
        "",
        "| peak memory of a rank, real steps on a CPU | measured MiB | predicted MiB | error |",
        "| --- | --- | --- | --- |",
    ]
    memory = json.loads((RESULTS / "plan_memory.json").read_text(encoding="utf-8"))
    for name, row in memory.items():
        lines.append(
            f"| {name} | {row['measured_mib']:,.0f} | {row['predicted_mib']:,.0f} | "
            f"{row['error']:+.1%} |"
        )
    return "\n".join(lines)


def digits() -> str:
    """What the digits transformer took to train, and how its samples were judged."""
    run = json.loads((RESULTS / "dit_digits.json").read_text(encoding="utf-8"))
    real = run["real_half"]
    return "\n".join(
        [
            f"{run['steps']} steps in {run['cpu_minutes']:.1f} CPU minutes of one thread. A "
            f"classifier trained on real digits alone ({run['classifier_held_out_accuracy']:.1%} "
            f"right on held-out ones) recognises {run['class_accuracy']:.1%} of {run['samples']} "
            "samples as what they were to be.",
            "",
            "| | Frechet distance | sliced Wasserstein |",
            "| --- | --- | --- |",
            f"| samples against real digits | {run['frechet_distance']:.2f} | "
            f"{run['sliced_wasserstein']:.3f} |",
            f"| one half of the real digits against the other | {real['frechet_distance']:.2f} | "
            f"{real['sliced_wasserstein']:.3f} |",
            "",
            "`python -m tools.dit_digits --save` makes them again; distances are in the "
            "features of that classifier, or in pixels.",
        ]
    )


def dynamic_patches(file: str) -> str:
    """Quality against speed of samplers, from the record of ``tools.ddit_dit`` or ``ddit_flux``."""
    saved = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    rows = saved["methods"]
    lines = [
        "| sampler | speed | tokens | GFLOP | Frechet | sliced Wasserstein | class right | PSNR "
        "| SSIM |",
        "| --- " * 9 + "|",
    ]
    for row in rows:
        near = f"{row['psnr']:.1f} | {row['ssim']:.3f}" if "psnr" in row else "|"
        lines.append(
            f"| {row['name']} | {rows[0]['cpu_ms'] / row['cpu_ms']:.2f}x | "
            f"{row['token_share']:.0%} | {row['gflops']:.1f} | {row['frechet_distance']:.2f} | "
            f"{row['sliced_wasserstein']:.4f} | {row['class_accuracy']:.1%} | {near} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Replace every marked section."""
    in_readme = (
        ("make train", train_log()),
        ("ledger", parity_ledger()),
        ("planner", planner_tables()),
        ("dit_digits", digits()),
        ("train_step", step_table()),
    )
    _replace(ROOT / "README.md", in_readme)
    tables = [(name, dynamic_patches(f"{name}.json")) for name in ("ddit_dit", "ddit_flux")]
    _replace(ROOT / "docs/dynamic_patches.md", tables)


def _replace(path: Path, sections: Iterable[tuple[str, str]]) -> None:
    text = path.read_text(encoding="utf-8")
    for name, section in sections:
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{section}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
