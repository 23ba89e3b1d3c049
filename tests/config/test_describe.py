"""``kempnerforge config``: the reference of all sections, and ``docs/config.md``, which holds it."""

from __future__ import annotations

import dataclasses

import pytest

from kempnerforge.config.build import SECTIONS, UNIONS
from kempnerforge.config.describe import TABLES, describe, meanings_of
from kempnerforge.util.errors import InputError
from tests.dist import ROOT
from tests.training.tiny import call

PAGE = ROOT / "docs/config.md"
MARK = "<!-- from here on: the output of `kempnerforge config` -->\n"


def classes() -> list[type]:
    """Of all sections, each of them in all its forms."""
    chosen = [union.class_for(name) for union in UNIONS.values() for name in union.entries.names()]
    return [*SECTIONS.values(), *TABLES.values(), *(cls for cls in chosen if cls.__module__.startswith("kempnerforge."))]


def test_every_key_has_a_meaning() -> None:
    missing = [
        f"{cls.__name__}.{f.name}" for cls in classes() for f in dataclasses.fields(cls) if f.init and f.name not in meanings_of(cls)
    ]
    assert missing == []


def test_the_page_is_current() -> None:
    written = PAGE.read_text(encoding="utf-8").partition(MARK)[2]
    assert written.strip() == describe().strip(), "docs/config.md: put the output of `kempnerforge config` after the mark"


def test_one_section() -> None:
    shown = call("config", "scheduler").out
    assert shown == describe("scheduler") == call("config", "[scheduler]").out
    assert '* `name` = `"cosine"` (a string): "cosine", "linear", "wsd"' in shown and "[optimizer]" not in shown
    assert "### `[data.images]`" in describe("data") and '### `[vlm]` with `arch = "mot"`' in describe("vlm")


def test_unknown_section() -> None:
    with pytest.raises(InputError, match=r"section = 'optimiser': there is none; the sections are run, model, .*stages, lora"):
        describe("optimiser")
    assert call("config", "optimiser").code == 2
