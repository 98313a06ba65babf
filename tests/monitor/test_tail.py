"""The reader of a growing metrics.jsonl: nothing twice, nothing torn, nothing lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.monitor import tail as tail_module
from trinity.monitor.tail import JsonLinesTail, Position


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _read_all(tail: JsonLinesTail, chunk_bytes: int) -> tuple[list[bytes], bool]:
    lines: list[bytes] = []
    restarted, more = False, True
    while more:
        chunk = tail.read(chunk_bytes)
        if chunk.restarted:
            lines.clear()
        lines += chunk.lines
        restarted |= chunk.restarted
        more = chunk.more
    return lines, restarted


def test_absent_file_reads_as_empty_and_may_come_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = JsonLinesTail(path)
    assert tail.read() == ([], False, False)
    path.write_text("a\n")
    assert tail.read() == ([b"a"], False, False)


def test_torn_last_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    tail = JsonLinesTail(path)
    assert tail.read().lines == [b'{"a": 1}']
    assert tail.read().lines == []
    _append(path, ": 2}\n")
    assert tail.read().lines == [b'{"b": 2}']
    assert tail.read().lines == []


@pytest.mark.parametrize("rewritten", ["one\n", "one\nTWO\n", "one\nTWO\nthree\nfour\n"])
def test_replaced_file_is_read_from_its_beginning(tmp_path: Path, rewritten: str) -> None:
    """Shorter, as long and longer than what was read; the mark before the place alone may agree."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("one\ntwo\n")
    tail = JsonLinesTail(path)
    tail.read()
    (tmp_path / "new").write_text(rewritten)
    (tmp_path / "new").replace(path)
    chunk = tail.read()
    assert chunk.restarted
    assert chunk.lines == rewritten.encode().splitlines()
    assert tail.read() == ([], False, False)


def test_file_rewritten_in_place_is_noticed_by_its_content(tmp_path: Path) -> None:
    """A number of an inode may be given out again, so that it looks like the same file."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("one\ntwo\n")
    tail = JsonLinesTail(path)
    tail.read()
    with path.open("r+") as file:
        file.write("one\nTWO\nthree\n")
    assert tail.read() == ([b"one", b"TWO", b"three"], True, False)


def test_same_lines_in_another_file_are_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("one\ntwo\n")
    tail = JsonLinesTail(path)
    tail.read()
    (tmp_path / "new").write_text("one\ntwo\nthree\n")
    (tmp_path / "new").replace(path)
    assert tail.read() == ([b"one", b"two", b"three"], True, False)


def test_another_reader_continues_from_a_kept_position(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("one\n")
    first = JsonLinesTail(path)
    first.read()
    _append(path, "two\n")
    second = JsonLinesTail(path, Position(*list(first.position)))
    assert second.read() == ([b"two"], False, False)


def test_unreadable_file_raises(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        JsonLinesTail(tmp_path / "metrics.jsonl").read()


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"",
        b"3",
        b"[1]",
        b"\xff\xfe",
        b"\0\0\0\0",
        b"[" * 100_000,
        b'{"kind": "train"}',
        b'{"kind": "train", "step": 1.5}',
        b'{"kind": "train", "step": true}',
        b'{"kind": 3, "step": 1}',
        b'{"kind": "train", "step": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda line: repr(line[:30]),
)
def test_lines_that_are_no_records_are_counted(tmp_path: Path, line: bytes) -> None:
    tail = JsonLinesTail(tmp_path / "metrics.jsonl")
    assert tail.parse(line) is None
    assert tail.num_bad_lines == 1
    assert tail.parse(b'{"kind": "train", "step": 1, "loss": NaN}') is not None
    assert tail.num_bad_lines == 1


def test_line_beyond_all_bounds_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_module, "MAX_LINE_BYTES", 100)
    path = tmp_path / "metrics.jsonl"
    path.write_text("a\n" + "x" * 1000 + "\nb\n")
    tail = JsonLinesTail(path)
    assert _read_all(tail, 16) == ([b"a", b"b"], False)
    assert tail.num_bad_lines == 1


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.one_of(st.binary(max_size=12), st.just(b"\n"), st.none()), min_size=1, max_size=40
    ),
    chunk_bytes=st.integers(1, 40),
)
def test_whatever_is_written_in_whatever_pieces_each_line_comes_once(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes | None], chunk_bytes: int
) -> None:
    """None is a poll; the pieces between are writes of any bytes."""
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    tail = JsonLinesTail(path)
    read: list[bytes] = []
    with path.open("ab") as file:
        for piece in [*pieces, None]:
            if piece is None:
                lines, restarted = _read_all(tail, chunk_bytes)
                assert not restarted
                read += lines
            else:
                file.write(piece)
                file.flush()
    assert read == b"".join(filter(None, pieces)).split(b"\n")[:-1]
    assert tail.position.offset <= os.stat(path).st_size
