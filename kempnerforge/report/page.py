"""A page in one file, in the style of the report: it needs no network and no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from kempnerforge.report.html import text
from kempnerforge.util.files import write_text

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#16181d;--muted:#5d6470;--line:#e1e4ea;--good:#0a7a4b;--bad:#c0321f;
--accent:#2468c9;--track:#e8ebf0;--shadow:0 1px 2px #1018280d}
@media (prefers-color-scheme:dark){:root{--page:#0f1114;--card:#171a1f;--ink:#eceef2;--muted:#a2a9b6;--line:#2b3038;--good:#4cd094;
--bad:#ff8a75;--accent:#6ea8ff;--track:#2a2f37;--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1160px;margin:0 auto;padding:32px 20px 48px}
header{margin-bottom:22px}
h1{font-size:26px;line-height:1.25;font-weight:650;letter-spacing:-.01em;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;font-weight:620;margin:34px 0 4px}
p{margin:0}.note{color:var(--muted);font-size:14px;margin-bottom:12px;max-width:80ch}
.facts{display:flex;flex-wrap:wrap;gap:2px 20px;margin:0;color:var(--muted);font-size:14px}
.facts div{display:flex;gap:6px}.facts dt::after{content:":"}.facts dd{margin:0;color:var(--ink);overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px}
.card,.tile,.example,details{background:var(--card);border:1px solid var(--line);border-radius:10px;box-shadow:var(--shadow)}
.tile{padding:14px 16px}.tile .label{color:var(--muted);font-size:13px}
.tile .value{font-size:27px;line-height:1.25;font-weight:640;letter-spacing:-.015em;margin:2px 0;font-variant-numeric:tabular-nums}
.tile .value small{font-size:15px;font-weight:500;color:var(--muted);letter-spacing:0}
.tile .more{color:var(--muted);font-size:12.5px;line-height:1.4}
.tile.lead{border-color:var(--accent);box-shadow:inset 0 3px 0 var(--accent)}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px}.charts .card{padding:14px 14px 8px}
.charts svg{display:block;width:100%;height:auto}.charts svg svg{overflow:hidden}
.card.table{padding:6px 16px;overflow-x:auto}
.answers{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:0 36px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums;align-self:start}
th{color:var(--muted);font-weight:500;font-size:12.5px;text-align:left}th,td{padding:6px 8px 6px 0;border-bottom:1px solid var(--line)}
tr:last-child td{border-bottom:0}td.n,th.n{text-align:right;white-space:nowrap;padding-right:0;padding-left:12px}
td.name{overflow-wrap:break-word}td.bar{width:45%;min-width:48px}
.track{display:block;height:8px;border-radius:4px;background:var(--track);overflow:hidden}
.fill{display:block;height:100%;background:var(--accent);border-radius:4px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(168px,1fr));gap:12px}
.example{overflow:hidden;margin:0;display:flex;flex-direction:column}
.example img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:var(--track)}.example img.small{image-rendering:pixelated}
.example figcaption{padding:10px 12px 12px;font-size:14px;line-height:1.4;overflow-wrap:anywhere;white-space:pre-line}
.question{font-weight:550;margin-bottom:4px}.example .row{color:var(--muted);font-size:13px}.example .row b{color:var(--ink);font-weight:550}
.mark{font-weight:650}.right .mark{color:var(--good)}.wrong .mark{color:var(--bad)}
.example.wrong{border-color:var(--bad)}.example .answer{display:flex;flex-wrap:wrap;gap:0 6px;align-items:baseline}
details{padding:0 16px;margin-top:34px}summary{cursor:pointer;padding:12px 0;font-weight:620}
pre{margin:0 0 14px;overflow:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;tab-size:4}
footer{color:var(--muted);font-size:13px;margin-top:24px}
@media (max-width:760px){.charts,.answers{grid-template-columns:minmax(0,1fr)}.answers table+table thead{display:none}
table{table-layout:fixed}th:nth-child(1),td.name{width:28%}
th:nth-child(2),td.bar{width:15%;min-width:0}th:nth-child(3),td:nth-child(3){width:35%}
.answers table:not(:last-child) tr:last-child td{border-bottom:1px solid var(--line)}}
@media (max-width:560px){main{padding:20px 12px 36px}h1{font-size:22px}.tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}
.tile{padding:10px 12px}.tile .value{font-size:21px}.charts .card{padding:10px 8px 6px}
.grid{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}}
@media print{body{background:#fff}.card,.tile,.example{break-inside:avoid}}
.plain th:nth-child(n),.plain td:nth-child(n){width:auto}.plain table{table-layout:auto}.plain td.name{min-width:9ch;overflow-wrap:anywhere}
"""
"""Light and dark by the reader's preference, from a phone to a wide screen."""


def tiles(cards: Iterable[tuple[str, str, str, str]]) -> str:
    """(label, value as HTML, what is said below it, further classes) in a row."""
    shown = "".join(
        f'<div class="tile {kind}"><div class="label">{text(label)}</div><div class="value">{value}</div><div class="more">{text(more)}</div></div>'
        for label, value, more, kind in cards
    )
    return f'<section class="tiles">{shown}</section>' if shown else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table as a card.

    Args:
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
        body: HTML, escaped already.
        style: CSS beyond that of the report.
    """
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{text(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}{style}</style></head><body><main>\n{body}\n</main></body></html>\n'
    )
    return write_text(path, page)
