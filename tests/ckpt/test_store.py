"""The checkpoint store: exact, atomic, and unmoved by damaged or hostile directories."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from trinity.ckpt.manifest import MANIFEST_FILE
from trinity.ckpt.safe_reader import METADATA_FILE
from trinity.ckpt.store import (
    clean_stale,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
)
from trinity.core.errors import CheckpointError


def _tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(33, 17, generator=generator),
        "model.bias": torch.randn(9, generator=generator, dtype=torch.float64),
        "optim.step": torch.tensor(3.0),
        "data.rows": torch.arange(7),
        "rng.cpu": torch.get_rng_state(),
    }


def _empty() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in _tensors().items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, 1, _tensors(1), {"step": 1}, keep_last=3)
    return save_checkpoint(tmp_path, 2, _tensors(2), {"step": 2}, keep_last=3)


def test_what_is_loaded_is_what_was_saved(saved: Path, tmp_path: Path) -> None:
    loaded = _empty()
    assert load_checkpoint(saved, loaded) == {"step": 2}
    for name, tensor in _tensors(2).items():
        assert torch.equal(loaded[name], tensor), name
    some = load_tensors(saved, ["model.weight"])
    assert torch.equal(some["model.weight"], loaded["model.weight"])
    assert (tmp_path / "checkpoints/latest").read_text().strip() == saved.name


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(5):
        save_checkpoint(tmp_path, step, _tensors(), {}, keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000003"]


def test_a_step_of_nine_digits_is_newer_than_one_of_eight(tmp_path: Path) -> None:
    older, newer = (
        save_checkpoint(tmp_path, step, _tensors(), {}, keep_last=2)
        for step in (99_999_999, 100_000_000)
    )
    (tmp_path / "checkpoints/step-notes").mkdir()
    assert list_checkpoints(tmp_path) == [newer, older]
    assert latest_checkpoint(tmp_path) == (newer, [])


def test_a_save_beside_a_damaged_newer_one_is_not_taken_for_old(tmp_path: Path) -> None:
    """After a resume that passed over a damaged step 12, a save of step 10 must survive."""
    for step in (8, 12):
        newest = save_checkpoint(tmp_path, step, _tensors(step), {}, keep_last=2)
    _flip(_shard(newest))
    saved = save_checkpoint(tmp_path, 10, _tensors(10), {"step": 10}, keep_last=1)
    assert list_checkpoints(tmp_path) == [newest, saved]
    assert latest_checkpoint(tmp_path)[0] == saved
    again = save_checkpoint(tmp_path, 12, _tensors(3), {"step": 12}, keep_last=1)
    assert list_checkpoints(tmp_path) == [again]
    loaded = _empty()
    assert load_checkpoint(again, loaded) == {"step": 12}
    assert torch.equal(loaded["model.weight"], _tensors(3)["model.weight"])
    assert sorted(p.name for p in again.parent.iterdir()) == ["latest", again.name]


@pytest.mark.parametrize("call", range(3))
def test_a_crash_while_the_same_step_is_replaced_loses_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Stop dead at each rename of a save of a step that exists, then start again."""
    calls = []

    def die(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def maybe(source: Path, target: Path) -> None:
            ours = Path(target).parent.name == "checkpoints"  # DCP renames a file of its own
            calls.extend([name] * ours)
            if ours and len(calls) > call:  # everything after the crash is left undone as well
                raise KeyboardInterrupt
            real(source, target)

        return maybe

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, die(name))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, _tensors(5), {"step": 2}, keep_last=1)
    clean_stale(tmp_path)
    found, rejected = latest_checkpoint(tmp_path)
    assert (found, rejected) == (saved, [])
    loaded = _empty()
    assert load_checkpoint(saved, loaded) == {"step": 2}
    expected = _tensors(5 if call == 2 else 2)  # the third is `latest`: the new one is in place
    assert torch.equal(loaded["model.weight"], expected["model.weight"])


