"""Every fault of the table has tests, they exist, and the page shows the table."""

from __future__ import annotations

import fnmatch

import pytest

from tests.faults.matrix import MATRIX, PAGE, ROOT, Row, expanded, names_in, with_table


@pytest.mark.parametrize("row", MATRIX, ids=lambda row: str(row.number))
def test_tests_of_a_row_exist(row: Row) -> None:
    assert row.tests
    for test in row.tests:
        assert expanded(test), test


def test_rows_are_numbered() -> None:
    assert [row.number for row in MATRIX] == list(range(1, len(MATRIX) + 1))


def test_every_test_of_this_folder_is_in_the_table() -> None:
    claimed = [test for row in MATRIX for test in row.tests]
    for path in (ROOT / "tests/faults").glob("test_*.py"):
        if path.name == "test_matrix.py":
            continue
        for name in names_in(f"faults/{path.name}"):
            wanted = f"faults/{path.name}::{name}"
            assert any(fnmatch.fnmatch(wanted, pattern) for pattern in claimed), wanted


def test_page_shows_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text, "run `python -m tests.faults.matrix`"
