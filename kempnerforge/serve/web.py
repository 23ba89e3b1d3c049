"""HTTP around a ``Desk``: the page, the facts of the model, and answers as they are written.

``POST /api/answers`` takes a question (``request.py``) and gives one JSON object a line: ``{"waiting": n}``, ``{"started": true}``,
``{"text": piece}``, ``{"marks": ...}``, and in the end ``{"done": ...}`` or ``{"error": why}``.

The server is meant for the machine it runs on. It answers only under an address or a name that cannot be rebound to it by a stranger's
DNS, takes questions only from its own page or from programs, never from another site's, and opens no path that a client names.
"""

from __future__ import annotations

import io
import ipaddress
import json
import logging
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, cast

from kempnerforge.serve.desk import Busy, Desk, Event, Ticket
from kempnerforge.serve.document import document
from kempnerforge.serve.request import MAX_BODY, read_question
from kempnerforge.util.errors import InputError

log = logging.getLogger("kempnerforge")

MAX_CONNECTIONS, MAX_OF_CLIENT = 64, 24
"""At a time: in all, and of one address."""
REQUEST_S, SEND_S = 60.0, 30.0
"""That a request may take to come in, head and body together and however it is cut up, and that a client may take to read a piece."""
POLL_S = 0.25
"""How often it is looked whether a client that waits is still there."""
DRAINED = 2 * MAX_BODY
"""Bytes of a request that is too large that are read and thrown away, so that the client gets to read why."""


