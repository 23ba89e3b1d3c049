"""The ``kempnerforge`` console script: a table of commands, each a module with ``HELP``, ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

COMMANDS = ("train", "check", "inspect", "generate", "eval")

EPILOG = """\
Any key of the config can be given on the command line, as --section.key=value or --section.key value.

exit codes: 0 done; 2 the input is wrong (config, data, arguments); 3 stopped by a fault, the same command continues;
130 interrupted after saving, the same command continues; 1 a defect of the program."""


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; the modules of those other than ``only`` are imported for their help line alone."""
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


def run(argv: Sequence[str]) -> int:
    """Parses ``argv``, runs the command and turns what went wrong into a line on stderr and an exit code."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    args.overrides = rest
    try:
        return command(args.command).run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not _can_continue(error):
            raise
        print(f"stopped: {type(error).__name__}: {error}", file=sys.stderr)
        return 3


def _can_continue(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    from kempnerforge.checkpoint import CheckpointError
    from kempnerforge.training.trainer import TrainingFault

    lost_peer = any(word in str(error) for word in ("Connection reset", "Connection closed", "Timed out", "gloo"))
    return isinstance(error, (CheckpointError, TrainingFault, DistError)) or lost_peer


def main() -> NoReturn:
    """The entry point.

    NOTE: leaves by ``os._exit``: a process that used gloo may otherwise abort while the interpreter shuts down, after all is done. OpenMP
    threads that spin while they wait slow everything on shared cores by a factor of four, so they are told not to before torch is loaded.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("kempnerforge").setLevel(logging.INFO)
    try:
        code = run(sys.argv[1:])
    except SystemExit as stop:  # argparse
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
