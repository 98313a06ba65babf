"""The runbook has an entry for everything that alarms, and names only what exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tools import instruments_table
from tools.alert_rules import EVENT_ALERTS, render
from trinity.cli import app
from trinity.core.config import Config
from trinity.core.instruments import instruments
from trinity.core.load_config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs/runbook.md", ROOT / "docs/stability.md"]
BOTH_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
EVENTS = [*EVENT_ALERTS, "skip"]
SITUATIONS = ["the job is gone", "the run will not resume", "the disk is full"]
STAND_INS = {"RUN": "runs", "RUNS": "runs", "STEP": "3", "RUN/config.toml": "configs/tiny.toml"}
"""What a reader puts in the place of these words."""

FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
OVERRIDE = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+)+=\S+")
DOTTED = re.compile(r"(?<![\w/.])[a-z_0-9]+(?:\.[a-z_0-9]+)+")
PLACE = re.compile(r"(configs|docs|launch|tests|tools|trinity)/[\w./-]+")


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _code(page: Path) -> list[str]:
    """Code spans, and the lines of code blocks without their remarks."""
    blocks = FENCE.findall(_text(page))
    spans = [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", _text(page)))]
    return spans + [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def _commands(page: Path, first: str) -> list[list[str]]:
    """The words after ``first``, wherever in a line of code a command begins with it."""
    parts = [part for code in _code(page) for part in re.split(r"\s*(?:&&|;|\|)\s*", code)]
    commands = [shlex.split(part) for part in parts if part.split()[:1] == [first]]
    return [command[1:] for command in commands if command[1:]]


def _headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", FENCE.sub("", _text(page)), re.MULTILINE)


def _anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_everything_that_can_fire_has_an_entry_and_nothing_else_has() -> None:
    entries = re.findall(r"^## (.*)$", _text(PAGES[0]), re.MULTILINE)
    assert sorted(entries) == sorted([*instruments(), *EVENTS, *SITUATIONS])


def test_every_entry_says_what_to_see_and_what_to_do() -> None:
    _, *entries = re.split(r"^## ", _text(PAGES[0]), flags=re.MULTILINE)
    for entry in entries:
        name, body = entry.split("\n", 1)
        assert "\n**See:**" in body, name
        assert re.search(r"^\*\*Then", body, re.MULTILINE), name


def test_alerts_link_to_a_heading() -> None:
    groups = yaml.safe_load(render())["groups"]
    links = {rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"]}
    assert len(links) > len(instruments())
    for link in links:
        path, _, anchor = link.partition("#")
        assert not anchor or anchor in map(_anchor, _headings(ROOT / path)), link


@BOTH_PAGES
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(FENCE.sub("", _text(page)))
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in map(_anchor, _headings(target)), link


def test_what_the_pages_repeat_of_the_table_is_current() -> None:
    stability, runbook = _text(instruments_table.STABILITY), _text(instruments_table.RUNBOOK)
    remedy = "run `python -m tools.instruments_table`"
    assert instruments_table.with_sections(stability) == stability, remedy
    assert instruments_table.with_quotes(runbook) == runbook, remedy


def test_quotes_follow_the_table() -> None:
    page = "## loss\n\n> old\n> old\n\nText.\n\n## hang\n\nText.\n\n## skip\n\n> own\n\nText.\n"
    written = instruments_table.with_quotes(page)
    assert instruments()["loss"].first in written
    assert EVENT_ALERTS["hang"][1] in written
    assert "> old" not in written
    assert "## skip\n\n> own\n\nText." in written
    assert written.count("Text.") == 3
    assert instruments_table.with_quotes(written) == written


@BOTH_PAGES
def test_commands_exist_and_take_these_arguments(page: Path) -> None:
    root = typer.main.get_command(app)
    commands = _commands(page, "trinity")
    assert commands
    for words in commands:
        _parse(root, words)


def _parse(command: Any, words: list[str]) -> None:
    """Parse as the command line would, without running anything."""
    line = " ".join(["trinity", *words])
    while hasattr(command, "commands"):
        assert words, line
        assert words[0] in command.commands, f"`{line}`: there is no {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    if not words:  # only named
        return
    filled = [STAND_INS.get(word, word) for word in words]
    command.make_context(line, filled).close()  # its error names the option or argument


@BOTH_PAGES
def test_keys_exist(page: Path) -> None:
    """Every dotted name that begins with a table of the configuration, also outside of code."""
    names = [name for name in DOTTED.findall(_text(page)) if not name.endswith(".md")]
    found = {name for name in names if name.split(".")[0] in _tables()}
    assert len(found) > 10
    unknown = sorted(name for name in found if not _is_key(name))
    assert unknown == []


def _tables() -> set[str]:
    return set(Config.model_fields) - {"name", "seed", "output_dir"}


def _is_key(name: str) -> bool:
    table: Any = Config
    for position, part in enumerate(parts := name.split(".")):
        if part not in table.model_fields:
            return False
        table = table.model_fields[part].annotation
        if not hasattr(table, "model_fields"):
            rest = parts[position + 1 :]
            return not rest or (name.startswith("log.alarm_levels.") and rest[0] in instruments())
    return True


@BOTH_PAGES
def test_overrides_are_accepted(page: Path) -> None:
    overrides = [word for code in _code(page) for word in code.split() if OVERRIDE.fullmatch(word)]
    assert overrides
    for override in overrides:
        load_config(ROOT / "configs/tiny.toml", [override])


@BOTH_PAGES
def test_files_modules_and_variables_exist(page: Path) -> None:
    for words in _commands(page, "python"):
        assert words[0] == "-m"
        assert importlib.util.find_spec(words[1]) is not None, words
    for word in (word for code in _code(page) for word in code.split()):
        if PLACE.fullmatch(word):
            assert (ROOT / word).exists(), word
    launch = (ROOT / "docs/launch.md").read_text(encoding="utf-8")
    for variable in re.findall(r"TRINITY_[A-Z_]+", _text(page)):
        assert f"`{variable}`" in launch, variable
