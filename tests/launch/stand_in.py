"""A trainer without a model: the files, signals and exit statuses of ``trinity pretrain``.

For trying the launch scripts in seconds (TRINITY_COMMAND). Takes what they pass, and as overrides:

    steps=60 save_every=10    length of the run, steps between checkpoints
    fail_at=15                every attempt fails after this step

The result is the sum of all steps: any step lost or done twice changes it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

STEP_S = 0.05


class _Job:
    """The ranks of this attempt; they wait for one another after each step, through files."""

    def __init__(self, run_dir: Path) -> None:
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        # The port is another one each time the ranks are started.
        attempt = f"{os.environ.get('SLURM_RESTART_COUNT', 0)}-{os.environ['MASTER_PORT']}"
        self.files = run_dir / f"ranks-{attempt}"
        self.files.mkdir(parents=True, exist_ok=True)
        self.stopped = self.files / "stopped"

    def wait_for_all(self, step: int) -> bool:
        """Whether all ranks made the step; False when the first rank stopped before it."""
        _publish(self.files / str(self.rank), str(step))
        while any(self._step_of(rank) < step for rank in range(self.world_size)):
            if self.stopped.exists():
                return False
            time.sleep(0.01)
        return True

    def _step_of(self, rank: int) -> int:
        path = self.files / str(rank)
        return int(path.read_text()) if path.exists() else 0


def _publish(path: Path, text: str) -> None:
    """Write so that no reader ever sees half of it."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(text)
    scratch.rename(path)


def _save(run_dir: Path, step: int, total: int) -> None:
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    (run_dir / f"checkpoints/step-{step:08d}").write_text(str(total))
    _publish(run_dir / "checkpoints/latest", f"step-{step:08d}\n")


def main() -> None:
    """Train, or go on from the last checkpoint."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _frame: asked.append(number))
    run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
    settings = {"steps": 60, "save_every": 10, "fail_at": 0}
    settings |= {key: int(value) for key, value in (a.split("=") for a in sys.argv if "=" in a)}
    job = _Job(run_dir)
    latest = run_dir / "checkpoints/latest"
    step = int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0
    total = int((run_dir / f"checkpoints/step-{step:08d}").read_text()) if step else 0
    while step < settings["steps"]:
        time.sleep(STEP_S)
        if not job.wait_for_all(step + 1):
            return
        step, total = step + 1, total + step + 1
        if job.rank > 0:
            continue
        _publish(run_dir / "heartbeat", f"{step}\n")
        if asked or step % settings["save_every"] == 0 or step == settings["steps"]:
            _save(run_dir, step, total)
        if asked:
            print(f"{signal.Signals(asked[0]).name}: saved step {step}, stopping", flush=True)
            job.stopped.touch()
            return
        if step == settings["fail_at"]:
            job.stopped.touch()
            sys.exit(f"failed at step {step}")
    if job.rank == 0:
        (run_dir / "result").write_text(str(total))
        (run_dir / "DONE").write_text(f"{step}\n")


if __name__ == "__main__":
    main()
