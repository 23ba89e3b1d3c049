"""Renders chat templates of others in a separate process, which ``rendering`` starts. It imports neither
torch nor transformers, so it starts fast.

Each line of stdin is a question, each line of stdout its answer, in JSON. The first line is ``sys.path``. The
kernel ends the process when one rendering takes too much processor time, so nothing that a template does can
hold it up.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

SECONDS, MEMORY, CHARACTERS = 2.0, 1 << 30, 1 << 24
"""Of processor time for one rendering, bytes of memory of the process, characters that a template may write.
"""


def environment() -> Any:
    """The Jinja environment of ``transformers.utils.chat_template_utils``, which chat templates are written
    for.
    """
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks answers, and writes what is in it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a name that begins with an underscore on a namespace: {name!r}")

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Dict:
        """``dict`` without what leads out of the sandbox."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return made


def answer(made: Any, cache: dict[str, Any], question: dict[str, Any]) -> dict[str, str]:
    """``{"text"}``, or ``{"error"}``, or ``{"limit"}`` for what is too much."""
    try:
        source = question["source"]
        if source not in cache:
            cache.clear()
            cache[source] = made.from_string(source)
        found = cache[source].render(**question["given"])
    except MemoryError:
        cache.clear()
        return {"limit": f"takes more than {MEMORY >> 20:,} MiB of memory"}
    except Exception as error:  # a template may fail in any way that its language allows
        return {"error": str(error).strip() or type(error).__name__}
    if len(found) > CHARACTERS:
        return {"limit": f"writes {len(found):,} characters; at most {CHARACTERS:,} are read"}
    return {"text": found}


def main() -> None:
    sys.path[:] = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    made, cache = environment(), dict[str, Any]()
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answered = json.dumps(answer(made, cache, json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answered, flush=True)


if __name__ == "__main__":
    main()
