"""docs/launch.md lists every environment variable that the scripts and the program use."""

from __future__ import annotations

import re

import pytest

from tools.ledger import ROOT

OWN = re.compile(r"\bTRINITY_[A-Z_]+[A-Z]\b")
READ_BY_PROGRAM = re.compile(r"environ(?:\.get|\.setdefault)?[\[(]\s*\"([A-Z_]+)\"")
READ_BY_SCRIPTS = re.compile(r"\$\{?((?:SLURM|TORCH|OMP|GLOO|NCCL)[A-Z_]+)")
LAUNCH = sorted(path for path in (ROOT / "launch").rglob("*") if path.is_file())
SOURCES = [*LAUNCH, *sorted((ROOT / "trinity").rglob("*.py"))]


def _documented() -> set[str]:
    text = (ROOT / "docs/launch.md").read_text()
    rows = text.split("## Environment variables")[1].splitlines()
    names = " ".join(row.split("|")[1] for row in rows if row.startswith("| `"))
    return set(re.findall(r"`([A-Z_]+)`", names))


def _used() -> set[str]:
    texts = [path.read_text() for path in SOURCES]
    patterns = [OWN, READ_BY_PROGRAM, READ_BY_SCRIPTS]
    return {name for text in texts for pattern in patterns for name in pattern.findall(text)}


def test_every_variable_that_is_used_is_documented() -> None:
    assert _used() - _documented() == set()


def test_every_variable_of_ours_that_is_documented_is_used() -> None:
    ours = {name for name in _documented() if name.startswith("TRINITY_")}
    assert ours
    assert ours - _used() == set()


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_scripts_stop_at_errors_and_can_be_run(name: str) -> None:
    path = ROOT / "launch" / name
    assert "set -euo pipefail" in path.read_text()
    assert path.stat().st_mode & 0o111
