"""The server of the page: one process, one thread that reads, one that answers."""

from __future__ import annotations

import ipaddress
import logging
import signal
from typing import Any

from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.server.server import BaseServer
from bokeh.server.tornado import BokehTornado
from bokeh.server.util import bind_sockets
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop

from trinity.core.errors import ConfigError
from trinity.monitor.library import Library
from trinity.monitor.live import Session


def make_server(
    library: Library, host: str, port: int, wanted: list[str]
) -> tuple[BaseServer, int]:
    """A server that is bound, and answers once its loop runs; and its port.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def open_page(document: Document) -> None:
        request = getattr(document.session_context, "request", None)
        asked = request.arguments.get("runs", []) if request else []
        names = ",".join(value.decode(errors="replace") for value in asked).split(",")
        session = Session(library, document, [n for n in names if n] or wanted)
        document.title = f"trinity: {library.directory.name or library.directory}"
        document.add_root(session.root)

    # A tunnel may give the page another port on the reader's side. Other names than these are
    # refused, so that a foreign web page in the same browser cannot read this one.
    origins = ["localhost:*", "127.0.0.1:*"] if is_loopback(host) else ["*"]
    # These parts and not bokeh.server.server.Server, which knows no origin with any port.
    pages = BokehTornado(
        {"/": Application(FunctionHandler(open_page))},
        extra_websocket_origins=origins,
        use_index=False,
        check_unused_sessions_milliseconds=5000,
        unused_session_lifetime_milliseconds=10_000,
    )
    try:
        sockets, _ = bind_sockets(host, port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error}; choose another --port or --host"
        ) from None
    http = HTTPServer(pages)
    http.add_sockets(sockets)
    return BaseServer(IOLoop.current(), pages, http), sockets[0].getsockname()[1]


def serve(library: Library, host: str, port: int, wanted: list[str]) -> None:
    """Answer until interrupted or terminated."""
    logging.getLogger("bokeh").setLevel(logging.ERROR)
    logging.getLogger("tornado.access").setLevel(logging.ERROR)
    server, port = make_server(library, host, port, wanted)
    print(f"{library.directory}: http://{host}:{port}/  (stop with Ctrl-C)", flush=True)
    if not is_loopback(host):
        print(f"everybody who reaches {host}:{port} can read it", flush=True)

    def stop(*_: Any) -> None:
        server.io_loop.add_callback_from_signal(server.io_loop.stop)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with library:
        server.start()
        server.io_loop.start()
        server.stop()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
