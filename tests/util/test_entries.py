"""Entries that are kept on disk: what is not whole, or not what was asked for, is named and counts as absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kempnerforge.util.entries import HEADER, NAMED, Entries

CONTENT = bytes(range(48))


@pytest.fixture
def entries(tmp_path: Path) -> Entries:
    made = Entries(tmp_path / "cache", "data.cache")
    made.write("a", CONTENT)
    made.write("b", CONTENT[::-1])
    return made


def test_what_is_written_is_read(entries: Entries) -> None:
    assert entries.read("a", 12) == CONTENT and entries.read("b", 48) == CONTENT[::-1]
    assert entries.read("c", 12) is None
    assert len([path for path in entries.directory.rglob("*") if path.is_file()]) == 2


DAMAGE = {
    "empty": lambda good, other: b"",
    "half a header": lambda good, other: good[:9],
    "no content": lambda good, other: good[: HEADER.size],
    "cut off": lambda good, other: good[:-1],
    "too long": lambda good, other: good + b"x",
    "a bit of the content": lambda good, other: good[:-5] + bytes([good[-5] ^ 1]) + good[-4:],
    "a bit of the key": lambda good, other: good[:7] + bytes([good[7] ^ 1]) + good[8:],
    "a bit of the checksum": lambda good, other: good[: HEADER.size - 1] + bytes([good[HEADER.size - 1] ^ 1]) + good[HEADER.size :],
    "of another program": lambda good, other: b"npy1" + good[4:],
    "zeros, as after a loss of power": lambda good, other: bytes(len(good)),
    "swapped": lambda good, other: other,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_named_and_made_anew(damage: str, entries: Entries, caplog: pytest.LogCaptureFixture) -> None:
    path = entries.path("a")
    path.write_bytes(DAMAGE[damage](path.read_bytes(), entries.path("b").read_bytes()))
    assert entries.read("a", 12) is None
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"data.cache: {path} is ") and said.endswith("; it is made anew")
    entries.write("a", CONTENT)
    assert entries.read("a", 12) == CONTENT and len(caplog.records) == 1


def test_an_entry_of_another_size_is_that_of_something_else(entries: Entries, caplog: pytest.LogCaptureFixture) -> None:
    assert entries.read("a", 13) is None and "is the entry of something else" in caplog.text


def test_what_is_no_file_is_not_read(entries: Entries, caplog: pytest.LogCaptureFixture) -> None:
    """A pipe without a writer would be waited for."""
    entries.path("a").unlink()
    os.mkfifo(entries.path("a"))
    assert entries.read("a", 12) is None and str(entries.path("a")) in caplog.text
    entries.write("a", CONTENT)
    assert entries.read("a", 12) == CONTENT


def test_of_many_the_first_are_named(entries: Entries, caplog: pytest.LogCaptureFixture) -> None:
    entries.path("a").write_bytes(b"")
    for _ in range(9):
        assert entries.read("a", 12) is None
    assert len(caplog.records) == NAMED and caplog.records[-1].getMessage().endswith("; further ones are not named")
