"""Names of the files in a run directory, for those who write them and those who read them."""

from __future__ import annotations

CONFIG_FILE = "config.toml"
"""The effective configuration."""
RECORD_FILE = "run.json"
"""Versions, fingerprints and facts of the machine."""
METRICS_FILE = "metrics.jsonl"
"""The record: steps, instruments, validation, events."""
HEARTBEAT_FILE = "heartbeat"
"""Number of the last finished step; changes with every step."""
DONE_FILE = "DONE"
"""Exists when the run has reached its last step."""
INTERVENTIONS_FILE = "interventions.json"
"""Rows that are skipped, and why."""
LAUNCH_PROGRESS_FILE = "launch-progress"
"""Where launch/slurm.sbatch keeps the step saved last, to see whether requeues get anywhere."""
