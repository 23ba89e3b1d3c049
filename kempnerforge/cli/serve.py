"""``kempnerforge serve``."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from kempnerforge.cli.numbers import whole

HELP = """Ask a trained model on a local web page.

Takes a checkpoint or run directory. Drop an image on the page and ask; the answer comes as it is written, and boxes and points in it (PaliGemma's
<loc> tokens, Molmo's <point> tags) are drawn on the image. One question is answered at a time, the others wait. The page is for this machine
alone unless --host says otherwise; there is no password. A request has 60 s to come in, and a client 24 connections. Ctrl-C ends it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run directory")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="address or name to listen on (default: 127.0.0.1, this machine alone)")


def run(args: argparse.Namespace) -> int:
    from kempnerforge.inference.model import TrainedModel
    from kempnerforge.serve.desk import Desk
    from kempnerforge.serve.facts import facts_of
    from kempnerforge.serve.web import bind

    model = TrainedModel.restore(args.checkpoint, args.overrides)
    server = bind(args.host, args.port, Desk(model), facts_of(model))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{model.path} is at {server.url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    try:
        server.run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    return 0
