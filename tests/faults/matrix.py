"""The faults that a run survives, or refuses by name: what is promised, and which tests prove it.

python -m tests.faults.matrix           # writes the table of docs/faults.md anew
python -m tests.faults.matrix --list    # the tests, for pytest's command line
"""

from __future__ import annotations

import ast
import fnmatch
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/faults.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"


class Row(NamedTuple):
    """One fault."""

    number: int
    fault: str
    injection: str
    promise: str
    tests: tuple[str, ...]
    """``path/below/tests.py::name``; a name may end in ``*``."""


MATRIX = (
    Row(
        1,
        "a process is killed at any moment",
        "kill -9: while it starts, at a step, in a save; 200 times, and one rank of two",
        "the next attempt resumes from a checkpoint at most two intervals old; losses, weights and "
        "optimizer state equal those of an undisturbed run, bit for bit",
        (
            "faults/test_kill.py::test_a_few_kills",
            "faults/test_kill.py::test_200_kills",
            "faults/test_kill.py::test_a_rank_of_two_is_killed",
            "train/test_resume.py::test_kill_9_at_a_random_step_then_resume",
            "launch/test_local.py::test_a_worker_that_is_killed_is_restarted_*",
        ),
    ),
    Row(
        2,
        "killed during a save",
        "half of those 200 kills; a process that ends itself between two writes",
        "every published checkpoint is whole; the one before stays; what is left of the save is "
        "removed at the next start",
        (
            "faults/test_kill.py::test_200_kills",
            "ckpt/test_background.py::test_killed_half_way_the_last_good_checkpoint_is_there",
            "ckpt/test_store_ranks.py::test_a_rank_killed_before_the_rename_*",
            "ckpt/test_store.py::test_a_crash_while_the_same_step_is_replaced_loses_nothing",
            "ckpt/test_store.py::test_leftovers_of_a_save_that_died_are_ignored_and_removed",
        ),
    ),
    Row(
        3,
        "the newest checkpoint is damaged",
        "a flipped bit, a truncated or missing file",
        "found before any tensor is used; the newest sound one is taken, and the log names the "
        "file; an error where none is left",
        (
            "ckpt/test_store.py::test_damage_is_found_before_anything_is_read_*",
            "ckpt/test_store_ranks.py::test_damage_that_one_rank_finds_is_an_error_on_all",
            "train/test_resume.py::test_resume_falls_back_to_the_previous_checkpoint_*",
            "train/test_bad_input.py::test_bad_checkpoints",
        ),
    ),
    Row(
        4,
        "the disk is full for a while",
        "a limit on the size of files, from one step to another: of checkpoints, of every file",
        "training goes on; one event `checkpoint_failed`; older checkpoints are untouched; the "
        "next save is tried; no line of the journal is lost",
        (
            "faults/test_disk.py::test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_*",
            "ckpt/test_background.py::test_a_failed_save_is_an_error_at_the_next_call",
            "ckpt/test_background_ranks.py::test_a_failure_of_one_rank_stops_all_*",
            "ckpt/test_store_ranks.py::test_a_full_disk_on_one_rank_is_an_error_on_all",
        ),
    ),
    Row(
        5,
        "the disk is full at the end",
        "the same limit, never lifted",
        "exit status 4, no `DONE`; a later attempt goes on from the last checkpoint",
        ("faults/test_disk.py::test_a_last_state_that_cannot_be_saved_is_an_error",),
    ),
    Row(
        6,
        "a node dies",
        "all processes of a node of a real Slurm are killed; its daemons too",
        "requeued, at most a save interval is repeated",
        (
            "launch/test_slurm.py::test_a_node_whose_processes_die_costs_only_the_steps_*",
            "launch/test_slurm_faults.py::test_a_node_that_dies_costs_an_attempt",
        ),
    ),
    Row(
        7,
        "the node with the batch script dies",
        "the same, first node",
        "Slurm requeues the job by itself",
        ("launch/test_slurm_faults.py::test_a_node_that_dies_costs_an_attempt",),
    ),
    Row(
        8,
        "preemption, time limit, any number of signals",
        "a job of higher priority; USR1 ahead of the limit; TERM and USR1 without a pause until "
        "the end, also in a save",
        "one save after the same step on all ranks, exit status 75; equal results later",
        (
            "faults/test_signal_storm.py::test_a_storm_of_signals_is_one_request",
            "faults/test_signal_storm.py::test_a_signal_inside_a_save_waits_for_it",
            "train/test_resume.py::test_a_signal_saves_and_exits_with_the_documented_status",
            "launch/test_local.py::test_a_signal_to_a_worker_stops_all_after_the_same_step",
            "launch/test_slurm.py::test_preemption_saves_within_the_grace_time_*",
            "launch/test_slurm_faults.py::test_the_time_limit_saves_and_requeues",
            "launch/test_slurm_faults.py::test_a_save_that_never_comes_is_given_up",
        ),
    ),
    Row(
        9,
        "the controller of Slurm dies",
        "slurmctld is killed, and a rank",
        "the run is not disturbed; a requeue is asked for until it answers",
        ("launch/test_slurm_faults.py::test_a_controller_that_is_away_is_waited_for",),
    ),
    Row(
        10,
        "a rank hangs",
        "SIGSTOP; a read that never returns; C code that never lets go of Python",
        "stacks of every rank, `RUN/flight-recorder`, an event `hang` that names the rank and its "
        "line; exit status 124 (134 where no Python can run); the next attempt gives equal results",
        (
            "faults/test_watchdog.py::test_*",
            "faults/test_two_jobs.py::test_a_frozen_rank_ends_the_job_which_then_goes_on",
            "faults/test_two_jobs.py::test_a_rank_that_is_stuck_outside_of_collectives_is_named",
            "launch/test_slurm_faults.py::test_a_rank_that_hangs_is_ended_and_the_job_goes_on",
            "launch/test_slurm.py::test_a_rank_that_hangs_is_noticed_and_the_job_goes_on",
        ),
    ),
    Row(
        11,
        "a whole job is suspended",
        "SIGSTOP for four times the limit, then SIGCONT",
        "no alarm",
        ("faults/test_watchdog.py::test_a_process_that_was_stopped_and_goes_on_is_not_ended",),
    ),
    Row(
        12,
        "ranks call different collectives",
        "records of such ranks; a rank that stays away from one",
        "the diagnosis names both calls, or the rank that stays away",
        (
            "faults/test_watchdog.py::test_calls_that_differ_are_told",
            "faults/test_watchdog.py::test_the_rank_that_others_wait_for_is_named",
        ),
    ),
    Row(
        13,
        "a loss, gradient or weight is not finite",
        "a learning rate beyond reason; a poisoned step",
        "the step is not applied, on no rank; the state stays clean; an event names the rows",
        (
            "train/test_bad_input.py::test_a_loss_that_is_not_finite_ends_the_run_*",
            "train/test_rewind.py::test_skipped_steps_change_nothing_but_the_place_in_the_data",
            "train/test_rewind.py::test_too_many_skips_in_a_row_end_the_run",
        ),
    ),
    Row(
        14,
        "a spike of the loss",
        "poisoned rows",
        "skipped, or rewound and skipped; the run ends as one that never saw the rows",
        (
            "train/test_rewind.py::test_a_rewound_run_ends_as_one_that_never_saw_the_rows",
            "train/test_rewind.py::test_giving_up_says_so_and_keeps_the_state_before",
        ),
    ),
    Row(
        15,
        "hardware computes wrongly and says nothing",
        "a flipped bit of a replica; an operation that errs once, or always",
        "replicas are compared, steps replayed; a fault that stays is told from one that passes",
        (
            "train/test_corruption.py::test_a_flipped_bit_of_a_replica_is_found",
            "train/test_corruption.py::test_faults_are_told_apart",
            "train/test_corruption.py::test_the_rank_that_errs_is_named",
        ),
    ),
    Row(
        16,
        "another number of ranks",
        "saved by 4, resumed by 1, 2 and 3; other layouts",
        "equal state after loading, bit for bit; equal order of the data; equal losses but for "
        "the order of sums",
        (
            "faults/test_resize.py::test_saved_by_four_ranks_resumed_by_others",
            "data/test_loader.py::test_global_batches_are_the_same_at_any_world_size",
            "data/test_loader.py::test_state_carries_over_to_another_world_size",
            "ckpt/test_store_ranks.py::test_saved_by_many_ranks_loaded_by_others_and_by_one",
            "parallel/test_ledger.py::test_checkpoints_move_between_layouts",
        ),
    ),
    Row(
        17,
        "data changed between attempts",
        "another weight of a source",
        "refused: the fingerprint differs",
        ("train/test_bad_input.py::test_bad_checkpoints",),
    ),
    Row(
        18,
        "a shard changes while it is in use",
        "truncated; removed",
        "truncated: a DataError names it, the last checkpoint is intact; removed: read to the end",
        (
            "faults/test_disk.py::test_a_shard_that_is_cut_short_while_in_use_is_named",
            "faults/test_disk.py::test_a_shard_that_is_removed_while_in_use_is_read_to_the_end",
            "data/test_build.py::test_a_damaged_cache_is_named",
        ),
    ),
    Row(
        19,
        "a rank is slow",
        "a pause within the limit; a busy core beside it",
        "nothing ends; the instruments name the rank",
        (
            "faults/test_two_jobs.py::test_a_rank_that_is_slow_but_within_the_limit_ends_nothing",
            "train/test_probes_ranks.py::test_a_rank_that_shares_its_core_is_named",
        ),
    ),
    Row(
        20,
        "a hostile checkpoint",
        "pickles, links, paths and sizes that lead elsewhere",
        "refused with a reason; nothing is executed or read outside",
        (
            "ckpt/test_store.py::test_hostile_pickle_in_the_metadata_is_refused_*",
            "ckpt/test_safe_reader.py::test_no_function_is_called",
            "ckpt/test_hf_intake.py::test_what_does_not_fit_is_refused_by_name",
        ),
    ),
    Row(
        21,
        "two jobs, one run directory",
        "16 starters at once; a second job beside a living, dead, silent or requeued one; a lock "
        "that is lost while a checkpoint is written",
        "exactly one trains; the second refuses with exit status 2, naming the first; a dead job's "
        "lock is taken over; who has lost it publishes nothing more",
        (
            "faults/test_lock.py::test_*",
            "faults/test_two_jobs.py::test_the_second_job_refuses_and_changes_nothing",
            "faults/test_two_jobs.py::test_a_job_whose_directory_was_taken_over_*",
            "faults/test_two_jobs.py::test_a_checkpoint_is_not_published_*",
        ),
    ),
    Row(
        22,
        "clocks jump",
        "every look at the wall clock up to ten years off; a file server's, too",
        "equal results; locks and watchdogs go by time that passes",
        (
            "faults/test_clock.py::test_a_clock_that_jumps",
            "faults/test_lock.py::test_no_clock_of_a_host_is_asked_and_a_servers_may_jump",
        ),
    ),
    Row(
        23,
        "a journal or log that cannot be written",
        "/dev/full; a write that stops half way",
        "training goes on; lines wait in memory and are written later, none torn",
        (
            "faults/test_disk.py::test_lines_wait_for_a_sink_that_fails",
            "faults/test_disk.py::test_nothing_torn_is_left_by_a_write_that_stops_half_way",
            "faults/test_disk.py::test_a_sink_that_never_recovers_says_what_was_lost",
            "faults/test_disk.py::test_a_log_on_a_full_disk_ends_nothing",
        ),
    ),
    Row(
        24,
        "a fault that comes back in every attempt",
        "a worker that always dies; a mistake in the configuration",
        "given up after attempts that save nothing new; at once before the first step",
        (
            "launch/test_local.py::test_what_fails_every_time_is_given_up",
            "launch/test_slurm_faults.py::test_requeues_that_save_nothing_new_come_to_an_end",
            "launch/test_slurm_faults.py::test_what_fails_before_its_first_step_is_not_tried_again",
        ),
    ),
)


def names_in(path: str) -> list[str]:
    """Names of the tests in a file below tests/."""
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if name.startswith("test_")]


def expanded(test: str) -> list[str]:
    """The tests that an entry of a row stands for, as pytest names them."""
    path, _, pattern = test.partition("::")
    return [f"tests/{path}::{name}" for name in fnmatch.filter(names_in(path), pattern)]


def table() -> str:
    """The rows for people."""
    lines = ["| # | fault | how it is injected | promise | tests |", "| --- " * 5 + "|"]
    for row in MATRIX:
        tests = "<br>".join(f"`{test}`" for test in row.tests)
        cells = (str(row.number), row.fault, row.injection, row.promise, tests)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """A page with the table between its marks as it should be."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        found = {own: None for row in MATRIX for test in row.tests for own in expanded(test)}
        print("\n".join(found))
    else:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
