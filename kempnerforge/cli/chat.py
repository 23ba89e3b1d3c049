"""``kempnerforge chat``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kempnerforge.cli.asking import add_sampling, sampling_of
from kempnerforge.util.errors import InputError
from kempnerforge.util.process import answer_stream

if TYPE_CHECKING:
    from kempnerforge.serve.terminal import Chat

HELP = """Talk with a trained model in the terminal.

Takes a checkpoint or run directory, and images to talk about; a line is a question, and the answer comes as it is written. /help lists the
commands, such as /image PATH, /reset and /quit. Ctrl-C stops an answer. On a pipe, questions are read from stdin and the answers alone go to
stdout; the exit code is 2 if one of them could not be answered."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run directory, export, or directory of transformers")
    parser.add_argument("images", type=Path, nargs="*", help="image files")
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    from kempnerforge.inference.model import TrainedModel
    from kempnerforge.serve.terminal import Chat

    sampling = sampling_of(args)
    model = TrainedModel.open(args.checkpoint, args.overrides)
    chat = Chat(model, answer_stream(), note, has_turns=model.has_turns, max_new_tokens=args.max_new_tokens, sampling=sampling)
    chat.add(args.images)
    if sys.stdin.isatty():
        note(f"{model.path}: /help lists the commands, /quit ends")
        if not model.has_turns:
            note("each question is asked on its own: this model was not trained on conversations")
        return by_hand(chat)
    return by_pipe(chat)


def by_hand(chat: Chat) -> int:
    """Reads lines from a keyboard."""
    with contextlib.suppress(ImportError):  # where there is none, lines are edited as the terminal does it
        importlib.import_module("readline")
    prompt = "> " if sys.stdout.isatty() else ""
    while True:
        try:
            if not chat.read(input(prompt)):
                return 0
        except EOFError:
            note("")
            return 0
        except KeyboardInterrupt:
            note("^C; /quit ends")
        except InputError as error:
            note(f"error: {error}")


def by_pipe(chat: Chat) -> int:
    """Lines of a file or of another program."""
    code = 0
    for line in sys.stdin:
        try:
            if not chat.read(line):
                break
        except InputError as error:
            note(f"error: {error}")
            code = 2
    return code


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
