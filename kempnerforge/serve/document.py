"""The web page: one document that loads nothing, and the policy that holds it to that."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

PARTS = Path(__file__).parent / "page"


@cache
def document() -> tuple[bytes, str]:
    """The page and its Content-Security-Policy: only this script and this style sheet run, images come from
    the reader's own files, and the page connects to this server alone.
    """
    style, script = (_part(name) for name in ("style.css", "script.js"))
    page = _part("index.html").replace("{{style}}", style).replace("{{script}}", script)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
