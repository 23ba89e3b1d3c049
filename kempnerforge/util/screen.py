"""Tables and progress bars on a terminal, by rich, which would take ``[...]`` in a name for its own marks."""

from __future__ import annotations

from typing import Any, NoReturn, TextIO

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from kempnerforge.util.errors import visible
from kempnerforge.util.process import exact


class Screen(Console):
    """A console on ``stream`` in whose text no mark, emoji code or control character has a meaning."""

    def __init__(self, stream: TextIO, **options: Any) -> None:
        super().__init__(file=exact(stream), markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, keep="\n"), **options)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # as from ``print``, where rich would end the process with 1


class TaskText(ProgressColumn):
    """Text of a task, such as "{task.description}"."""

    def __init__(self, form: str, style: str = "") -> None:
        super().__init__()
        self.form, self.style = form, style

    def render(self, task: Task) -> Text:
        return Text(visible(self.form.format(task=task)), self.style)


def bars(screen: Screen, *columns: ProgressColumn, **options: Any) -> Progress:
    """Progress bars. What others write meanwhile goes past rich, which would obey its escapes."""
    return Progress(*columns, console=screen, redirect_stdout=False, redirect_stderr=False, **options)
