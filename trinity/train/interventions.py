"""What was done to a run besides training it: data that is skipped, layers taken out of FP8.

``RUN/interventions.json`` is read whenever the run is opened, so that no restart, from whatever
checkpoint, walks into the same data again. It is written before the run goes on.
"""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from trinity.ckpt.manifest import write_synced
from trinity.core import job
from trinity.core.errors import DataError
from trinity.core.run_files import INTERVENTIONS_FILE
from trinity.core.tables import NonNegative, Positive, Table


class Intervention(Table):
    """One entry of the file."""

    reason: str
    first_row: NonNegative
    end_row: Positive = Field(description="the first row that is trained on again")
    from_step: NonNegative = Field(description="where the run was")
    to_step: NonNegative | None = Field(default=None, description="where a rewind took it")
    attempt: Positive = 1
    out_of_fp8: tuple[str, ...] = ()
    time: float = Field(default_factory=time.time, description="unix seconds")


_ENTRIES = TypeAdapter(list[Intervention])


def read_interventions(directory: Path) -> list[Intervention]:
    """All entries of a run, oldest first. Raises DataError for a file that cannot be read."""
    path = directory / INTERVENTIONS_FILE
    if not path.exists():
        return []
    try:
        return _ENTRIES.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; it says which data the run skips. Mend it, or remove "
            "it to train on everything"
        ) from None


def add_intervention(directory: Path, entry: Intervention) -> None:
    """Append an entry; on the first process, the others wait for it."""
    if job.is_first():
        path = directory / INTERVENTIONS_FILE
        entries = [*read_interventions(directory), entry]
        temporary = path.with_suffix(".tmp")
        write_synced(temporary, _ENTRIES.dump_json(entries, indent=2).decode() + "\n")
        temporary.replace(path)
    job.barrier()
