"""The ``kempnerforge`` console script: a table of commands, each a module with ``HELP``, ``add_arguments``
and ``run``.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import select
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn

from kempnerforge.config.plugins import trusting
from kempnerforge.util.errors import InputError, PluginError
from kempnerforge.util.paths import place_of
from kempnerforge.util.process import INTERRUPTED, die_of_interrupt, end_with_launcher, open_output, tune_memory

TRUST = "--trust-plugins"
COMMANDS = (
    *("train", "study", "check", "bench", "inspect", "data", "generate", "chat", "serve"),
    *("eval", "report", "import", "export", "contract", "config"),
)

EPILOG = """\
Any key of the config can be given on the command line, as --section.key=value or --section.key value. The record of a run, a checkpoint
or an export may name plugins, which are code: --trust-plugins runs them.

exit codes: 0 done; 2 the input is wrong (config, data, arguments); 3 stopped by a fault, the same command continues;
130 interrupted after saving, the same command continues; 1 a defect of the program."""


INPUT_ERRORS = frozenset(
    {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}
)
"""Error numbers of a mistyped path. Any other (a full disk, a lost connection) may be gone at the next
try."""
PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
"""The same as classes, for errors that were raised without a number."""
PACKAGE = "kempnerforge"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="kempnerforge", description="Train and compare vision-language models from TOML.", epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = command(name)
        sub = commands.add_parser(
            name, help=module.HELP.splitlines()[0], description=module.HELP, epilog=EPILOG, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(sub)
    return top


def command(name: str) -> ModuleType:
    """The module of a command. They import torch only when they run."""
    return importlib.import_module(f"kempnerforge.cli.{name}")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``argv`` without overrides, and the overrides: words like ``--section.key``, with the word after them
    unless they hold a "=".
    """
    words, overrides = list(argv), []
    kept: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            kept.append(word)
            continue
        overrides.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            overrides.append(words.pop(0))
    return kept, overrides


def run(argv: Sequence[str]) -> int:
    """Parses ``argv``, runs the command and turns what went wrong into a line on stderr and an exit code."""
    try:
        return _run(argv)
    except KeyboardInterrupt as error:
        return _interrupted(error)


def _interrupted(error: KeyboardInterrupt) -> int:
    """Says what ``error`` does: "interrupted", unless it has a text; an empty one is said already."""
    if line := str(error.args[0]) if error.args else "interrupted":
        print(line, file=sys.stderr)
    return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    """As ``run``; an interrupt comes out."""
    words, overrides = split_overrides([word for word in argv if word != TRUST])
    args, rest = parser().parse_known_args(words)
    if hasattr(args, "images"):  # argparse takes those before the next option alone
        args.images = [*args.images, *(Path(word) for word in rest if not word.startswith("-"))]
        rest = [word for word in rest if word.startswith("-")]
    args.argv, args.overrides = list(argv), overrides + rest
    try:
        if hasattr(args, "images") and any(word.startswith("--image") for word in rest):
            raise InputError(f"--image: no such option; images are written without a name: kempnerforge {args.command} RUN a.png")
        _expand_paths(args)
        with trusting(TRUST in argv):
            return command(args.command).run(args)
    except (InputError, PluginError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        from kempnerforge.data.batching.loader import lost_worker

        if isinstance(error, BrokenPipeError) and _output_is_closed():  # who did has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if isinstance(error, RuntimeError) and (lost := lost_worker(error) or _lost_rank(error)):
            print(f"stopped: {lost}", file=sys.stderr)
            return 3
        code = _exit_code(error, args.command)
        if code is None:
            raise
        print(f"{'error' if code == 2 else f'stopped: {type(error).__name__}'}: {error}", file=sys.stderr)
        return code


def _lost_rank(error: RuntimeError) -> str:
    """What to say where ``error`` is of a collective that another process did not come to; empty if it is
    another one.
    """
    known = any(word in str(error) for word in ("Connection reset", "Connection closed", "Timed out", "gloo"))
    if type(error) is not RuntimeError or not known or _caller(error) not in (PACKAGE, "torch"):
        return ""
    first = str(error).partition("This is typically")[0].strip()  # general advice follows
    return f"the connection to another process of this job is lost, which has ended or does not answer; its output says why: {first}"


def _output_is_closed() -> bool:
    """Whether stdout is a pipe that has no reader any more."""
    watched = select.poll()
    watched.register(1, 0)  # without an event that is asked for, what is wrong is told alone
    return bool(watched.poll(0))


def _expand_paths(args: argparse.Namespace) -> None:
    """``~`` and variables in all arguments that are paths, for a shell leaves them in ``--out=~/page`` and
    after quotes.
    """
    for name, value in vars(args).items():
        paths = value if isinstance(value, list) else [value]
        if paths and all(isinstance(path, Path) for path in paths):
            found = [place_of(path) for path in paths]
            setattr(args, name, found if isinstance(value, list) else found[0])


def _exit_code(error: RuntimeError | OSError, name: str) -> int | None:
    """Of the command ``name``; None: a defect, of the program or of a plugin. Only ``train`` can be continued
    by running it again.
    """
    from torch.distributed import DistError

    from kempnerforge.checkpoint import CheckpointError
    from kempnerforge.training.trainer import TrainingFault

    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, CheckpointError):
        return 3 if name in ("train", "study") else 2
    return 3 if isinstance(error, (TrainingFault, DistError)) else None


def _of_system(error: OSError) -> int | None:
    """Of a file or connection. A path that this package has opened is the user's; one that a plugin or a
    library names is a defect there.
    """
    if error.errno in INPUT_ERRORS or isinstance(error, PATH_ERRORS):
        return 2 if _caller(error) == PACKAGE else None
    made_up = type(error) is OSError and error.errno is None  # not the system's
    in_worker = str(error).startswith("Caught ")  # torch raises it anew, without its number and with its traceback as text
    return None if made_up and not in_worker else 3


def _caller(error: BaseException) -> str:
    """The package whose code has raised ``error``, or has called what raised it in Python's own library."""
    names = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((name for name in reversed(names) if name not in sys.stdlib_module_names), PACKAGE)


def _say_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints a traceback, unless a thread of Python's own lost the process it talked to: the main thread says
    which one.
    """
    if threading.current_thread() is threading.main_thread() or not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def main() -> NoReturn:
    """The entry point.

    NOTE: leaves by ``os._exit``: a process that used gloo may otherwise abort while the interpreter shuts
    down, after all is done.
    """
    tune_memory()
    open_output("stderr", *(["stdout"] if sys.argv[1:2] == ["train"] else []))
    end_with_launcher()
    sys.excepthook = _say_error
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("kempnerforge").setLevel(logging.INFO)
    interrupted = False
    try:
        code = _run(sys.argv[1:])
    except KeyboardInterrupt as error:
        code, interrupted = _interrupted(error), True
    except SystemExit as stop:  # argparse
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # who read it has seen enough
        pass
    except OSError as error:
        print(f"stopped: the output cannot be written: {error.strerror}", file=sys.stderr)
        code = code or 3
    sys.stderr.flush()
    if interrupted:
        die_of_interrupt()
    os._exit(code)
