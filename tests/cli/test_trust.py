"""Code that somebody's run, checkpoint or export names runs only when the command says so."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from kempnerforge import load_pretrained
from kempnerforge.checkpoint import resolve
from kempnerforge.util.errors import InputError
from tests.checkpoint.helpers import reseal
from tests.cli.conftest import Trained
from tests.training.tiny import call


@pytest.fixture
def theirs(trained: Trained, tmp_path: Path) -> Path:
    """A run and an export that name ``evil.py``, with checksums that are right. It leaves a file ``ran``."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n# {tmp_path.name}\n")
    shutil.copytree(trained.run, run := tmp_path / "run")
    assert call("export", run, tmp_path / "export", "--format=kempnerforge").code == 0
    checkpoint = resolve(run)
    for config in (run / "config.toml", checkpoint / "config.toml", tmp_path / "export" / "config.toml"):
        text = config.read_text()
        assert "plugins = []\n" in text
        config.write_text(text.replace("plugins = []", f"plugins = [{str(tmp_path / 'evil.py')!r}]"))
    config.write_text(config.read_text().partition("\n")[2])  # what tells that it is a record
    reseal(checkpoint)
    return tmp_path


COMMANDS = {
    "generate": ("generate", "{run}", "{image}", "--prompt=what?"),
    "eval": ("eval", "{run}"),
    "report": ("report", "{run}", "--pdf={folder}/out"),
    "export": ("export", "{run}", "{folder}/out"),
    "chat": ("chat", "{run}", "{image}"),
    "serve": ("serve", "{run}"),
    "check": ("check", "{run}/config.toml"),
    "inspect": ("inspect", "{run}/config.toml"),
    "data check": ("data", "check", "{run}/config.toml"),
    "print": ("train", "{run}/config.toml", "--print-config"),
    "train": ("train", "{run}/config.toml"),
    "extends": ("check", "{folder}/mine.toml"),
    "a copy without its first line": ("check", "{folder}/export/config.toml"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_plugins_of_others_do_not_run(name: str, theirs: Path, trained: Trained) -> None:
    (theirs / "mine.toml").write_text('extends = "run/config.toml"\n')
    words = {"{run}": str(theirs / "run"), "{folder}": str(theirs), "{image}": str(trained.folder / "0.png")}
    argv = list(COMMANDS[name])
    for key, value in words.items():
        argv = [word.replace(key, value) for word in argv]
    ended = call(*argv)
    assert ended.code == 2 and not (theirs / "ran").exists(), ended
    digest = hashlib.sha256((theirs / "evil.py").read_bytes()).hexdigest()
    assert f"'{theirs}/evil.py' (SHA-256 {digest})" in ended.err and "--trust-plugins runs it" in ended.err
    assert not (theirs / "out").exists()


def test_what_is_trusted_runs(theirs: Path, trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    argv = ("generate", theirs / "run", trained.folder / "0.png", "--prompt=what?", "--max-new-tokens=2")
    (theirs / "good.py").write_text("")
    assert call(*argv, f"--plugins={theirs}/good.py").code == 0 and not (theirs / "ran").exists(), "that of the command, in its place"
    for path in ("run", "export"):
        with pytest.raises(InputError, match="trust_plugins=True"):
            load_pretrained(theirs / path)
    assert call(*argv, "--trust-plugins").code == 0 and (theirs / "ran").exists()
    assert f"trusted, and run: '{theirs}/evil.py' (SHA-256 " in caplog.text
    assert call(*argv).code == 0, "what this process has run already does not run again"


def test_a_module_that_a_run_names_is_not_imported(theirs: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    (theirs / "evil_module.py").write_text((theirs / "evil.py").read_text())
    monkeypatch.syspath_prepend(theirs)
    config = theirs / "export" / "config.toml"
    config.write_text(config.read_text().replace(f"{theirs}/evil.py", "evil_module"))
    ended = call("check", config)
    assert ended.code == 2 and "'evil_module' (a module)" in ended.err and not (theirs / "ran").exists()


def test_a_plugin_of_the_own_config_runs(theirs: Path, trained: Trained) -> None:
    job = trained.folder / "own.toml"
    job.write_text(f'plugins = ["{theirs}/evil.py"]\n{trained.job.read_text()}')
    assert call("train", job, "--print-config").code == 0 and (theirs / "ran").exists()
