"""Every command that the README shows works. Commands run as printed, on a smaller problem."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL_BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
SMALLER = {
    "tools/bench/train_step.py": ["--rounds", "1", "--no-compile-peer", "--sequence", "256"],
    "tools/bench/muon.py": ["--rounds", "1"],
    "tools/bench/data.py": ["--rounds", "1"],
}


SERVERS = ("monitor", "watch")
"""Verbs that serve until they are interrupted."""
SLOW = ("python tools/bench/train_step.py", "trinity plan configs/large.toml")
"""Commands that take a minute even so."""


def _commands() -> list[Any]:
    text = "\n".join(
        path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    lines = [
        line.split("  #")[0].strip()
        for block in SHELL_BLOCK.findall(text)
        for line in block.splitlines()
    ]
    commands = dict.fromkeys(line for line in lines if line and not line.startswith("#"))
    return [
        pytest.param(command, marks=pytest.mark.slow, id=command)
        if command.startswith(SLOW)
        else command
        for command in commands
    ]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one run of this module lives; made by the first command that trains."""
    return tmp_path_factory.mktemp("readme") / "run"


def _run(arguments: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        arguments,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _serves(arguments: list[str]) -> None:
    """A command that goes on until it is interrupted says where it listens, and answers there."""
    command = [sys.executable, "-u", "-m", "trinity", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        urls = (re.search(r"http://127\.0\.0\.1:\d+\S*", line) for line in process.stdout)
        url = next(found[0] for found in urls if found)
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.status == 200
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


def _trained(run_dir: Path, tiny_toml: Path) -> Path:
    if not run_dir.exists():
        command = ["-m", "trinity", "pretrain", str(tiny_toml), "--run-dir", str(run_dir)]
        _run([sys.executable, *command], ROOT)
    return run_dir


@pytest.fixture
def images_run_copy(request: pytest.FixtureRequest, command: str, tmp_path: Path) -> Path:
    """A finished run on images, for commands that name one."""
    if "runs/dit_tiny-DATE" in command:
        shutil.copytree(request.getfixturevalue("images_run"), tmp_path / "images")
    return tmp_path / "images"


@pytest.mark.parametrize("command", _commands())
def test_command(
    command: str,
    run_dir: Path,
    tiny_toml: Path,
    tiny_images_toml: Path,
    images_run_copy: Path,
    tmp_path: Path,
) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        recipe = _run(["make", "--dry-run", "--always-make", *words[1:]], ROOT)
        expected = {
            "train": "trinity pretrain configs/tiny.toml",
            "test": "-m pytest",
            "check": "ruff check",
        }[words[1]]
        assert expected in recipe
        return
    replaced = []
    for word in words[1:]:
        if word.startswith("runs/tiny-DATE"):
            replaced.append(str(_trained(run_dir, tiny_toml)))
        elif word == "runs":
            replaced.append(str(_trained(run_dir, tiny_toml).parent))
        elif word == "configs/tiny.toml" and words[1] != "params":
            replaced.append(str(tiny_toml))
        elif word.startswith("runs/dit_tiny-DATE"):
            replaced.append(str(images_run_copy))
        elif word == "configs/dit_tiny.toml":
            replaced.append(str(tiny_images_toml))
        elif word.startswith("exported") or word.endswith((".png", ".safetensors")):
            replaced.append(str(tmp_path / word))
        else:
            replaced.append(word)
    if words[1] == "sample-images" and "--output" not in words:
        replaced += ["--output", str(tmp_path / "samples.png")]
    if words[1] in SERVERS:
        _serves([*replaced, "--port", "0"])
    elif words[0] == "python":
        _run([sys.executable, *replaced, *SMALLER.get(words[1], [])], ROOT)
    elif words[0] == "launch/local.sh":
        environment = {"TRINITY_RUN_DIR": str(tmp_path / "run"), "TRINITY_PYTHON": sys.executable}
        _run([words[0], *replaced], ROOT, **environment)
    elif words[0] == "torchrun":
        launcher = [sys.executable, "-m", "torch.distributed.run"]
        _run([*launcher, *replaced, "--run-dir", str(tmp_path / "run")], ROOT)
    else:
        assert words[0] == "trinity", f"no rule to test `{command}`"
        _run([sys.executable, "-m", "trinity", *replaced], ROOT)


def test_help_answers_without_loading_torch() -> None:
    code = (
        "import sys; sys.argv = ['trinity', '--help']\n"
        "from trinity.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'datasets', 'pydantic', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    _run([sys.executable, "-c", code], ROOT)
