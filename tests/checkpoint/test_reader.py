from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties

from kempnerforge.checkpoint import CheckpointError, load, save, tensor_info, verify
from tests.checkpoint.helpers import blank, reseal, some_tensors


def test_load_into_parameters(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"w": torch.ones(3)}, {}, {}, keep=1)
    w = torch.nn.Parameter(torch.zeros(3))
    load(path, {"w": w})
    assert w.tolist() == [1, 1, 1] and w.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.w"), "1 tensors of the checkpoint are not asked for: model.w"),
        (
            lambda t: t.update({f"model.x{i}": torch.zeros(1) for i in range(6)}),
            r"6 tensors are not in the checkpoint: model.x0, .* and 2 more",
        ),
        (lambda t: t.update({"model.w": torch.zeros(40, 30)}), r"another shape in the checkpoint: model.w is \(30, 40\), not \(40, 30\)"),
        (lambda t: t.update({"model.w": torch.zeros(30, 40).half()}), "another dtype .*: model.w is torch.float32, not torch.float16"),
    ],
)
def test_load_is_strict(tmp_path: Path, change, message: str) -> None:
    path = save(tmp_path, 1, some_tensors(), {}, {}, keep=1)
    wanted = blank(some_tensors())
    change(wanted)
    with pytest.raises(CheckpointError, match=message):
        load(path, wanted)
    assert all((t == 77).all() or key.startswith("model.x") or key == "model.w" for key, t in wanted.items())


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("where", ["alone", "inside"])
def test_a_pickle_that_runs_code_does_not(tmp_path: Path, where: str) -> None:
    path = save(tmp_path, 1, some_tensors(), {}, {}, keep=1)
    payload: object = Evil(tmp_path / "owned")
    if where == "inside":
        metadata = pickle.loads((path / ".metadata").read_bytes())
        metadata.planner_data = payload
        payload = metadata
    (path / ".metadata").write_bytes(pickle.dumps(payload))
    reseal(path)
    verify(path)
    for attempt in (lambda: tensor_info(path), lambda: load(path, blank(some_tensors()))):
        with pytest.raises(CheckpointError, match=r"refusing to unpickle \w+.system"):
            attempt()
    assert not (tmp_path / "owned").exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert (tmp_path / "owned").exists(), "the attack itself does not work, so this test shows nothing"


@pytest.mark.parametrize("name", ["torch.hub", "torch.serialization", "torch.distributed.checkpoint.metadata"])
def test_modules_of_allowed_classes_are_not_open(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1, some_tensors(), {}, {}, keep=1)
    (path / ".metadata").write_bytes(f"c{name}\nload\n.".encode())
    with pytest.raises(CheckpointError, match="refusing to unpickle"):
        tensor_info(path)


def test_enums_as_python_3_11_0_to_3_11_3_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a member of an enum is ``getattr(cls, name)`` in a pickle; so it is in what they save, and in what is read there."""
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    path = save(tmp_path, 1, some_tensors(), {}, {}, keep=1)
    assert b"getattr" in (path / ".metadata").read_bytes()
    found = blank(some_tensors())
    load(path, found)
    assert all(torch.equal(found[key], value) for key, value in some_tensors().items())


@pytest.mark.parametrize(("holder", "name"), [(TensorProperties, "create_from_tensor"), (_MEM_FORMAT_ENCODING, "__subclasses__")])
def test_getattr_reaches_enum_members_alone(holder: type, name: str, tmp_path: Path) -> None:
    class Reach:
        def __reduce__(self):
            return (getattr, (holder, name))

    path = save(tmp_path, 1, some_tensors(), {}, {}, keep=1)
    (path / ".metadata").write_bytes(pickle.dumps(Reach()))
    with pytest.raises(CheckpointError, match=r"refusing to unpickle builtins\.getattr"):
        tensor_info(path)


@pytest.mark.parametrize("data", [b"", b"\x80", b"garbage", pickle.dumps(5)[:-1], b"N."])
def test_damaged_metadata(tmp_path: Path, data: bytes) -> None:
    path = save(tmp_path, 1, some_tensors(), {}, {}, keep=1)
    (path / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=".metadata (is damaged|does not describe)"):
        tensor_info(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pickled_entries_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"w": torch.zeros(2)}, {}, {}, keep=1)
    for file in (path / ".metadata", path / "__0_0.distcp"):
        file.unlink()
    dcp.save({"w": torch.zeros(2), "extra": {"lr": 0.1, "evil": Evil(tmp_path / "owned")}}, checkpoint_id=path)
    reseal(path)
    with pytest.raises(CheckpointError, match="pickled entries, which are refused: extra"):
        load(path, {"w": torch.zeros(2)})
    assert not (tmp_path / "owned").exists()


def test_metadata_that_points_outside(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"w": torch.zeros(2)}, {}, {}, keep=1)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../other/__0_0.distcp"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="points outside the checkpoint"):
        load(path, {"w": torch.zeros(2)})
