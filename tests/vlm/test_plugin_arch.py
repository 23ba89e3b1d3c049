"""The example plugin in ``recipes/plugin-arch`` works as its README says, and the package does not know it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kempnerforge.config import ConfigError, VLMConfig, load_config, registry
from kempnerforge.config.vision import SiglipConfig
from tests.dist import ROOT
from tests.training.tiny import CONFIG, call, losses, make_job, spawn
from tests.vlm.tiny import ONE, SIZE, tiny, tiny_job

RECIPE = ROOT / "recipes" / "plugin-arch"
PLUGIN = RECIPE / "early_fusion.py"


def tiny_config(**fields: object) -> str:
    lines = "".join(f"{key} = {value}\n" for key, value in {"patch_size": 8, **fields}.items())
    return f'plugins = ["{PLUGIN}"]\n' + CONFIG.replace('arch = "joint_decoder"\n', f'arch = "early_fusion"\n{lines}')


def test_it_trains_in_a_process_that_has_only_the_toml(tmp_path: Path) -> None:
    job = make_job(tmp_path, config=tiny_config())
    ended = spawn("train", job, "--train.max_steps=2")
    assert ended.code == 0, ended.err
    assert len(losses(tmp_path / "run")) == 2
    asked = call("generate", tmp_path / "run", tmp_path / "0.png", "--prompt", "what is on the left?", "--max-new-tokens", "2")
    assert asked.code == 0, asked.err


def test_its_toml_is_the_quickstart_with_another_arch() -> None:
    job, quickstart = load_config(RECIPE / "quickstart.toml"), load_config(ROOT / "configs" / "quickstart.toml")
    assert job.vlm is not None and job.vlm.arch == "early_fusion"
    assert (job.model, job.data, job.train) == (quickstart.model, quickstart.data, quickstart.train)
    assert [(s.name, s.steps, s.data, s.train) for s in job.resolved_stages()] == [
        (s.name, s.steps, s.data, s.train) for s in quickstart.resolved_stages()
    ]
    assert job.image_tokens() == 64, "of its own patches, whatever [vision_encoder] and [adapter] would give"


def test_nothing_in_the_package_names_it() -> None:
    files = [*(ROOT / "kempnerforge").rglob("*.py"), *(ROOT / "configs").rglob("*.toml"), ROOT / "pyproject.toml"]
    assert len(files) > 50
    assert [str(path) for path in files if "early_fusion" in path.read_text(encoding="utf-8")] == []


def test_the_contract_suite_has_it() -> None:
    from tests.vlm import test_contract

    assert "early_fusion" in test_contract.ARCHS
    module = registry.archs.get("early_fusion").__module__
    assert not module.startswith("kempnerforge."), module


@pytest.mark.parametrize(("patch_size", "stride"), [(8, 0), (8, 4), (4, 2)])
def test_patches_are_a_convolution(patch_size: int, stride: int) -> None:
    """Cutting and one linear layer together are what the first layer of a ViT does (Dosovitskiy et al. 2021, eq. 1)."""
    vlm = VLMConfig.for_arch("early_fusion", max_text_len=20, patch_size=patch_size, stride=stride)
    it = tiny("early_fusion", vlm=vlm)
    step = stride or patch_size
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    proj = it.model.adapter.get_submodule("proj")
    weight, bias = (p.detach() for p in proj.parameters())
    kernel = weight.view(-1, 3, patch_size, patch_size)
    want = F.conv2d((images / 255 - 0.5) / 0.5, kernel, bias, step, (patch_size - step) // 2)  # (N, D, G, G)
    torch.testing.assert_close(it.model.encode(images), want.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert it.model.num_image_tokens == (SIZE // step) ** 2 == it.job.image_tokens()
    assert it.batch(ONE).kinds.eq(1).sum() == it.model.num_image_tokens


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--vlm.patch_size=0", ["patch_size = 0", ">= 1"]),
        ("--vlm.stride=3", ["stride = 3", "even"]),
        ("--vlm.patch_size=6", ["patch_size = 6", "image_size = 16"]),
        ("--vlm.patch_size=1", ["max_text_len = 48", "256 image tokens"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, words: list[str]) -> None:
    job = make_job(tmp_path, config=tiny_config())
    with pytest.raises(ConfigError) as error:
        load_config(job, [override])
    assert all(word in str(error.value) for word in words), error.value


def test_another_encoder_is_refused() -> None:
    job = replace(tiny_job("early_fusion"), vision_encoder=SiglipConfig(path="unread"))
    with pytest.raises(ConfigError, match="has no encoder like 'siglip'") as error:
        job.validate()
    assert len(error.value.problems) == 1


def test_there_is_no_encoder_to_freeze() -> None:
    it = tiny("early_fusion")
    assert set(it.patterns) == {"transformer", "adapter"}
    assert not list(it.model.vision_encoder.parameters())
