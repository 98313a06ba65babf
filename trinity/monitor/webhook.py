"""Tells a web service what somebody should know now: alarms, rewinds, silence, the end.

Every message is one POST of JSON. ``text`` is what Slack, Mattermost and Rocket.Chat show; the
object ``trinity`` beside it holds the same for programs. A message is delivered at least once: it
leaves the outbox, which the caller keeps on disk, when the service has answered 2xx. ``id`` tells a
repetition apart.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from typing import Any, NamedTuple

from trinity.core.errors import ConfigError

SEVERITY_OF_EVENT = {
    "alarm": "warn",  # unless the alarm says otherwise
    "rewind": "warn",
    "checkpoint_rejected": "warn",
    "checkpoint_failed": "warn",
    "replay_mismatch": "page",
    "replica_mismatch": "page",
    "gave_up": "page",
    "hang": "page",
    "silence_over": "info",
    "finished": "info",
}
"""The events that are sent, and how bad they are."""

TIMEOUT_S = 10.0
"""Of each wait for the network."""
LONGEST_POST_S = 60.0
"""A service that dribbles its answer is given up after this long, whatever the waits were."""
FIRST_RETRY_S = 2.0
LONGEST_RETRY_S = 300.0
MAX_AGE_S = 86400.0
"""A message that could not be delivered for this long is dropped."""
MAX_PENDING = 1000
MAX_TEXT = 3000
REFUSED = frozenset({400, 413, 422})
"""Answers to the message itself; sending it again would bring the same one."""


def identify(run: str, record: Mapping[str, Any]) -> str:
    """A short name of one event of one run, the same whenever and wherever it is read."""
    parts = [run, *(record.get(key) for key in ("event", "name", "step", "time"))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def message(run: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON that is posted for a line of kind "event"."""
    event = str(record.get("event"))
    severity = SEVERITY_OF_EVENT.get(event, "warn")
    if record.get("severity") in ("page", "warn"):
        severity = record["severity"]
    first = record.get("first")
    text = f"[{severity}] {run}, step {record['step']}, {event}: {record.get('text', '')}"
    if first:
        text += f"\nFirst: {first}"
    details = {key: _strict(value) for key, value in record.items() if key not in ("kind", "text")}
    return {
        "text": _escape(text[:MAX_TEXT]),
        "trinity": {
            **details,
            "id": identify(run, record),
            "run": run,
            "severity": severity,
            "text": str(record.get("text", "")),
        },
    }


def _escape(text: str) -> str:
    """Slack takes these for its own mark-up, ``<!channel>`` for instance."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; many services refuse what Python writes for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    return value


class Answer(NamedTuple):
    """What came of one POST."""

    status: int | None
    """None: there was no answer."""
    reason: str
    """For the log; never holds the address."""
    retry_after_s: float = 0.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST arrives as a GET without the message; that is no delivery."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def post(url: str, body: bytes, timeout_s: float = TIMEOUT_S) -> Answer:
    """Send ``body``; network trouble and refusals are answers too, nothing is raised.

    Proxies are those of the environment (``https_proxy``). The exceptions' own texts may quote the
    address, a secret, so only their kinds are reported.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "trinity-watch"}
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        with opener.open(request, timeout=timeout_s) as response:
            return Answer(response.status, "")
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, f"HTTP status {error.code}", _retry_after_s(error.headers))
    except urllib.error.URLError as error:
        cause = error.reason if isinstance(error.reason, Exception) else error
        return Answer(None, type(cause).__name__)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(None, type(error).__name__)


def _retry_after_s(headers: Message) -> float:
    try:
        return min(max(float(headers.get("Retry-After", "0")), 0.0), LONGEST_RETRY_S)
    except ValueError:  # a date
        return 0.0


