"""``kempnerforge study``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kempnerforge.cli.numbers import whole
from kempnerforge.util.errors import InputError, visible

if TYPE_CHECKING:
    from kempnerforge.study.config import Study

HELP = """Compare many runs: rows (architectures, say) times seeds, with one budget for all.

STUDY.toml is a config with a [study] table; docs/studies.md describes it. "plan" shows what would be run and what it costs. "run" tunes and
trains one cell after another, and goes on where it was stopped or killed. "status" says where it is. "report" writes a page with the
comparison, as far as it has come.
Exit code 3 of "run": a cell has failed; the others are done, and the same command tries it again."""
ACTIONS = ("plan", "run", "status", "report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("study", type=Path, metavar="STUDY.toml")
    parser.add_argument("--jobs", type=whole(1), metavar="N", help="of run: cells at the same time (default: study.jobs)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="of report: one line a cell")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="of report: the tables")
    parser.add_argument("--pdf", type=Path, metavar="DIR", help="of report: the curves as figures for a paper")
    parser.add_argument("--json", action="store_true", help="of plan and status: one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    from kempnerforge.study.config import load_study

    study = load_study(args.study, args.overrides)
    return {"plan": _plan, "run": _run, "status": _status, "report": _report}[args.action](study, args)


def _plan(study: Study, args: argparse.Namespace) -> int:
    from kempnerforge.study.show import plan_lines, plan_table

    table = plan_table(study)
    print(json.dumps(table) if args.json else "\n".join(plan_lines(study, table)))
    return 0


def _status(study: Study, args: argparse.Namespace) -> int:
    from kempnerforge.study.show import status_lines, status_table

    table = status_table(study)
    print(json.dumps(table) if args.json else visible("\n".join(status_lines(table)), keep="\n"))
    return 0


def _run(study: Study, args: argparse.Namespace) -> int:
    import signal

    from kempnerforge.study.progress import run_study
    from kempnerforge.study.run import Stopped
    from kempnerforge.util.process import INTERRUPTED

    try:
        done = run_study(study, args.jobs or study.cfg.jobs)
    except Stopped as stopped:
        if stopped.number == signal.SIGINT:
            raise KeyboardInterrupt(stopped.said) from None
        print(stopped.said, file=sys.stderr)
        return INTERRUPTED
    return 0 if done else 3


def _report(study: Study, args: argparse.Namespace) -> int:
    if importlib.util.find_spec("scipy") is None:
        raise InputError('study report needs the package scipy: pip install "kempnerforge[study]"')
    from kempnerforge.study.export import write_csv, write_figures, write_markdown
    from kempnerforge.study.findings import find
    from kempnerforge.study.report import write_report

    findings = find(study)
    written = [write_report(findings)]
    written += [write_csv(findings, args.csv)] if args.csv else []
    written += [write_markdown(findings, args.markdown)] if args.markdown else []
    written += write_figures(findings, args.pdf) if args.pdf else []
    for line in [*findings.verdict, *(f"warning: {line}" for line in findings.warnings), *(f"written: {path}" for path in written)]:
        print(visible(line, keep="\u00a0"))
    return 0
