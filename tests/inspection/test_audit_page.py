from __future__ import annotations

import base64
import html as HTML
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from kempnerforge.config.data import DataConfig
from kempnerforge.data import Encoder, Layout, Sample, Text, Tokenizer, collate
from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.data.batching.pack import join
from kempnerforge.inspection.audit_page import row_card, row_facts
from kempnerforge.inspection.audit_rows import rows_of
from kempnerforge.report.html import picture, text
from kempnerforge.report.page import TEMPLATES
from tests.data.samples import png
from tests.inspection.rendered import render_rows

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[2J\u202e&amp;</div>'
TOKENIZER = Tokenizer.train(["is it so? yes no maybe été 日本"] * 4, 320)


def batch_of(samples: list[Sample], image_tokens: int = 2, pad: int = 2) -> Batch:
    encoder = Encoder(TOKENIZER, DataConfig(), Layout(image_tokens, 8, 400, 800, 0), seed=0)
    row = join([encoder.encode(sample, 0) for sample in samples])
    return collate([row], TOKENIZER.pad_id, row.table.shape[1] + pad)


def facts_of(batch: Batch) -> dict[str, Any]:
    (row,) = rows_of(batch)
    return row_facts(row, 0, TOKENIZER, TOKENIZER.special_names)


class Page(HTMLParser):
    """Tags with their classes, and the text inside spans of tokens."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[tuple[str, str]] = []  # (class, text) of spans
        self._span: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._span = dict(attrs).get("class") if tag == "span" else None
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag
        self._span = None

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._span is not None:
            self.words.append((self._span, data))


def samples() -> list[Sample]:
    red, blue = png((200, 0, 0)), png((0, 0, 200))
    return [
        Sample("a", (red,), (Text("is it?", "yes"), Text("so?", "été 日本"))),
        Sample("b", (), (Text("", "maybe"),), 0),
        Sample("c", (red, blue), (Text("is <image> like <image>?", "no"),)),
    ]


def test_each_token_of_a_row_is_there_once() -> None:
    batch = batch_of(samples())
    facts = facts_of(batch)
    pieces = [piece for segment in facts["segments"] for piece in segment["pieces"]]
    covered = [at for piece in pieces for at in range(piece["start"], piece["end"])]
    assert covered == list(range(batch.input_ids.shape[1]))
    ids = {piece["start"]: piece["ids"] for piece in pieces if "ids" in piece}
    for piece in pieces:
        if "ids" in piece:
            assert batch.input_ids[0, piece["start"] : piece["end"]].tolist() == piece["ids"]
    trained = {at for piece in pieces if piece["trained"] for at in range(piece["start"], piece["end"])}
    assert trained == {int(at) + 1 for at in batch.targets} and len(ids) > 10
    assert json.loads(json.dumps(facts)) == facts


def test_characters_of_several_tokens_stay_whole() -> None:
    facts = facts_of(batch_of([Sample("a", (), (Text("日本", "x日é本\U0001f600"),))]))
    pieces = [piece for segment in facts["segments"] for piece in segment["pieces"] if piece["what"] == "text"]
    assert "".join(piece["text"] for piece in pieces) == "日本\nx日é本\U0001f600"
    assert not any("\ufffd" in piece["text"] for piece in pieces) and any(len(piece["ids"]) > 1 for piece in pieces)


def test_facts_name_samples_and_count_positions() -> None:
    facts = facts_of(batch_of(samples()))
    assert [sample["id"] for sample in facts["samples"]] == ["a", "b", "c"]
    assert [(image["sample"], image["text"], image["positions"]) for image in facts["images"]] == [(0, 0, 2), (2, 1, 2), (2, 1, 2)]
    shares = facts["shares"]
    assert shares["positions"] == shares["image"] + shares["prompt"] + shares["trained"] + shares["padding"]
    assert shares["image"] == 6 and shares["padding"] == 2
    for key in ("image", "prompt", "trained"):
        assert sum(sample["shares"][key] for sample in facts["samples"]) == shares[key]
    firsts = {(s["sample"], s["text"]): s["positions"][0] for s in facts["segments"]}
    assert firsts[0, 0] == 0 and firsts[0, 1] == firsts[0, 2] == 2 and firsts[1, 1] == firsts[2, 1] == 0


@pytest.mark.parametrize("image_tokens", [0, 2])
def test_a_card_is_well_formed_and_shows_it_all(image_tokens: int) -> None:
    batch = batch_of(samples(), image_tokens)
    assert batch.images is not None
    page = Page(row_card(facts_of(batch), batch.images.numpy(), ["one"]))
    assert page.open == []
    pictures = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 3 and all(src.startswith("data:image/png;base64,") for src in pictures)
    first = Image.open(io.BytesIO(base64.b64decode(pictures[0].split(",")[1])))
    assert first.size == (8, 8) and first.getpixel((3, 3)) == (200, 0, 0)
    green = "".join(word for kind, word in page.words if kind.split()[-1] == "t")
    assert green == "yes<eos>été 日本<eos>maybe<eos>no<eos>"
    assert sum(kind == "x" for kind, _ in page.words) == 4  # BOS of each text
    assert sum(kind.startswith("i") for kind, _ in page.words) == 3


def test_the_page_agrees_with_the_terminal() -> None:
    batch = batch_of(samples())
    page = Page(row_card(facts_of(batch), None, ["one"]))
    (row,) = render_rows(batch, TOKENIZER, color=False)
    for kind in ("w", "w t"):
        for word in (word for found, word in page.words if found == kind):
            assert word in row


def test_data_stays_text() -> None:
    sample = Sample(HOSTILE, (png((9, 9, 9)),), (Text(HOSTILE, HOSTILE),))
    batch = batch_of([sample, samples()[0]])
    assert batch.images is not None
    html = row_card(facts_of(batch), batch.images.numpy(), [HOSTILE, "other"])
    page = Page(html)
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= {
        "article", "h3", "small", "div", "span", "svg", "rect", "title", "polyline", "section", "h4", "figure", "img", "figcaption", "br", "b"
    }  # fmt: skip
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "\x1b" not in html and "\u202e" not in html and "<script" not in html
    said = "".join(word for kind, word in page.words if kind == "w t")
    assert said.startswith('<script>alert(1)</script><img src=x onerror="alert(2)">\\x1b[2J\\u202e&amp;</div>')
    row = "\n".join(render_rows(batch, TOKENIZER, color=True))
    assert "\x1b[2J" not in row and "\u202e" not in row


def test_nothing_is_fetched_from_outside() -> None:
    html = row_card(facts_of(batch_of(samples())), None, ["one"])
    assert not re.search(r"https?:|//|url\(|<link|<script|@import", html)


def test_a_label_beyond_the_row_is_shown() -> None:
    encoder = Encoder(TOKENIZER, DataConfig(), Layout(0, 0, 100, 200, 0), seed=0)
    ids = TOKENIZER.encode("yes maybe no")
    batch = collate([encoder.encode(Sample("w", (), (Text("", tuple(ids)),)), 0)], TOKENIZER.pad_id, None)
    facts = facts_of(batch)
    (segment,) = facts["segments"]
    assert "".join(piece["text"] for piece in segment["pieces"]) == "yes maybe no" and segment["pieces"][-1]["start"] == segment["end"]
    assert Page(row_card(facts, None, ["one"])).open == []


def test_wrong_labels_are_shown_where_they_are() -> None:
    batch = batch_of(samples()[:1])
    batch.labels[0, 0] = 5  # the second position of the image
    kinds = [piece for segment in facts_of(batch)["segments"] for piece in segment["pieces"] if piece["what"] == "image"]
    assert [piece["trained"] for piece in kinds] == [False, True] and int(batch.kinds[0, 1]) == Kind.IMAGE


def test_pictures_are_exact_when_small_and_shrunk_when_large() -> None:
    for side, kind, shown in ((8, "png", 8), (96, "png", 96), (200, "jpeg", 200), (1000, "jpeg", 512)):
        image = np.zeros((side, side, 3), np.uint8)
        image[..., 0] = 255
        html = picture(image, '"><script>')
        assert "<script>" not in html and ("class=small" in html) == (kind == "png")
        data = re.search(r"base64,([^\"]+)", html)
        assert data is not None and f"data:image/{kind};" in html
        assert Image.open(io.BytesIO(base64.b64decode(data[1]))).size == (shown, shown)


def test_text_is_safe_in_charts_and_templates() -> None:
    assert text("a\"b'c<&\n\ud800") == "a&quot;b&#x27;c&lt;&amp;\\n\\ud800"
    printed = TEMPLATES.from_string('<a title="{{ value }}">{{ value|lines }}{% macro m(x) %}{{ x }}{% endmacro %}{{ m(value) }}').render
    seen = HTML.unescape(printed(value="a\"b'c<&\n\ud800"))
    assert seen == """<a title="a"b'c<&\\n\\ud800">a"b'c<&\n\\ud800a"b'c<&\\n\\ud800"""
    with pytest.raises(UndefinedError):
        printed()
