"""Rows of a batch as HTML: the images as the model gets them, each token, and bars of the whole row.

The HTML is a part of a page, without scripts and without references to anything outside. All text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from kempnerforge.inspection.audit import image_length
from kempnerforge.inspection.audit_rows import AuditRow, Decoder, ShownPiece, pieces_of
from kempnerforge.report.html import picture
from kempnerforge.report.page import render
from kempnerforge.util.numbers import counted


def row_facts(row: AuditRow, number: int, tokenizer: Decoder, names: Mapping[int, str]) -> dict[str, Any]:
    """What is known of a row, as plain values.

    Returns:
        ``row``; ``samples`` (``id``, ``part``, ``shares``); ``shares`` as from ``AuditRow.shares``;
        ``images`` (``sample``, ``text``, ``start``, ``positions``, ``picture``); ``segments`` (``sample``,
        ``text``, ``start``, ``end``, ``positions``: first and last, ``pieces``).
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


def _begins(row: AuditRow, start: int) -> bool:
    """Whether a sample begins at ``start``."""
    return start == 0 or row.owners[start - 1][0] != row.owners[start][0]


def _piece(piece: ShownPiece) -> dict[str, Any]:
    found: dict[str, Any] = {"what": piece.what, "start": piece.start, "end": piece.end, "trained": piece.trained}
    if piece.what == "image":
        return found | {"image": piece.slot}
    return found if piece.what == "padding" else found | {"text": piece.text, "ids": list(piece.ids)}


def row_card(facts: Mapping[str, Any], images: np.ndarray | None, sources: Sequence[str]) -> Markup:
    """A row as a card.

    Args:
        facts: as from ``row_facts``.
        images: (N, 3, H, W) uint8, of the batch; None: it has none.
        sources: names of the sections of a mixture, by part; one of them alone is not named.
    """
    shares = facts["shares"]
    texts = sum(segment["text"] > 0 and segment["sample"] >= 0 for segment in facts["segments"])
    counts = [
        counted(shares["positions"] - shares["padding"], "useful position"),
        f"{shares['trained']:,} trained",
        counted(len(facts["images"]), "image"),
        counted(texts, "text"),
        counted(len(facts["samples"]), "sample"),
        f"{shares['padding']:,} padding",
    ]
    known = dict(enumerate([] if images is None else images))
    views = []
    for slot, image in enumerate(facts["images"]):
        seen = known.get(image["picture"])
        shown = "(no such image)" if seen is None else picture(seen.transpose(1, 2, 0), f"image {slot}")
        views.append({**image, "slot": slot, "shown": shown})
    top = max([segment["positions"][1] for segment in facts["segments"]] + [1])
    stretches = list(_stretches(facts["segments"]))
    return render("row.html", **facts, counts=counts, sources=sources, views=views, top=top, stretches=stretches)


class Stretch(NamedTuple):
    """Neighbouring columns of one kind, from ``start`` to before ``end``."""

    kind: str
    start: int
    end: int


def _stretches(segments: Sequence[Mapping[str, Any]]) -> Iterator[Stretch]:
    """The columns of a row by what is in them."""
    run: Stretch | None = None
    for segment in segments:
        for piece in segment["pieces"]:
            if piece["start"] >= segment["end"] or piece["start"] == piece["end"]:
                continue  # beyond the row, or without a position
            kind = piece["what"] if piece["what"] in ("image", "padding") else "trained" if piece["trained"] else "prompt"
            if run and (run.kind, run.end) == (kind, piece["start"]):
                run = run._replace(end=piece["end"])
                continue
            if run:
                yield run
            run = Stretch(kind, piece["start"], piece["end"])
    if run:
        yield run
