"""HTTP around a ``Desk``: the page, the facts of the model, and answers as they are written.

``POST /api/answers`` takes a question (``request.py``) and gives one JSON object a line: ``{"waiting": n}``,
``{"started": true}``, ``{"text": piece}``, ``{"marks": ...}``, and in the end ``{"done": ...}`` or
``{"error": why}``.

The server is meant for the machine it runs on. It answers only under an address, or under a name that no
other DNS can point to it (DNS rebinding). It takes questions from its own page and from programs, never from
pages of other sites, and opens no path that a client names.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from kempnerforge.serve.desk import Busy, Desk, Event, Ticket
from kempnerforge.serve.document import document
from kempnerforge.serve.request import MAX_BODY, read_question
from kempnerforge.util.errors import InputError

log = logging.getLogger("kempnerforge")

MAX_CONNECTIONS, MAX_OF_CLIENT = 64, 24
"""At a time: in all, and of one address."""
REQUEST_S, SEND_S = 60.0, 30.0
"""Seconds for a request to come in, head and body, however it is cut; and for a client to read a piece."""
POLL_S = 0.25
"""Seconds between two looks at the queue."""
DRAINED = 2 * MAX_BODY
"""Bytes of a request over ``MAX_BODY`` that are read and dropped: clients read the refusal after that."""
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Connection(H11Protocol):
    """A connection within the limits above, for which uvicorn has no settings."""

    _incoming: asyncio.TimerHandle | None = None
    _outgoing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        addresses = [other.client and other.client[0] for other in self.connections if isinstance(other, Connection)]
        if len(addresses) > MAX_CONNECTIONS or addresses.count(self.client and self.client[0]) > MAX_OF_CLIENT:
            transport.close()
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._stop_if_whole()

    def on_response_complete(self) -> None:
        self._expect()
        super().on_response_complete()  # which may go on with a request that has come in already
        self._stop_if_whole()

    def _expect(self) -> None:
        """Starts the time of the next request."""
        self._stop(self._incoming)
        self._incoming = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _stop_if_whole(self) -> None:
        if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
            self._stop(self._incoming)

    def _stop(self, timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._outgoing = self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self._outgoing)

    def shutdown(self) -> None:
        """At the end of the server; as for a client that went, which ends its answer."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._incoming)
        self._stop(self._outgoing)
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """The web server; ``run`` starts it.

    Args:
        listening: a socket that listens.
        host: that it was bound to.
        desk: answers.
        facts: of the model, shown on the page.
    """

    def __init__(self, listening: socket.socket, host: str, desk: Desk, facts: Mapping[str, object]) -> None:
        self.desk, self.facts, self.host, self._listening = desk, facts, host, listening
        self.server_port = listening.getsockname()[1]
        config = uvicorn.Config(
            self._answer, http=Connection, ws="none", loop="asyncio", lifespan="off", interface="asgi3", log_config=None, log_level="error",
            access_log=False, proxy_headers=False, headers=[("Server", "kempnerforge")], timeout_keep_alive=int(REQUEST_S),
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        super().__init__(config)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets or [self._listening])

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/"

    def knows(self, host: str) -> bool:
        """Whether ``host``, a Host header, is an address, "localhost", or the name that the server was bound
        to. Any other name could be made by a foreign DNS to point here.
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

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._respond(request)
        except ClientDisconnect:
            return
        response.headers.update(HEADERS)
        if request.method == "POST" or response.status_code == HTTPStatus.FORBIDDEN:
            response.headers["Connection"] = "close"  # the body of a refused request is not read
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        host, origin, path = request.headers.get("host", ""), request.headers.get("origin"), request.scope["path"]
        if not self.knows(host):
            return _refuse(HTTPStatus.FORBIDDEN, f"unknown host {host[:100]!r}: open {self.url}, or give that name as --host")
        if request.method == "POST":
            if origin not in (None, f"http://{host}"):  # browsers send it, programs do not
                return _refuse(HTTPStatus.FORBIDDEN, "asked by the page of another site")
            if path == "/api/answers":
                return await self._take(request)
            return _refuse(HTTPStatus.NOT_FOUND, "questions go to /api/answers")
        if request.method not in ("GET", "HEAD"):
            return _refuse(HTTPStatus.NOT_IMPLEMENTED, f"there is no {request.method[:100]} here")
        if path == "/":
            page, policy = document()
            return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy, "X-Frame-Options": "DENY"})
        if path == "/api/model":
            return _json(self.facts)
        return _refuse(HTTPStatus.NOT_FOUND, f"there is nothing at {path[:100]}")

    async def _take(self, request: Request) -> Response:
        """Takes a question, and streams what happens to it."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a question is application/json")
        length = request.headers.get("content-length")
        if length is None or "transfer-encoding" in request.headers:
            return _refuse(HTTPStatus.LENGTH_REQUIRED, "a question needs a Content-Length")
        if int(length) > MAX_BODY:
            drained = 0
            async for piece in request.stream():
                if (drained := drained + len(piece)) >= DRAINED:
                    break
            return _refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes: a question has at most {MAX_BODY}, images and all")
        body = await request.body()
        try:
            ticket = self.desk.ask(await run_in_threadpool(read_question, body))
        except InputError as error:
            return _refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Busy as error:
            return _refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        return StreamingResponse(self._relay(ticket), media_type="application/x-ndjson", headers={"X-Accel-Buffering": "no"})

    async def _relay(self, ticket: Ticket) -> AsyncIterator[bytes]:
        """What happens to ``ticket``, as it happens; the end of the iteration (a client goes) cancels it."""
        try:
            last_ahead = self.desk.ahead(ticket)
            yield _line({"waiting": last_ahead})
            while True:
                event = await run_in_threadpool(ticket.next, POLL_S)
                if event is not None:
                    yield _line(_message(event))
                    if event.last:
                        return
                elif (ahead := self.desk.ahead(ticket)) < last_ahead:
                    last_ahead = ahead
                    yield _line({"waiting": last_ahead})
        finally:
            ticket.cancel()


def bind(host: str, port: int, desk: Desk, facts: Mapping[str, object]) -> Server:
    """A ``Server`` on ``host`` and ``port``; port 0 takes a free one, see ``Server.url``.

    Raises:
        ValueError: they cannot be had.
    """
    if not host:  # to the system that means all addresses
        raise InputError("--host '': name an address; 0.0.0.0 is all of this machine's")
    try:
        family, both = (socket.AF_INET6, socket.has_dualstack_ipv6()) if ":" in host else (socket.AF_INET, False)
        listening = socket.create_server((host, port), family=family, backlog=64, dualstack_ipv6=both)
        return Server(listening, host, desk, facts)
    except (OSError, OverflowError, TypeError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "a port is a number from 0 to 65535, a host a name or an address"
        raise InputError(f"--host {host} --port {port}: cannot listen there: {why}") from None


def _line(message: dict[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(json.dumps(value).encode(), status, media_type="application/json")


def _refuse(status: HTTPStatus, why: str) -> Response:
    return _json({"error": why}, status)


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
