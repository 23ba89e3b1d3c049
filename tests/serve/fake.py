"""A server whose model says what it is told to."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kempnerforge.eval.draw import COLOURS
from kempnerforge.eval.generate import Sampling
from kempnerforge.serve.desk import Desk
from kempnerforge.serve.web import Server, bind

FACTS = {
    "name": "fake",
    "about": {"architecture": "none"},
    "has_images": True,
    "has_turns": True,
    "max_images": 16,
    "colours": list(COLOURS),
}


class Said:
    """An answer of given pieces; ``pause(k)`` is called before the k-th."""

    def __init__(self, pieces: Sequence[str], pause: Callable[[int], object] = lambda k: None) -> None:
        self.pieces, self.pause = pieces, pause
        self.num_tokens = 0

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            self.pause(self.num_tokens)
            self.num_tokens += 1
            yield piece

    @property
    def text(self) -> str:
        return "".join(self.pieces[: self.num_tokens])


class Fake:
    """Answers by a rule.

    Attributes:
        asked: all questions, as they came.
        answers: what was answered to each, to see how far it got.
    """

    def __init__(self, answer: Callable[[str], Said]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, tuple[Any, ...], int | None, Sampling | None, tuple[Any, ...]]] = []
        self.answers: list[Said] = []

    def ask(
        self,
        prompt: str,
        images: Sequence[Any],
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> Said:
        self.asked.append((prompt, tuple(images), max_new_tokens, sampling, tuple(history)))
        self.answers.append(self.answer(prompt))
        return self.answers[-1]


@contextlib.contextmanager
def serving(model: Any, facts: dict[str, Any] | None = None, host: str = "127.0.0.1") -> Iterator[Server]:
    """A server on a free port, and its end."""
    desk = Desk(model)
    server = bind(host, 0, desk, facts or FACTS)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        desk.close()


def connection(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)


def post(server: Server, body: object, **headers: str) -> tuple[int, list[dict[str, Any]]]:
    """Status and the JSON lines of the answer to a question."""
    line = connection(server)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    line.request("POST", "/api/answers", data, {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}})
    response = line.getresponse()
    lines = [json.loads(text) for text in response.read().splitlines()]
    line.close()
    return response.status, lines
