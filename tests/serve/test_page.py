"""The page: one document, held to its own script by its policy, in step with what the server says."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kempnerforge.serve.document import PARTS, document
from tests.dist import ROOT
from tests.serve.fake import Fake, Said, serving
from tests.serve.test_web import get

VOID = {"meta", "link", "input", "br", "img"}


class Tree(HTMLParser):
    """Ids, and whether every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inline += [name for name, _ in attrs if name.startswith("on") or name == "style"]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole() -> None:
    tree = Tree()
    tree.feed(document()[0].decode())
    assert tree.open == [] and tree.inline == [], "the policy would not let inline handlers run"
    assert len(set(tree.ids)) == len(tree.ids)
    wanted = set(re.findall(r'\bat\("(\w+)"\)', (PARTS / "script.js").read_text()))
    assert wanted <= set(tree.ids), "what the script looks for is there"


def test_the_page_loads_nothing() -> None:
    page = document()[0].decode()
    outside = [url for url in re.findall(r"https?://[^\s\"'<>)]+", page) if url != "http://www.w3.org/2000/svg"]
    assert outside == [] and "{{" not in page


def test_text_is_never_markup() -> None:
    script = (PARTS / "script.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|setAttribute\(\"on", script)


def test_headers() -> None:
    with serving(Fake(lambda prompt: Said([]))) as server:
        status, headers, body = get(server, "/")
        assert status == 200 and body == document()[0]
        again = get(server, "/?x=1")
        assert again[0] == 200 and get(server, "/api/model")[1]["x-content-type-options"] == "nosniff"
    assert headers["content-type"] == "text/html; charset=utf-8" and headers["x-frame-options"] == "DENY"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", body.decode(), re.DOTALL)
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


@pytest.mark.parametrize("name", ["index.html", "style.css", "script.js"])
def test_the_parts_are_installed(name: str) -> None:
    assert (PARTS / name).is_file()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert any(Path("page", name).match(pattern) for pattern in data["kempnerforge.serve"])
