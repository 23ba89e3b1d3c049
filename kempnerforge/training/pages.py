"""A page in one file, in the style of the report: it needs no network and no script."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kempnerforge.data.audit_page import text
from kempnerforge.training.report_style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

TABLE_STYLE = """
.plain th:nth-child(n),.plain td:nth-child(n){width:auto}.plain table{table-layout:auto}.plain td.name{min-width:9ch;overflow-wrap:anywhere}
"""


def percent(share: float) -> str:
    """``0.9931`` -> ``99.3 %``."""
    return f"{100 * share:.1f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table as a card.

    Args:
        head: names of the columns.
        rows: cells, plain text; escaped here.
        numbers: all columns but the first are numbers.
    """
    kind = lambda column: ' class="n"' if numbers and column else ' class="name"'
    top = "".join(f"<th{kind(at)}>{text(name)}</th>" for at, name in enumerate(head))
    lines = "".join("<tr>" + "".join(f"<td{kind(at)}>{text(cell)}</td>" for at, cell in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="card table plain"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def write_page(path: Path, title: str, body: str, style: str = "") -> Path:
    """Writes a page; an old one is replaced in one move.

    Args:
        path: of the file; its directory is made.
        title: plain text.
        body: HTML, escaped already.
        style: CSS beyond that of the report.
    """
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{text(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}{TABLE_STYLE}{style}</style></head><body><main>\n{body}\n</main></body></html>\n'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
