"""What ``trinity monitor`` does: serve the page, or write it as a report."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from trinity.core.errors import ConfigError, DataError

NEEDED = ("bokeh", "tsdownsample")


def monitor_command(
    directory: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 5006,
    export: Path | None = None,
    runs: Sequence[str] = (),
) -> None:
    """Serve the page over the runs below ``directory`` until interrupted, or write a report.

    Nothing is written below ``directory``. The page asks nobody for a password: bound to another
    ``host`` than loopback, everybody who reaches it reads it.

    Args:
        directory: a run, or a directory with runs up to three levels below.
        host: address to listen on.
        port: to listen on; 0 takes any that is free.
        export: write a report that needs no network here, and do not serve.
        runs: names of runs to select first; for a report, those it is of (default: all).

    Raises:
        ConfigError: the extra is not installed, the address or a run's name is wrong.
        DataError: the directory is missing, or there is nothing to report.
    """
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"trinity monitor needs {package}; pip install 'trinity-pretrain[monitor]'"
            )
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; give a run or a directory of runs")
    from trinity.monitor.library import Library

    library = Library(directory)
    unknown = [name for name in runs if name not in library.states]
    if unknown:
        known = ", ".join(library.states) or "none"
        raise ConfigError(f"run {unknown[0]!r} is not below {directory}; there are: {known}")
    if export is not None:
        from trinity.monitor.report import write_report

        write_report(library, export, list(runs) or list(library.states))
        print(f"wrote {export}")
        return
    from trinity.monitor.server import serve

    serve(library, host, port, list(runs))
