"""Renders chat templates of others in a separate process, with limits on time, memory and output: see
``render_process``.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from kempnerforge.data.text.render_process import SECONDS
from kempnerforge.util.errors import InputError, cut

LONGEST = 1 << 20
"""Characters of a template."""
PROGRAM = Path(__file__).with_name("render_process.py")


class TemplateError(InputError):
    """A template fails."""


class TemplateLimitError(InputError):
    """A template takes more than it may."""


class _Process:
    """The process that renders for this one. It ends with this one, as its stdin does, and is out of reach of
    signals to the group.
    """

    def __init__(self) -> None:
        self.of = os.getpid()
        self._started = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, text=True,
        )  # fmt: skip
        atexit.register(self.end)
        with suppress(OSError):
            self._write([*sys.path])

    def ask(self, question: dict[str, Any]) -> dict[str, str]:
        """Its answer; nothing if it has ended."""
        try:
            self._write(question)
            assert self._started.stdout is not None
            return json.loads(self._started.stdout.readline() or "{}")
        except OSError:  # a broken pipe
            return {}

    def _write(self, value: Any) -> None:
        assert self._started.stdin is not None
        self._started.stdin.write(json.dumps(value) + "\n")
        self._started.stdin.flush()

    def end(self) -> None:
        if self.of == os.getpid():
            self._started.kill()
            self._started.communicate()


_process: _Process | None = None
_lock = threading.Lock()


def _forget() -> None:
    """In a fork: the process is the parent's, and so may be who holds the lock."""
    global _process, _lock
    _process, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def render(source: str, messages: list[dict[str, Any]], generate: bool, **given: Any) -> str:
    """What the template ``source`` makes of a conversation.

    Args:
        messages: plain JSON.
        generate: it ends with what asks for an answer.
        given: further names that a template may use; ``bos_token``, say.

    Raises:
        TemplateError: it fails.
        TemplateLimitError: it takes too much time or memory, or writes too much.
    """
    global _process
    if len(source) > LONGEST:
        raise TemplateLimitError(f"has {len(source):,} characters; at most {LONGEST:,} are read")
    names = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generate, **given}
    with _lock:
        if _process is None:
            _process = _Process()
        found = _process.ask({"source": source, "given": names})
        if not found:
            _process.end()
            atexit.unregister(_process.end)
            _process = None
    if not found:
        raise TemplateLimitError(f"takes more than {SECONDS:g} s of computing")
    if "limit" in found:
        raise TemplateLimitError(found["limit"])
    if "error" in found:
        raise TemplateError(cut(found["error"], 300))
    return found["text"]
