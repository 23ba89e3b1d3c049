"""``kempnerforge contract``."""

from __future__ import annotations

import argparse
import difflib
import json
from typing import TYPE_CHECKING

from kempnerforge.util.errors import InputError, cut, visible
from kempnerforge.util.paths import place_of

if TYPE_CHECKING:
    from kempnerforge.contract.suite import Check

HELP = """Check that an architecture of your own keeps what every architecture must keep.

Takes a .py file or a module that registers archs, and runs each check on a small model of them: names and weights, masks and leaks, packs,
generation with a cache, FLOPs, freezing, resuming, activation checkpointing, two processes. A check is one line: ok, or FAILED and why.
--vlm.KEY=VALUE sets keys that your arch needs. It needs pytest: pip install "kempnerforge[contract]". Exit code 1 says that a check
failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plugin", help="the file or module, as in plugins = [...] of a config")
    parser.add_argument("--only", action="append", default=[], metavar="CHECK", help="run this check alone (may be given several times)")
    parser.add_argument("--slow", action="store_true", help="also the checks that take minutes, such as torch.compile")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the lines")


def run(args: argparse.Namespace) -> int:
    name = plugin_name(args.plugin)
    from kempnerforge.contract.cases import Plugin
    from kempnerforge.contract.suite import check_plugin

    show = (lambda check: None) if args.json else show_check
    checks = check_plugin(Plugin(name, args.overrides), slow=args.slow, only=args.only, done=show)
    failed = [check.name for check in checks.values() if check.failures]
    if args.json:
        found = {check.name: {"cases": check.cases, "seconds": check.seconds, "failures": check.failures} for check in checks.values()}
        print(json.dumps({"ok": not failed, "checks": found}))
    else:
        print(f"{len(checks) - len(failed)} checks ok" + (f", {len(failed)} failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def plugin_name(word: str) -> str:
    """The name of a plugin as a config has it; a file as an absolute path.

    Raises:
        InputError: there is no such file.
    """
    if not word.endswith(".py"):
        return word
    path = place_of(word)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=1)
        raise InputError(f"{path}: no such file{f'; did you mean {near[0]}?' if near else ''}")
    return str(path.resolve())


def show_check(check: Check) -> None:
    """A line for ``check``: of a failed one the first failure, and how many of its cases failed."""
    if not check.failures:
        print(f"ok      {check.name} ({check.cases} {'case' if check.cases == 1 else 'cases'}, {check.seconds:.1f} s)", flush=True)
        return
    case, why = next(iter(check.failures.items()))
    count = f"{len(check.failures)} of {max(check.cases, len(check.failures))} cases; {case}"
    print(f"FAILED  {check.name} ({count}): {visible(cut(why, 300))}", flush=True)