def test_an_interrupt_while_saving_stays_an_interrupt(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DCP wraps Ctrl-C; it must not be told as a full disk."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 3, _tensors(), {}, keep_last=1)
    assert latest_checkpoint(tmp_path)[0] == saved
    assert not list((tmp_path / "checkpoints").glob("tmp-*"))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _rewrite_manifest(directory: Path) -> None:
    """Make a tampered directory self-consistent, as an attacker would."""
    files = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in directory.iterdir()
        if path.name != MANIFEST_FILE
    }
    (directory / MANIFEST_FILE).write_text(json.dumps({"format": 1, "files": files}))


def _shard(directory: Path) -> Path:
    return next(directory.glob("*.distcp"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip in a shard": (lambda d: _flip(_shard(d)), "SHA-256"),
    "bit flip in the metadata": (lambda d: _flip(d / METADATA_FILE), "SHA-256"),
    "bit flip in the state": (lambda d: _flip(d / "state.json"), "SHA-256"),
    "truncated shard": (lambda d: os.truncate(_shard(d), 100), "bytes instead of"),
    "missing shard": (lambda d: _shard(d).unlink(), "is missing"),
    "missing metadata": (lambda d: (d / METADATA_FILE).unlink(), "is missing"),
    "foreign file": (lambda d: (d / "extra.bin").write_text("x"), "extra.bin is not in"),
    "no manifest": (lambda d: (d / MANIFEST_FILE).unlink(), "has no manifest"),
    "garbled manifest": (lambda d: (d / MANIFEST_FILE).write_text("{"), "not readable JSON"),
    "nested bomb": (lambda d: (d / MANIFEST_FILE).write_text("[" * 200_000), "not readable JSON"),
    "manifest is a pipe": (
        lambda d: ((d / MANIFEST_FILE).unlink(), os.mkfifo(d / MANIFEST_FILE)),
        "not a plain file",
    ),
    "manifest names a path": (
        lambda d: _edit_manifest(d, lambda m: m["files"].update({"../x": {}})),
        "not a plain file name",
    ),
    "manifest of another format": (
        lambda d: _edit_manifest(d, lambda m: m.update(format=9)),
        "has format 9",
    ),
    "manifest without hashes": (
        lambda d: _edit_manifest(d, lambda m: m["files"].update({"state.json": {"size": 1}})),
        "lacks size or sha256",
    ),
    "shard is a link": (
        lambda d: (_shard(d).rename(d.parent / "moved"), _shard_link(d)),
        "not a plain file",
    ),
}


def _edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    edit(manifest)
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))


def _shard_link(directory: Path) -> None:
    (directory / "__0_0.distcp").symlink_to(directory.parent / "moved")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_before_anything_is_read_and_the_previous_is_taken(
    saved: Path, tmp_path: Path, kind: str
) -> None:
    damage, message = DAMAGE[kind]
    damage(saved)
    untouched = _empty()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved, untouched)
    assert all(int(t.count_nonzero()) == 0 for t in untouched.values())
    found, rejected = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-00000001"
    assert len(rejected) == 1
    assert message in rejected[0]


class _Payload:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self._target}",))


def test_hostile_pickle_in_the_metadata_is_refused_and_not_executed(
    saved: Path, tmp_path: Path
) -> None:
    evidence = tmp_path / "executed"
    (saved / METADATA_FILE).write_bytes(pickle.dumps(_Payload(evidence)))
    _rewrite_manifest(saved)
    with pytest.raises(CheckpointError, match="foreign or hostile"):
        load_checkpoint(saved, _empty())
    assert not evidence.exists()


@pytest.mark.parametrize("kind", ["object entry", "path outside", "not metadata"])
def test_metadata_of_other_kinds_is_refused(saved: Path, tmp_path: Path, kind: str) -> None:
    evidence = tmp_path / "executed"
    if kind == "object entry":  # torch would unpickle this without any restriction
        for path in saved.glob("*.distcp"):
            path.unlink()
        dcp.save({"x": _Payload(evidence)}, checkpoint_id=saved, no_dist=True)
        message = "foreign or hostile"
    else:
        metadata = pickle.loads((saved / METADATA_FILE).read_bytes())
        if kind == "path outside":
            for info in metadata.storage_data.values():
                info.relative_path = "../../elsewhere.distcp"
            message = "outside it"
        else:
            metadata, message = [1, 2], "no checkpoint metadata"
        (saved / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    _rewrite_manifest(saved)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved, _empty())
    assert not evidence.exists()


