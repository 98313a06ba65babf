"""Messages against a real web service: what arrives, what is tried again, what is never shown."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.monitor.exporter_support import Service, serving
from trinity.core.errors import ConfigError
from trinity.monitor import webhook
from trinity.monitor.webhook import Outbox, check_url, identify, message, post

ALARM = {
    "kind": "event",
    "step": 7,
    "time": 1.5,
    "event": "alarm",
    "name": "loss",
    "severity": "page",
    "value": math.nan,
    "text": "Training loss: nan & <!channel>",
    "first": "look at the rows",
}


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as running:
        yield running


class Harness:
    """An outbox whose log is kept and whose waits can be skipped."""

    def __init__(self, url: str, pending: list[dict[str, Any]] | None = None) -> None:
        self.log: list[str] = []
        self.skipped_s = 0.0
        self.outbox = Outbox(
            url, self.log.append, pending, clock=lambda: time.monotonic() + self.skipped_s
        )

    def add(self, *steps: int, **values: Any) -> None:
        for step in steps:
            self.outbox.add("base", {**ALARM, "step": step, **values}, now=0.0)

    def deliver(self, now: float = 0.0, budget_s: float = 5.0) -> bool:
        return self.outbox.deliver(now, budget_s)

    def steps(self) -> list[int]:
        return [entry["message"]["trinity"]["step"] for entry in self.outbox.pending]


def test_message_reads_well_for_people_and_for_programs(service: Service) -> None:
    harness = Harness(service.url)
    harness.add(7)
    assert harness.deliver()
    (body,) = service.bodies  # parsed strictly: a NaN would have been refused
    assert body["text"] == (
        "[page] base, step 7, alarm: Training loss: nan &amp; &lt;!channel&gt;\n"
        "First: look at the rows"
    )
    assert body["trinity"] == {
        "id": identify("base", ALARM),
        "run": "base",
        "event": "alarm",
        "name": "loss",
        "severity": "page",
        "value": "nan",
        "step": 7,
        "time": 1.5,
        "text": "Training loss: nan & <!channel>",
        "first": "look at the rows",
    }
    assert harness.outbox.pending == []
    assert harness.outbox.num_sent == 1


@pytest.mark.parametrize(
    ("event", "severity"), [("gave_up", "page"), ("rewind", "warn"), ("finished", "info")]
)
def test_other_events_have_the_severity_of_their_kind(event: str, severity: str) -> None:
    record = {"kind": "event", "step": 3, "event": event, "text": "so it is"}
    assert message("base", record)["text"] == f"[{severity}] base, step 3, {event}: so it is"


def test_different_events_have_different_names() -> None:
    names = {
        identify(run, {**ALARM, **change})
        for run in ("base", "other")
        for change in ({}, {"step": 8}, {"time": 2.5}, {"name": "z"}, {"event": "hang"})
    }
    assert len(names) == 10


@pytest.mark.parametrize("status", [301, 302, 307, 401, 403, 404, 408, 410, 429, 500, 503])
def test_answers_that_are_no_delivery_are_tried_again_in_order(
    service: Service, status: int
) -> None:
    service.headers["Location"] = service.url
    service.statuses = [status]
    harness = Harness(service.url)
    harness.add(1, 2)
    assert not harness.deliver()
    assert harness.steps() == [1, 2]
    assert not harness.deliver()
    assert service.methods == ["POST"]  # not at once again, and no redirect was followed
    harness.skipped_s += webhook.FIRST_RETRY_S
    assert harness.deliver()
    assert [body["trinity"]["step"] for body in service.bodies] == [1, 2]
    assert f"HTTP status {status}" in harness.log[0]
    assert "delivers again" in harness.log[1]


def test_waits_grow_up_to_a_bound(service: Service) -> None:
    service.statuses = [500] * 12
    harness = Harness(service.url)
    harness.add(1)
    waits = []
    for _ in range(12):
        harness.deliver()
        waits.append(float(harness.log[-1].rpartition(" in ")[2].removesuffix(" s")))
        harness.skipped_s += waits[-1] + 0.01
    assert waits[:4] == [2, 4, 8, 16]
    assert waits[-3:] == [webhook.LONGEST_RETRY_S] * 3
    assert len(service.methods) == 12


def test_service_says_how_long_to_wait(service: Service) -> None:
    service.statuses = [429]
    service.headers["Retry-After"] = "77"
    harness = Harness(service.url)
    harness.add(1)
    harness.deliver()
    assert "next try in 77 s" in harness.log[0]
    service.statuses = [503]
    service.headers["Retry-After"] = "Wed, 21 Oct 2026 07:28:00 GMT"
    harness.skipped_s += 78
    harness.deliver()
    assert "next try in 4 s" in harness.log[1]


@pytest.mark.parametrize("status", sorted(webhook.REFUSED))
def test_refused_message_does_not_block_the_others(service: Service, status: int) -> None:
    service.statuses = [status]
    harness = Harness(service.url)
    harness.add(1, 2)
    assert harness.deliver()
    assert [body["trinity"]["step"] for body in service.bodies] == [2]
    assert harness.log == [
        f"webhook http://127.0.0.1: dropped alarm of base, step 1: HTTP status {status}"
    ]
    assert harness.outbox.num_dropped == 1


def test_refused_connection_is_tried_again() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    harness = Harness(f"http://127.0.0.1:{port}/SECRET")
    harness.add(1)
    assert not harness.deliver()
    assert harness.steps() == [1]
    assert "ConnectionRefusedError" in harness.log[0]


def test_service_that_hangs_delays_nobody(service: Service) -> None:
    service.hang.set()
    harness = Harness(service.url)
    harness.add(1)
    for _ in range(3):
        assert not harness.deliver(budget_s=0.05)  # returns, with the POST under way
    service.hang.clear()
    assert harness.deliver()
    assert service.methods == ["POST"]
    assert harness.steps() == []


def test_service_that_never_answers_is_given_up(service: Service) -> None:
    service.hang.set()
    harness = Harness(service.url)
    harness.add(1)
    assert not harness.deliver(budget_s=0.05)
    harness.skipped_s += webhook.LONGEST_POST_S
    assert not harness.deliver(budget_s=0.05)
    assert "no answer within 60 s" in harness.log[0]
    assert harness.steps() == [1]


def test_wait_for_an_answer_is_bounded(service: Service) -> None:
    service.hang.set()
    answer = post(service.url, b"{}", timeout_s=0.1)
    assert answer.status is None
    assert "timeout" in answer.reason.lower()


def test_old_message_is_dropped_and_said_so(service: Service) -> None:
    service.statuses = [500]
    harness = Harness(service.url)
    harness.add(1, 2)
    assert harness.deliver(now=webhook.MAX_AGE_S + 1)
    assert [body["trinity"]["step"] for body in service.bodies] == [2]
    assert "dropped alarm of base, step 1: HTTP status 500, for 24 hours" in harness.log[0]


def test_full_outbox_drops_the_oldest_warning_not_a_page(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "MAX_PENDING", 3)
    harness = Harness(service.url)
    harness.add(1, 2)
    harness.add(3, severity="warn")
    harness.add(4)
    assert harness.steps() == [1, 2, 4]
    harness.add(5)
    assert harness.steps() == [1, 4, 5]  # the first may be under way
    assert harness.outbox.num_dropped == 2


def test_what_another_process_left_is_sent(service: Service) -> None:
    first = Harness("http://127.0.0.1:9/SECRET")
    first.add(1, 2)
    second = Harness(service.url, json.loads(json.dumps(first.outbox.pending)))
    second.deliver()
    assert [body["trinity"]["step"] for body in service.bodies] == [1, 2]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "SECRET",
        "ftp://host/SECRET",
        "file:///SECRET",
        "https:///SECRET",
        "https://host:port/SECRET",
        "https://[host/SECRET",
        "https://host/SEC\nRET",
        "https://host/SECRET and more",
        "https://user:SECRET@host/",
    ],
)
def test_wrong_address_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match="--webhook") as raised:
        check_url(url)
    assert "SEC" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_secret_is_never_logged(service: Service) -> None:
    for url in (service.url, "http://127.0.0.1:9/SECRET"):
        service.statuses = [500]
        harness = Harness(url)
        harness.add(1)
        harness.deliver()
        assert len(harness.log) == 1
        assert "SECRET" not in harness.log[0]
        assert "SECRET" not in json.dumps(harness.outbox.pending)
    # The library quotes this one in its exception.
    assert post("http://127.0.0.1:9/SECRET and more", b"{}") == (None, "InvalidURL", 0.0)
