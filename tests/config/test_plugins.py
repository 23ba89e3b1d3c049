"""A plugin is known by its source: what belongs to it, and what does not."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kempnerforge.config import registry
from kempnerforge.config.plugins import Plugin, load_plugins, plugin_changes, plugin_files, plugins_of, record_plugins

HELPED = "import json\nfrom {base}blocks import size\nsize = size\n"


@pytest.fixture
def forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Modules that were imported from ``tmp_path`` are imported anew after a call."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def again() -> None:
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "") or "").startswith(str(tmp_path)):
                del sys.modules[name]

    yield again
    again()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def loaded(name: str, folder: Path) -> Plugin:
    (full,) = load_plugins([name], folder, "test")
    (plugin,) = plugins_of([full])
    return plugin


def test_one_source_is_one_plugin_by_every_name(tmp_path: Path, forget: Callable[[], None]) -> None:
    text = "value = 1\n"
    shas = {loaded(name, tmp_path).sha256 for name in ("one_a.py", "one_b.py", "one_c") if write(tmp_path / f"{name[:5]}.py", text)}
    assert len(shas) == 1
    write(tmp_path / "one_a.py", "value = 2\n")  # of the same size, in the same second
    assert loaded("one_a.py", tmp_path).sha256 not in shas
    write(tmp_path / "one_a.py", text)
    assert {loaded("one_a.py", tmp_path).sha256} == shas


@pytest.mark.parametrize(
    ("plugin", "changed", "counts"),
    [
        ("lab.py", "blocks.py", True),  # a file that imports one beside it
        ("lab.py", "more/deep.py", False),  # that nothing imports
        ("pkg_a.arch", "pkg_a/blocks.py", True),  # of its package
        ("pkg_a.arch", "pkg_a/other.py", False),
        ("pkg_a.arch", "pkg_a/parts/late.py", True),  # through a function of another module of the package
        ("pkg_b", "pkg_b/parts/any.py", True),  # a package is all that lies in it
        ("pkg_a.parts", "pkg_a/blocks.py", True),  # and what it imports of the package around it
        ("pkg_a.parts", "pkg_a/other.py", False),
        ("pkg_b", "lab.py", True),  # or of the modules beside it
        ("pkg_b", "blocks.py", True),
        ("pkg_b", "more/deep.py", False),
    ],
)
def test_what_it_imports_of_its_own_counts(plugin: str, changed: str, counts: bool, tmp_path: Path, forget: Callable[[], None]) -> None:
    write(tmp_path / "lab.py", HELPED.replace("{base}", ""))
    write(tmp_path / "pkg_a" / "__init__.py", "")
    write(tmp_path / "pkg_a" / "arch.py", HELPED.replace("{base}", "."))
    write(tmp_path / "pkg_a" / "parts" / "__init__.py", "from . import inner\n")
    write(tmp_path / "pkg_a" / "parts" / "inner.py", "from ..blocks import size\n")
    write(tmp_path / "pkg_b" / "__init__.py", "from . import arch\n")
    write(tmp_path / "pkg_b" / "arch.py", "import lab\n")
    blocks = "size = 1\ndef late():\n    from .parts import late\n"
    for file in ("blocks.py", "more/deep.py", "pkg_a/blocks.py", "pkg_a/other.py", "pkg_a/parts/late.py", "pkg_b/parts/any.py"):
        write(tmp_path / file, blocks if file == "pkg_a/blocks.py" else "size = 1\n")
    if plugin == "pkg_a.arch":
        __import__("pkg_a.parts.late")
    before = loaded(plugin, tmp_path).sha256
    forget()
    write(tmp_path / changed, (tmp_path / changed).read_text() + "# changed\n")
    if plugin == "pkg_a.arch":
        __import__("pkg_a.parts.late")
    assert (loaded(plugin, tmp_path).sha256 != before) == counts


def test_installed_plugins_count(tmp_path: Path, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "announced.py", "value = 1\n")
    entry = importlib.metadata.EntryPoint("lab", "announced", "kempnerforge.plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [entry])
    monkeypatch.setattr("kempnerforge.config.plugins._plugins", {})
    load_plugins([], tmp_path, "test")
    (plugin,) = plugins_of([])
    assert plugin.name == "entry point lab" and plugin.source == {"announced.py": b"value = 1\n"}


def test_a_plugin_that_was_edited_takes_the_place_of_what_it_was(tmp_path: Path, forget: Callable[[], None]) -> None:
    text = (
        "from kempnerforge.config import registry\nfrom kempnerforge.model.adapters import Adapter\n@registry.register_adapter('edited')\n"
    )
    text += "class A(Adapter):\n    sign = +1\n    def forward(self, features): ...\n"
    try:
        for sign in ("+1", "-1", "+1"):
            write(tmp_path / "edited.py", text.replace("+1", sign))
            loaded("edited.py", tmp_path)
            assert vars(registry.adapters.get("edited"))["sign"] == int(sign)
    finally:
        registry.forget(registry.adapters.get("edited").__module__)
    assert "edited" not in registry.adapters


def test_differences(tmp_path: Path) -> None:
    a, b = Plugin("lab/a.py", {"a.py": b"x = 1\ny = 2\n"}), Plugin("lab/b.py", {"b.py": b"z = 3\n"})
    for name, content in plugin_files([a, b]).items():
        write(tmp_path / name, content.decode())
    now = Plugin("new/a.py", {"a.py": b"x = 1\ny = -2\n"})
    assert plugin_changes(record_plugins([a, b]), [b, a], tmp_path) == []
    (line,) = plugin_changes(record_plugins([a, b]), [now, b], tmp_path)
    assert line.startswith(f"plugins: 'lab/a.py' -> 'new/a.py': its source changed, {a.sha256[:8]} -> {now.sha256[:8]}")
    assert [part.strip() for part in line.splitlines()[-2:]] == ["-y = 2", "+y = -2"]
    assert plugin_changes(record_plugins([a, b]), [b], tmp_path) == [f"plugins: 'lab/a.py' ({a.sha256[:8]}) -> unset"]
    assert plugin_changes(record_plugins([b]), [b, a], tmp_path) == [f"plugins: unset -> 'lab/a.py' ({a.sha256[:8]})"]
    long = Plugin("a.py", {"a.py": b"q\n" * 200})
    assert len(plugin_changes(record_plugins([a]), [long], tmp_path)[0].splitlines()) == 32
    assert plugin_files([Plugin("a.py", {"a.py": b"x" * 300_000})]) == {}, "too large to keep"
