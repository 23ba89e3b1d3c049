from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.checkpoint import CheckpointError, Manifest
from kempnerforge.checkpoint.manifest import FileEntry

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4), st.integers(0, 10**12))
def test_manifest_round_trip(state: dict, step: int) -> None:
    manifest = Manifest(1, step, 2, "2.13", state, {"a/b": FileEntry(3, 4)})
    assert Manifest.decode(manifest.encode()) == manifest


MANIFEST = Manifest(1, 30, 2, "2.13.0", {"stage": "a", "loss": 0.25}, {".metadata": FileEntry(3, 4)}).encode()


@settings(max_examples=300)
@given(st.integers(0, len(MANIFEST) - 1), st.integers(0, 255))
def test_a_changed_byte_of_the_manifest_is_seen_or_means_nothing(position: int, byte: int) -> None:
    data = bytearray(MANIFEST)
    data[position] = byte
    try:
        found = Manifest.decode(bytes(data))
    except CheckpointError:
        return
    assert found == Manifest.decode(MANIFEST)


@given(st.binary(max_size=60))
def test_any_bytes_as_manifest(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        Manifest.decode(data)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", "..\\x"])
def test_manifest_names_stay_inside(name: str) -> None:
    data = Manifest(1, 1, 1, "2", {}, {name: FileEntry(1, 1)}).encode()
    with pytest.raises(CheckpointError, match="must be relative and stay inside"):
        Manifest.decode(data)
