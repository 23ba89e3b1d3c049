"""``kempnerforge contract``: an arch outside of this repository goes through the suite, and the check that it breaks says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist import ROOT
from tests.params import quick
from tests.training.tiny import Ended, spawn

HEAD = """
from dataclasses import dataclass
import torch
from kempnerforge.config import registry
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.vlm.joint_decoder import JointDecoder

@registry.register_vlm_config
@dataclass
class Config(VLMConfig):
    arch: str = "broken"
    scale: float = 0.3

@registry.register_arch("broken")
class Broken(JointDecoder):
"""
FAULTS = {
    "no_image_leaks": """
    def place(self, words, features, batch, cache):
        x, ctx = super().place(words, features, batch, cache)
        if features is None:
            return x, ctx
        rows = batch.image_rows  # words of the same text know the images that come after them
        before = torch.arange(x.shape[1], device=x.device) < batch.image_starts[:, None]
        before &= batch.sample_ids[rows] == batch.image_sample_ids[:, None]
        before &= batch.text_ids[rows] == batch.image_text_ids[:, None]
        seen = before[..., None] * features[batch.image_index].mean(1)[:, None]
        return x.index_add(0, rows, (self.job.vlm.scale * seen).to(x.dtype)), ctx
""",
    "units_cover_every_parameter_once": """
    def shard_units(self):
        yield from list(super().shard_units())[:-1]
""",
}
QUICK = ("units_cover_every_parameter_once", "no_image_leaks", "the_image_matters", "the_loss_is_a_sum_over_targets")


def plugin(folder: Path, fault: str) -> Path:
    (path := folder / "my_arch.py").write_text(HEAD + FAULTS[fault], encoding="utf-8")
    return path


def contract(*argv: object) -> Ended:
    """In a process of its own: pytest inside a test of pytest would share its state."""
    return spawn("contract", *argv, timeout=280)


def test_a_sound_arch_passes(tmp_path: Path) -> None:
    ended = contract(ROOT / "recipes" / "plugin-arch" / "early_fusion.py", "--vlm.stride=4", *(f"--only={name}" for name in QUICK))
    lines = ended.out.splitlines()
    assert ended.code == 0, ended
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", name] for name in QUICK] and lines[-1] == "4 checks ok"


@pytest.mark.parametrize("fault", quick(FAULTS, *list(FAULTS)[::2]))
def test_the_broken_check_fails_and_no_other(fault: str, tmp_path: Path) -> None:
    ended = contract(plugin(tmp_path, fault), "--json", *(f"--only={name}" for name in QUICK))
    found = json.loads(ended.out)
    assert ended.code == 1 and not found["ok"] and set(found["checks"]) == set(QUICK), ended
    assert [name for name, check in found["checks"].items() if check["failures"]] == [fault]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_whole_suite_blames_one_check(fault: str, tmp_path: Path) -> None:
    """From a folder that is no checkout, as with an installed package."""
    command = [sys.executable, "-m", "kempnerforge", "contract", str(plugin(tmp_path, fault))]
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=580, check=False
    )
    failed = [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("FAILED")]
    blamed = [name for name in failed if name != "with_grids"]  # which has the same checks again
    assert (ended.returncode, blamed) == (1, [fault]), ended.stdout + ended.stderr
    assert len(ended.stdout.splitlines()) > 25


def test_a_failure_says_why(tmp_path: Path) -> None:
    ended = contract(plugin(tmp_path, "units_cover_every_parameter_once"), "--only", "units_cover_every_parameter_once")
    failed, total = ended.out.splitlines()
    assert failed.startswith(
        "FAILED  units_cover_every_parameter_once (1 of 1 cases; broken): AssertionError: parameters of layers that no unit"
    ), ended
    assert total == "0 checks ok, 1 failed: units_cover_every_parameter_once"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{}/my_arh.py"], "my_arh.py: no such file; did you mean my_arch.py?"),
        (["no.such.module"], "'no.such.module' cannot be imported"),
        (["{}/empty.py"], "empty.py: registers no arch; @registry.register_arch"),
        (["{}/my_arch.py", "--only=no_image_leak"], "--only no_image_leak: no such check; did you mean no_image_leaks?"),
        (["{}/my_arch.py", "--vlm.scal=1"], "[vlm] scal = 1: unknown key; did you mean 'scale'?"),
        (["{}/my_arch.py", "--vlm.scale=high"], '[vlm] scale = "high": must be a number, not a string'),
        (["{}/my_arch.py", "--model.dim=8"], "--model.dim: only keys of [vlm] can be given"),
    ],
)
def test_bad_input_is_named(argv: list[str], said: str, tmp_path: Path) -> None:
    plugin(tmp_path, "no_image_leaks")
    (tmp_path / "empty.py").write_text("")
    ended = contract(*(word.format(tmp_path) for word in argv))
    assert ended.code == 2 and said in ended.err and not ended.out, ended.err
