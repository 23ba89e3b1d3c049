"""One model for many clients: questions wait in a queue and are answered one at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Protocol

from kempnerforge.data.sample import ImageSource
from kempnerforge.eval.codecs import Marks, decode
from kempnerforge.eval.generate import Sampling
from kempnerforge.serve.request import Question
from kempnerforge.util.errors import InputError

log = logging.getLogger("kempnerforge")

MAX_WAITING = 16


class Answer(Protocol):
    """An answer that is written while one iterates over its pieces."""

    num_tokens: int

    def __iter__(self) -> Iterator[str]: ...

    @property
    def text(self) -> str: ...


class Model(Protocol):
    """What is asked."""

    def ask(
        self,
        prompt: str,
        images: Sequence[ImageSource],
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> Answer: ...


@dataclass(frozen=True)
class Event:
    """What happened to a question.

    Attributes:
        kind: "started", "text" (a new piece of the answer), "marks" (all marks so far), "done" or "error";
            the last two end it.
        text: the piece, the whole answer, or what went wrong.
        tokens: that were made for it.
        seconds: that it took.
    """

    kind: str
    text: str = ""
    marks: Marks = field(default_factory=Marks)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def last(self) -> bool:
        return self.kind in ("done", "error")


class Busy(Exception):
    """Too many questions wait already."""


class Ticket:
    """A question in line."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._left = threading.Event()

    def cancel(self) -> None:
        """Ends it: at once if it waits, else at its next token."""
        self._left.set()

    @property
    def cancelled(self) -> bool:
        return self._left.is_set()

    def put(self, event: Event) -> None:
        self._events.put(event)

    def next(self, timeout_s: float) -> Event | None:
        """The next event; None if there is none for so long."""
        try:
            return self._events.get(timeout=timeout_s)
        except Empty:
            return None


class Desk:
    """Answers questions in the order they came in, all in one thread: the math library starts a thread pool
    for each thread that computes, and a new thread for each question would cost more than a short answer.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._waiting: deque[Ticket] = deque()
        self._change = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    def ask(self, question: Question) -> Ticket:
        """Puts ``question`` in line.

        Raises:
            Busy: ``MAX_WAITING`` are there.
        """
        ticket = Ticket(question)
        with self._change:
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
            if len(self._waiting) >= MAX_WAITING:
                raise Busy(f"{MAX_WAITING} questions wait already; ask again later")
            self._waiting.append(ticket)
            self._change.notify()
        return ticket

    def ahead(self, ticket: Ticket) -> int:
        """Questions that wait before ``ticket``, the one that is being answered not counted."""
        with self._change:
            line = [waiting for waiting in self._waiting if waiting is ticket or not waiting.cancelled]
            return line.index(ticket) if ticket in line else 0

    def close(self) -> None:
        """Answers nothing more; waits for the answer that is being given."""
        with self._change:
            self._open = False
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or not self._open)
                if not self._open:
                    return
                ticket = self._waiting.popleft()
            if not ticket.cancelled:
                self._answer(ticket)

    def _answer(self, ticket: Ticket) -> None:
        ticket.put(Event("started"))
        try:
            ticket.put(self._write(ticket))
        except InputError as error:
            ticket.put(Event("error", str(error)))
        except Exception as error:
            log.exception("a question could not be answered")
            ticket.put(Event("error", f"the model failed: {type(error).__name__}: {error}"))

    def _write(self, ticket: Ticket) -> Event:
        begun = time.perf_counter()
        asked, marks = ticket.question, Marks()
        answer = self._model.ask(asked.prompt, asked.images, asked.max_new_tokens, asked.sampling, asked.history)
        written = ""
        for piece in answer:
            if ticket.cancelled or not self._open:
                return Event("error", "stopped")
            if piece:
                ticket.put(Event("text", piece))
                written += piece
                if (found := decode(written)) != marks:
                    marks = found
                    ticket.put(Event("marks", marks=marks))
        return Event("done", answer.text, decode(answer.text), answer.num_tokens, time.perf_counter() - begun)
