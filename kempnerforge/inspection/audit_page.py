"""Rows of a batch as HTML: the images as the model gets them, each token with what is known of it, and bars that show the row as a whole.

What comes out is a part of a page, without scripts and without references to anything outside. All text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kempnerforge.inspection.audit import count, image_length
from kempnerforge.inspection.audit_rows import Decoder, Piece, Row, pieces_of
from kempnerforge.report.html import picture, text

HUES = 6
KINDS = ("image", "prompt", "trained", "padding")

STYLE = """
:root{--image:#2f7fd1;--on-image:#fff;--prompt:#8a93a3;--trained:#1c9a5b;--padding:#d9dde4;--trained-bg:#c9f0d9;--special:#8a4fc7;--hair:#10182833;
--s0:#2468c9;--s1:#d9571b;--s2:#0f8a6a;--s3:#8a4fc7;--s4:#b98900;--s5:#c2417c}
@media (prefers-color-scheme:dark){:root{--image:#5aa2f0;--on-image:#08172a;--prompt:#7b8494;--trained:#3cc489;--padding:#2f353e;--trained-bg:#14492f;
--special:#c39bf5;--hair:#ffffff3d;--s0:#6ea8ff;--s1:#ff9057;--s2:#43c9a3;--s3:#c39bf5;--s4:#e0b640;--s5:#f283b4}}
.row{padding:14px 16px 16px;margin-top:14px}.row h3{font-size:15px;margin:0 0 10px;font-weight:620;overflow-wrap:anywhere}
.row h3 small{font-weight:400;color:var(--muted);font-size:13.5px;margin-left:6px}
.lanes{display:grid;grid-template-columns:auto minmax(0,1fr);gap:4px 10px;align-items:center;font-size:12px;color:var(--muted)}
.lanes svg{display:block;width:100%;height:13px;border-radius:3px;background:var(--track)}.lanes svg.tall{height:30px}
.lanes polyline{fill:none;stroke:var(--ink);stroke-width:1.4;vector-effect:non-scaling-stroke}
.image{fill:var(--image);background:var(--image)}.prompt{fill:var(--prompt);background:var(--prompt)}
.trained{fill:var(--trained);background:var(--trained)}.padding{fill:var(--padding);background:var(--padding)}
.s0{--own:var(--s0)}.s1{--own:var(--s1)}.s2{--own:var(--s2)}.s3{--own:var(--s3)}.s4{--own:var(--s4)}.s5{--own:var(--s5)}
.lanes .own{fill:var(--own)}
.sample{border-left:4px solid var(--own);padding:2px 0 2px 12px;margin-top:14px}.sample.none{border-color:var(--padding)}
.sample h4{margin:0 0 6px;font-size:13.5px;font-weight:600;overflow-wrap:anywhere}.sample h4 span{font-weight:400;color:var(--muted)}
.views{display:flex;flex-wrap:wrap;gap:10px;margin-bottom:8px}.views figure{margin:0;width:148px}
.views img{display:block;width:148px;height:148px;object-fit:contain;background:var(--track);border:1px solid var(--line);border-radius:6px}
.views img.small{image-rendering:pixelated}.views figcaption{font-size:12px;color:var(--muted);line-height:1.35;margin-top:3px}
.line{display:grid;grid-template-columns:132px minmax(0,1fr);gap:0 12px;padding:5px 0;border-top:1px solid var(--line)}
.line .where{font-size:12px;line-height:1.4;color:var(--muted);font-variant-numeric:tabular-nums}.line .where b{color:var(--ink);font-weight:600}
.tokens{font:14px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.tokens span{unicode-bidi:isolate;padding:1px 0;box-shadow:inset -1px 0 var(--hair)}.tokens .t{background:var(--trained-bg)}
.tokens .x{color:var(--special);font-weight:600}
.tokens .i,.tokens .p{display:inline-block;line-height:1.4;border-radius:5px;padding:0 6px;margin:0 1px;color:var(--on-image);
background:var(--image);box-shadow:none}.tokens .p{background:var(--padding);color:var(--muted)}
.tokens .t.i,.tokens .t.p{outline:2px solid var(--bad)}
.shares{display:flex;height:16px;border-radius:5px;overflow:hidden;background:var(--track)}.shares span{display:block;height:100%}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:13px;color:var(--muted);margin:6px 0 0}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
@media (max-width:560px){.line{grid-template-columns:minmax(0,1fr)}.views figure,.views img{width:112px}.views img{height:112px}}
"""


def describe(row: Row, number: int, tokenizer: Decoder, names: Mapping[int, str]) -> dict[str, Any]:
    """What is known of a row, as plain values.

    Returns:
        ``row``; ``samples`` (``id``, ``part``, ``shares``); ``shares`` as from ``Row.shares``; ``images`` (``sample``, ``text``, ``start``,
        ``positions``, ``picture``); ``segments`` (``sample``, ``text``, ``start``, ``end``, ``positions``: first and last, ``pieces``).
        ``start`` and ``end`` are columns of the row.
    """
    padded = [*row.samples, *[""] * (row.num_samples - len(row.samples))]
    parts = [*row.parts, *[0] * (row.num_samples - len(row.parts))]
    segments = []
    for segment in row.segments:
        pieces = [*(row.floating(segment.sample) if _begins(row, segment.start) else []), *pieces_of(row, segment, tokenizer, names)]
        segments.append(
            {
                "sample": segment.sample,
                "text": segment.text,
                "start": segment.start,
                "end": segment.end,
                "positions": [row.positions[segment.start], row.positions[segment.end - 1]],
                "pieces": [_piece(piece) for piece in pieces],
            }
        )
    return {
        "row": number,
        "shares": row.shares(),
        "samples": [
            {"id": name, "part": part, "shares": row.shares(at)} for at, (name, part) in enumerate(zip(padded, parts, strict=True))
        ],
        "images": [{**image._asdict(), "positions": image_length(row, slot)} for slot, image in enumerate(row.images)],
        "segments": segments,
    }


def _begins(row: Row, start: int) -> bool:
    """Whether a sample begins at ``start``."""
    return start == 0 or row.owners[start - 1][0] != row.owners[start][0]


def _piece(piece: Piece) -> dict[str, Any]:
    found: dict[str, Any] = {"what": piece.what, "start": piece.start, "end": piece.end, "trained": piece.trained}
    if piece.what == "image":
        return found | {"image": piece.slot}
    return found if piece.what == "padding" else found | {"text": piece.text, "ids": list(piece.ids)}


def row_card(facts: Mapping[str, Any], images: np.ndarray | None, sources: Sequence[str]) -> str:
    """A row as a card.

    Args:
        facts: as from ``describe``.
        images: (N, 3, H, W) uint8, those of the batch; None where it has none.
        sources: names of the sections of a mixture, by part; one of them alone is not named.
    """
    shares = facts["shares"]
    texts = sum(segment["text"] > 0 and segment["sample"] >= 0 for segment in facts["segments"])
    counts = [
        count(shares["positions"] - shares["padding"], "useful position"),
        f"{shares['trained']:,} trained",
        count(len(facts["images"]), "image"),
        count(texts, "text"),
        count(len(facts["samples"]), "sample"),
        f"{shares['padding']:,} padding",
    ]
    body = [f"<h3>row {facts['row']}<small>{' · '.join(counts)}</small></h3>", _lanes(facts)]
    for number, sample in enumerate(facts["samples"]):
        own = [segment for segment in facts["segments"] if segment["sample"] == number]
        source = f" · {text(sources[sample['part']])}" if len(sources) > 1 else ""
        head = f"<h4>sample {number}: {text(sample['id'])} <span>{source}</span></h4>"
        views = [_view(slot, image, images) for slot, image in enumerate(facts["images"]) if image["sample"] == number]
        strip = f'<div class="views">{"".join(views)}</div>' if views else ""
        body.append(f'<section class="sample s{number % HUES}">{head}{strip}{"".join(map(_line, own))}</section>')
    rest = [segment for segment in facts["segments"] if segment["sample"] < 0]
    if rest:
        body.append(f'<section class="sample none">{"".join(map(_line, rest))}</section>')
    return f'<article class="card row">{"".join(body)}</article>'


def _view(slot: int, image: Mapping[str, Any], images: np.ndarray | None) -> str:
    """One placement of an image in a row."""
    first, last = image["start"], image["start"] + image["positions"] - 1
    where = f"columns {first}–{last}" if image["positions"] else f"before column {first}"
    known = images is not None and 0 <= image["picture"] < len(images)
    shown = picture(images[image["picture"]].transpose(1, 2, 0), f"image {slot}") if known and images is not None else "(no such image)"
    return f"<figure>{shown}<figcaption>image {slot} · {_text_name(image)}<br>{where}</figcaption></figure>"


def _text_name(owned: Mapping[str, Any]) -> str:
    return f"text {owned['text']}" if owned["text"] else "shared"


def _line(segment: Mapping[str, Any]) -> str:
    """A text, what the texts of a sample share, or padding."""
    columns = f"columns {segment['start']}–{segment['end'] - 1}"
    first, last = segment["positions"]
    name = "padding" if segment["sample"] < 0 else _text_name(segment)
    where = f'<div class="where"><b>{name}</b><br>{columns}<br>positions {first}–{last}</div>'
    return f'<div class="line">{where}<div class="tokens">{"".join(map(_token, segment["pieces"]))}</div></div>'


def _token(piece: Mapping[str, Any]) -> str:
    what, length = piece["what"], piece["end"] - piece["start"]
    trained = " t" if piece["trained"] else ""
    if what == "image":
        return f'<span class="i{trained}">image {piece["image"]}{f" ×{length}" if length else ""}</span>'
    if what == "padding":
        return f'<span class="p{trained}">padding ×{length}</span>'
    ids = ", ".join(map(str, piece["ids"]))
    column = f"column {piece['start']}" + (f"–{piece['end'] - 1}" if length > 1 else "")
    title = f"{'trained; ' if piece['trained'] else ''}{column}; id {ids}"
    kind = "x" if what == "special" else "w"
    return f'<span class="{kind}{trained}" title="{title}">{text(piece["text"])}</span>'


def _lanes(facts: Mapping[str, Any]) -> str:
    """The row from its first to its last column: what stands there, whose it is, and which position it has."""
    length = facts["shares"]["positions"]
    kinds = "".join(
        f'<rect class="{kind}" x="{start}" y="0" width="{end - start}" height="1"/>' for kind, start, end in _stretches(facts["segments"])
    )
    owners, lines = [], []
    top = max([segment["positions"][1] for segment in facts["segments"]] + [1])
    for s in facts["segments"]:
        if s["sample"] < 0:
            continue
        opacity = 1 if not s["text"] else 0.75 if s["text"] % 2 else 0.45
        name = f"sample {s['sample']}, {_text_name(s)}, columns {s['start']}–{s['end'] - 1}"
        owners.append(
            f'<rect class="own s{s["sample"] % HUES}" x="{s["start"]}" y="0" width="{s["end"] - s["start"]}" height="1"'
            f' opacity="{opacity}"><title>{name}</title></rect>'
        )
        first, last = (top - value for value in s["positions"])
        lines.append(f'<polyline points="{s["start"]},{first} {s["end"]},{last}"/>')
    return (
        f'<div class="lanes"><span>tokens</span>{_svg(length, 1, kinds, "what stands at each position")}'
        f"<span>samples, texts</span>{_svg(length, 1, ''.join(owners), 'sample and text of each position')}"
        f"<span>positions</span>{_svg(length, top, ''.join(lines), 'position of each token, counted from the beginning of its text', 'tall')}</div>"
    )


def _svg(width: int, height: int, inside: str, name: str, kind: str = "low") -> str:
    return f'<svg class="{kind}" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{name}">{inside}</svg>'


def _stretches(segments: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, int]]:
    """(kind, first column, column behind the last) of neighbouring pieces of one kind."""
    run: tuple[str, int, int] | None = None
    for segment in segments:
        for piece in segment["pieces"]:
            if piece["start"] >= segment["end"] or piece["start"] == piece["end"]:
                continue  # beyond the row, or without a position
            kind = piece["what"] if piece["what"] in ("image", "padding") else "trained" if piece["trained"] else "prompt"
            if run and run[0] == kind and run[2] == piece["start"]:
                run = kind, run[1], piece["end"]
                continue
            if run:
                yield run
            run = kind, piece["start"], piece["end"]
    if run:
        yield run


def share_bar(shares: Mapping[str, int]) -> str:
    """Shares of all positions as one bar with its legend."""
    total = max(shares["positions"], 1)
    bars = "".join(f'<span class="{kind}" style="width:{100 * shares[kind] / total:.2f}%"></span>' for kind in KINDS)
    legend = "".join(
        f'<span><i class="{kind}"></i>{kind} {100 * shares[kind] / total:.1f}\u00a0% ({shares[kind]:,})</span>' for kind in KINDS
    )
    return f'<div class="shares">{bars}</div><div class="legend">{legend}</div>'
