"""``kempnerforge config``."""

from __future__ import annotations

import argparse

HELP = """Show the sections of a config, with each key's type, default and meaning.

Without SECTION all are shown. Archs, encoders, adapters, sources and templates of plugins are in the files that register them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", default="", help="such as optimizer, vlm or stages")


def run(args: argparse.Namespace) -> int:
    from kempnerforge.config.describe import describe

    print(describe(args.section.strip("[]")), end="")
    return 0