def _enlarge(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["model.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size((1 << 30, 1 << 12))


def _make_hole(metadata: Any) -> None:
    metadata.state_dict_metadata["model.weight"].chunks = []


def _move_part(metadata: Any) -> None:
    metadata.state_dict_metadata["model.weight"].chunks[0].offsets = torch.Size((1, 0))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [(_enlarge, "bytes of tensors"), (_make_hole, "do not make up"), (_move_part, "do not make")],
)
def test_sizes_that_the_files_do_not_back_are_refused(
    saved: Path, tamper: Callable[[Any], None], message: str
) -> None:
    """Neither memory without end nor memory that nothing was written to."""
    metadata = pickle.loads((saved / METADATA_FILE).read_bytes())
    tamper(metadata)
    (saved / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    _rewrite_manifest(saved)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved, _empty())
    with pytest.raises(CheckpointError, match=message):
        load_tensors(saved, ["model.weight"])


def test_hostile_pickle_in_a_shard_is_refused_and_not_executed(saved: Path, tmp_path: Path) -> None:
    evidence, shard = tmp_path / "executed", _shard(saved)
    shard.write_bytes(pickle.dumps(_Payload(evidence)).ljust(shard.stat().st_size, b"\0"))
    _rewrite_manifest(saved)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(saved, _empty())
    assert not evidence.exists()


@pytest.mark.parametrize("text", ["[1]", "[" * 200_000, "{"])
def test_state_that_is_no_object_is_refused(saved: Path, text: str) -> None:
    (saved / "state.json").write_text(text)
    _rewrite_manifest(saved)
    untouched = _empty()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load_checkpoint(saved, untouched)
    assert all(int(t.count_nonzero()) == 0 for t in untouched.values())


def test_tensors_that_are_absent_are_named(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks model\.none"):
        load_tensors(saved, ["model.weight", "model.none"])


def test_another_models_checkpoint_is_refused_by_name(saved: Path) -> None:
    for change, message in (
        ({"model.more": torch.zeros(2)}, "lacks model.more"),
        ({"model.bias": None}, "also holds model.bias"),
        ({"model.bias": torch.zeros(8, dtype=torch.float64)}, r"model.bias is \(9,\)"),
        ({"model.bias": torch.zeros(9)}, "float64"),
    ):
        wanted = {k: t for k, t in {**_empty(), **change}.items() if t is not None}
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(saved, wanted)


def test_a_full_disk_leaves_the_last_good_checkpoint(saved: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: writes fail half way through."""
    code = (
        "import sys, torch, resource, signal\n"
        "from pathlib import Path\n"
        "from trinity.ckpt.store import save_checkpoint\n"
        "from trinity.core.errors import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    save_checkpoint(Path(sys.argv[1]), 3, {'w': torch.zeros(500_000)}, {}, keep_last=1)\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == CheckpointError.exit_code, done.stderr
    assert "could not save step 3" in done.stdout
    assert "not be written in full" in done.stdout
    assert "Earlier checkpoints are intact" in done.stdout
    assert list_checkpoints(tmp_path)[0] == saved
    assert not list((tmp_path / "checkpoints").glob("tmp-*"))
    assert (tmp_path / "checkpoints/latest").read_text().strip() == saved.name
    load_checkpoint(saved, _empty())


def test_leftovers_of_a_save_that_died_are_ignored_and_removed(saved: Path, tmp_path: Path) -> None:
    stale = tmp_path / "checkpoints/tmp-00000003-1"
    stale.mkdir()
    (stale / "part").write_text("half")
    assert latest_checkpoint(tmp_path)[0] == saved
    clean_stale(tmp_path)
    assert not stale.exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