class Server(ThreadingHTTPServer):
    """The web server.

    Args:
        address: host and port to bind; port 0 takes a free one, see ``url``.
        desk: answers.
        facts: of the model, shown on the page.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], desk: Desk, facts: Mapping[str, object]) -> None:
        self.desk, self.facts, self.host = desk, facts, address[0]
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._clients, self._change = Counter[str](), threading.Lock()
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # that of HTTPServer looks its own name up, which may wait for a DNS server
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/"

    def knows(self, host: str) -> bool:
        """Whether ``host``, a Host header, is one that only somebody who means this machine sends: an address, "localhost", or the name that
        the server was bound to. Another name could be a stranger's that was made to point here.
        """
        name = host.strip().lower()
        name = name[1 : name.find("]")] if name.startswith("[") else name.rpartition(":")[0] or name
        if name.rstrip(".") in ("localhost", self.host.lower()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._change:
            room = self._clients.total() < MAX_CONNECTIONS and self._clients[client_address[0]] < MAX_OF_CLIENT
            self._clients[client_address[0]] += room
        if room:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._change:
                self._clients -= Counter({client_address[0]: 1})  # which drops those that are at 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("connection of %s broke off", client_address, exc_info=True)


def bind(host: str, port: int, desk: Desk, facts: Mapping[str, object]) -> Server:
    """A ``Server`` on ``host`` and ``port``; ``serve_forever`` starts it.

    Raises:
        ValueError: they cannot be had.
    """
    if not host:  # to the system that means all addresses
        raise InputError("--host '': name an address; 0.0.0.0 is all of this machine's")
    try:
        return Server((host, port), desk, facts)
    except (OSError, OverflowError, TypeError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "a port is a number from 0 to 65535, a host a name or an address"
        raise InputError(f"--host {host} --port {port}: cannot listen there: {why}") from None


class Reader(socket.SocketIO):
    """What comes in on ``connection``, until ``until`` on the monotonic clock."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, "r")
        self.connection, self.until = connection, 0.0

    def readinto(self, b: Any) -> int | None:
        """As of ``socket.SocketIO``; raises TimeoutError: it is over."""
        self.connection.settimeout(max(self.until - time.monotonic(), 1e-3))
        try:
            return super().readinto(b)
        finally:
            self.connection.settimeout(SEND_S)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "kempnerforge", ""
    timeout = SEND_S

    def setup(self) -> None:
        super().setup()
        self._reader = Reader(self.connection)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        self._reader.until = time.monotonic() + REQUEST_S
        super().handle_one_request()

    @property
    def web(self) -> Server:
        return cast(Server, self.server)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not self._own_host():
            return
        if path == "/":
            page, policy = document()
            self._send(HTTPStatus.OK, page, "text/html; charset=utf-8", {"Content-Security-Policy": policy, "X-Frame-Options": "DENY"})
        elif path == "/api/model":
            self._send(HTTPStatus.OK, json.dumps(self.web.facts).encode())
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is nothing at {path[:100]}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.close_connection = True  # the answer ends with the connection; and what was refused has not been read
        if not self._own_host() or not self._own_page():
            return
        if self.path != "/api/answers":
            self._refuse(HTTPStatus.NOT_FOUND, "questions go to /api/answers")
            return
        if self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a question is application/json")
            return
        body = self._body()
        if body is None:
            return
        try:
            ticket = self.web.desk.ask(read_question(body))
        except InputError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Busy as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        else:
            self._relay(ticket)

    # ---- who may ask -----------------------------------------------------------------------------------------------

    def _own_host(self) -> bool:
        host = self.headers.get("Host", "")
        if not self.web.knows(host):
            self.close_connection = True
            self._refuse(HTTPStatus.FORBIDDEN, f"unknown host {host[:100]!r}: open {self.web.url}, or give that name as --host")
            return False
        return True

    def _own_page(self) -> bool:
        """Browsers say which site's script asks; programs say nothing."""
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers.get('Host', '')}":
            self._refuse(HTTPStatus.FORBIDDEN, "asked by the page of another site")
            return False
        return True

    def _body(self) -> bytes | None:
        """What was sent; None: it was refused."""
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if length < 0 or "Transfer-Encoding" in self.headers:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "a question needs a Content-Length")
            return None
        if length > MAX_BODY:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes: a question has at most {MAX_BODY}, images and all")
            self._drain(min(length, DRAINED))
            return None
        body = self.rfile.read(length)
        return body if len(body) == length else None

    def _drain(self, length: int) -> None:
        while length > 0 and (piece := self.rfile.read(min(length, 2**16))):
            length -= len(piece)

    # ---- what is sent ----------------------------------------------------------------------------------------------

    def _relay(self, ticket: Ticket) -> None:
        """Sends what happens to ``ticket`` as it happens, and gives it up when the client goes."""
        try:
            self._head(HTTPStatus.OK, "application/x-ndjson", {"Connection": "close", "X-Accel-Buffering": "no"})
            told = self.web.desk.ahead(ticket)
            self._line({"waiting": told})
            while True:
                event = ticket.next(POLL_S)
                if event is not None:
                    self._line(_message(event))
                    if event.last:
                        return
                elif self._gone():
                    return
                elif (ahead := self.web.desk.ahead(ticket)) < told:
                    told = ahead
                    self._line({"waiting": told})
        except OSError:  # the client went away while it was written to
            log.debug("a client went away")
        finally:
            ticket.cancel()

    def _gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _line(self, message: dict[str, object]) -> None:
        self.wfile.write(json.dumps(message).encode() + b"\n")

    def _head(self, status: HTTPStatus, content_type: str, more: Mapping[str, str]) -> None:
        self.send_response(status)
        fixed = {
            "Content-Type": content_type,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in (fixed | dict(more)).items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: HTTPStatus, body: bytes, content_type: str = "application/json", more: Mapping[str, str] | None = None) -> None:
        closing = {"Connection": "close"} if self.close_connection else {}
        self._head(status, content_type, {"Content-Length": str(len(body)), **closing, **(more or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(status, json.dumps({"error": why}).encode())


def _message(event: Event) -> dict[str, object]:
    if event.kind == "started":
        return {"started": True}
    if event.kind == "marks":
        return {"marks": event.marks.to_json()}
    if event.kind == "done":
        return {
            "done": {"answer": event.text, "marks": event.marks.to_json(), "tokens": event.tokens, "seconds": round(event.seconds, 3)},
        }
    return {event.kind: event.text}