def check_url(url: str) -> str:
    """The service's scheme and host, which may be shown. Raises ConfigError; never shows more."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = None, None
    if (
        parts is None
        or parts.scheme not in ("http", "https")
        or not host
        or parts.username is not None
        or not url.isprintable()
        or " " in url
    ):
        raise ConfigError(
            "--webhook is no web address (not shown, as it may be secret); give one that begins "
            "with https:// or http://, names a host, and has no user name, space or line break"
        )
    return f"{parts.scheme}://{host}"


class Outbox:
    """Messages that wait for delivery, in order; with it, when to try again.

    Not thread-safe. :meth:`deliver` returns within its budget: the POST itself runs in a thread of
    its own, one at a time, so that a service that hangs delays nobody else.
    """

    def __init__(
        self,
        url: str,
        say: Callable[[str], None],
        pending: list[dict[str, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``pending`` are entries of :attr:`pending` that another process left behind; ``clock``
        measures waits, in seconds."""
        self._clock = clock
        self._url = url
        self._where = check_url(url)
        self._say = say
        self.pending: list[dict[str, Any]] = list(pending or [])
        """Each has ``message`` and ``queued_at`` (unix seconds); plain values, to be kept on
        disk."""
        self.num_sent = self.num_failed = self.num_dropped = 0
        self._num_failures = 0
        self._retry_at = 0.0
        self._answers: queue.Queue[Answer] = queue.Queue()
        self._posted_at: float | None = None

    def add(self, run: str, record: Mapping[str, Any], now: float) -> None:
        """Queue an event of a run; ``now`` in unix seconds."""
        self.pending.append({"message": message(run, record), "queued_at": now})
        while len(self.pending) > MAX_PENDING:
            # Never the one in flight; a page goes last.
            mild = [
                at
                for at, entry in enumerate(self.pending[1:], start=1)
                if entry["message"]["trinity"]["severity"] != "page"
            ]
            self._drop(mild[0] if mild else 1, f"more than {MAX_PENDING} messages wait")

    def deliver(self, now: float, budget_s: float) -> bool:
        """Send what is due, for ``budget_s`` at most; True when ``pending`` has changed.

        ``now`` in unix seconds.
        """
        end = self._clock() + budget_s
        changed = False
        while self.pending:
            if self._posted_at is None:
                if self._clock() < self._retry_at or self._clock() >= end:
                    break
                self._posted_at = self._clock()
                self._post()
            try:
                answer = self._answers.get(timeout=max(end - self._clock(), 0.001))
            except queue.Empty:
                if self._clock() - self._posted_at < LONGEST_POST_S:
                    break
                self._answers = queue.Queue()  # what that thread still brings is not heard
                answer = Answer(None, f"no answer within {LONGEST_POST_S:g} s")
            self._posted_at = None
            changed |= self._settle(answer, now)
        return changed

    def _post(self) -> None:
        body = json.dumps(self.pending[0]["message"], allow_nan=False).encode()
        answers, url = self._answers, self._url
        # A daemon: the watcher's end does not wait for a service that hangs.
        threading.Thread(target=lambda: answers.put(post(url, body)), daemon=True).start()

    def _settle(self, answer: Answer, now: float) -> bool:
        """Take the answer for the first message; True when that leaves the outbox."""
        if answer.status is not None and 200 <= answer.status < 300:
            if self._num_failures:
                self._say(f"webhook {self._where}: delivers again")
            self._num_failures, self._retry_at = 0, 0.0
            self.num_sent += 1
            del self.pending[0]
            return True
        self.num_failed += 1
        if answer.status in REFUSED:
            self._drop(0, answer.reason)
            return True
        if now - self.pending[0]["queued_at"] > MAX_AGE_S:
            self._drop(0, f"{answer.reason}, for {MAX_AGE_S / 3600:g} hours")
            return True
        wait_s = min(FIRST_RETRY_S * 2**self._num_failures, LONGEST_RETRY_S)
        wait_s = max(wait_s, answer.retry_after_s)
        self._retry_at = self._clock() + wait_s
        self._num_failures = min(self._num_failures + 1, 20)
        self._say(
            f"webhook {self._where}: {answer.reason}; {len(self.pending)} messages wait, next try "
            f"in {wait_s:.0f} s"
        )
        return False

    def _drop(self, at: int, why: str) -> None:
        self.num_dropped += 1
        lost = self.pending.pop(at)["message"]["trinity"]
        self._say(
            f"webhook {self._where}: dropped {lost['event']} of {lost['run']}, step "
            f"{lost['step']}: {why}"
        )
