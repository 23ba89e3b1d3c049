"""What a failure inside of somebody's code is told as: never as an error of the user's input, and never without the place."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from kempnerforge.cli.main import _output_is_closed
from tests.training.tiny import CONFIG, call, environment, make_job

PLUGIN = """\
import errno, os
from dataclasses import dataclass

import torch

from kempnerforge.config import registry
from kempnerforge.util.errors import InputError
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.vlm.joint_decoder import JointDecoder


@registry.register_vlm_config
@dataclass
class FailingConfig(VLMConfig):
    arch: str = "failing"


@registry.register_arch("failing")
class Failing(JointDecoder):
    def place(self, words, features, batch, cache):
        exec(os.environ["FAILURE"])
        return super().place(words, features, batch, cache)
"""

DEFECTS = {
    "open('/none/table.txt')": FileNotFoundError,
    "torch.load('/none/table.pt')": FileNotFoundError,
    "os.mkdir('/')": FileExistsError,
    "raise PermissionError('mine alone')": PermissionError,
    "raise OSError('no such mode')": OSError,
    "first, second = [0]": ValueError,
    "raise RuntimeError('a gloomy word: gloo')": RuntimeError,
    "raise NotImplementedError": NotImplementedError,
}
TRANSIENT = {
    "raise OSError(errno.ENOSPC, 'No space left on device')": "No space left",
    "raise OSError(errno.EIO, 'Input/output error', '/mnt/a')": "/mnt/a",
    "raise ConnectionResetError(errno.ECONNRESET, 'reset')": "reset",
    "raise BrokenPipeError(errno.EPIPE, 'Broken pipe')": "Broken pipe",
    "raise TimeoutError('the store is slow')": "the store is slow",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failing")
    (folder / "failing.py").write_text(PLUGIN)
    return make_job(folder, config='plugins = ["failing.py"]\n' + CONFIG.replace("joint_decoder", "failing"))


@pytest.fixture
def fails(job: Path, tmp_path: Path) -> list[object]:
    return ["train", job, f"--run.dir={tmp_path / 'run'}", "--train.max_steps=1", "--eval.at_end=false"]


@pytest.mark.parametrize("failure", DEFECTS)
def test_a_defect_of_an_arch_keeps_its_traceback(failure: str, fails: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILURE", failure)
    with pytest.raises(DEFECTS[failure]) as raised:
        call(*fails)
    assert any(Path(frame.filename).name == "failing.py" for frame in traceback.extract_tb(raised.tb))


@pytest.mark.parametrize("failure", TRANSIENT)
def test_what_may_be_gone_at_the_next_try_is_exit_code_3(failure: str, fails: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILURE", failure)
    ended = call(*fails)
    assert ended.code == 3 and ended.err.splitlines()[-1].startswith("stopped: ") and TRANSIENT[failure] in ended.err, ended


def test_an_arch_may_say_that_the_input_is_wrong(fails: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILURE", "raise InputError('vlm.depth = 3: too deep')")
    ended = call(*fails)
    assert ended.code == 2 and ended.err.splitlines()[-1] == "error: vlm.depth = 3: too deep"


def test_a_closed_output_is_no_failure() -> None:
    assert not _output_is_closed()
    read, write = os.pipe()
    os.close(read)
    program = "import os, sys; from kempnerforge.cli import main; main.command('check').run = lambda _: print('x' * 9, flush=True) or 0;"
    program += "sys.argv[1:] = ['check', 'job.toml']; main.main()"
    ended = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, env=environment(), timeout=60)
    os.close(write)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
