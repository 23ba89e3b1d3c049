"""Fused encoders against their parts alone and against transformers, and Prismatic's projector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from kempnerforge.checkpoint import model_tensors
from kempnerforge.config import FreezeSpec, load_config
from kempnerforge.config.dump import to_toml
from kempnerforge.config.vision import Dinov2Config, SiglipConfig, ViTConfig
from kempnerforge.contract.cases import copies
from kempnerforge.distributed.world import World
from kempnerforge.model.adapters import build_adapter
from kempnerforge.model.fused import Fused, FusedConfig
from kempnerforge.model.fused_mlp import FusedMLPConfig
from kempnerforge.model.vision import VisionEncoder, build_vision_encoder
from kempnerforge.training.freeze import trainable_names
from tests.model.test_hf_towers import CASES, DINO, images, reference, saved
from tests.training.tiny import CONFIG, call, make_job, tensors
from tests.vlm.tiny import ONE, gradients, install, tiny, tiny_job

SMALL: dict[str, Any] = {"image_size": 24, "patch_size": 8, "dim": 16, "n_layers": 2, "n_heads": 2}
TWO = FusedConfig(parts=[ViTConfig(**SMALL), ViTConfig(**SMALL | {"dim": 8}, feature_layer=-2, mean=[0.1, 0.2, 0.3], std=[0.3, 0.2, 0.1])])


def fused(cfg: FusedConfig) -> Fused:
    torch.manual_seed(0)
    encoder = build_vision_encoder(cfg)
    assert isinstance(encoder, Fused)
    return encoder


def alone(whole: Fused, cfg: FusedConfig) -> list[VisionEncoder]:
    """Each part built by itself, with its weights in the whole."""
    parts = [build_vision_encoder(part) for part in cfg.parts]
    for name, part in zip(cfg.names, parts, strict=True):
        prefix = f"{name}."
        weights = {key.removeprefix(prefix): value for key, value in whole.state_dict().items() if key.startswith(prefix)}
        part.load_state_dict(weights)
    return parts


def test_features_are_those_of_the_parts_side_by_side() -> None:
    whole = fused(TWO)
    assert (whole.num_tokens, whole.dim, whole.image_size, TWO.num_tokens()) == (9, 16 + 8, 24, 9)
    want = torch.cat([part(images(2)) for part in alone(whole, TWO)], dim=-1)
    assert torch.equal(whole(images(2)), want)
    assert whole(images(0)).shape == (0, 9, 24)
    assert {name.split(".")[0] for name, _ in whole.named_parameters()} == {"vit", "vit_2"}
    assert len(whole.units) == 2 + 1


def test_each_part_has_its_own_normalisation() -> None:
    whole = fused(TWO)
    before = whole(images(2))
    whole.parts[1].mean.add_(0.1)
    moved = (whole(images(2)) - before).abs().amax(dim=(0, 1))
    assert not moved[:16].any() and moved[16:].all()
    first, second = whole.parts
    x = images(1) / 255
    assert torch.equal(first.normalise(images(1)), (x - 0.5) / 0.5)
    assert torch.equal(second.normalise(images(1)), (x - second.mean) / second.std)
    assert whole.normalisation == first.normalisation


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[FusedConfig, list[Any]]:
    """A DINOv2 for larger images, with registers, beside a SigLIP: the config, and both in transformers."""
    dino, siglip = tmp_path_factory.mktemp("dino"), tmp_path_factory.mktemp("siglip")
    large: dict[str, Any] = DINO | {"image_size": 40, "num_register_tokens": 2}
    theirs = [saved(lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**large)), dino), saved(CASES["siglip"].model, siglip)]
    parts = [Dinov2Config(path=str(dino), feature_layer=-2, image_size=24), SiglipConfig(path=str(siglip), feature_layer=-2)]
    return FusedConfig(parts=parts), theirs


def test_dinov2_and_siglip_are_those_of_transformers(towers: tuple[FusedConfig, list[Any]]) -> None:
    """At the second-to-last layer, on pixels normalised as each of them was trained."""
    cfg, (dino, siglip) = towers
    whole = fused(cfg)
    x = images(2) / 255
    imagenet = [torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    want = [reference(dino, (x - imagenet[0]) / imagenet[1], -2)[:, 3:], reference(siglip, (x - 0.5) / 0.5, -2)]
    with torch.no_grad():
        got = whole(images(2))
    assert got.shape == (2, 9, 64) and got.std() > 0.1
    torch.testing.assert_close(got, torch.cat(want, dim=-1), rtol=1e-5, atol=1e-5)

    twin = fused(whole.standing_alone(cfg))
    twin.load_state_dict(whole.state_dict())
    assert torch.equal(twin(images(2)), got)
    with torch.device("meta"):
        assert build_vision_encoder(cfg.without_weights())(torch.empty(2, 3, 24, 24, dtype=torch.uint8)).shape == (2, 9, 64)


def test_positions_of_dinov2_are_interpolated_for_another_size(towers: tuple[FusedConfig, list[Any]]) -> None:
    cfg, _ = towers
    (dino, _), own = cfg.parts, build_vision_encoder(replace(cfg.parts[0], image_size=0))
    small = build_vision_encoder(dino)
    assert (own.image_size, own.num_tokens, small.image_size, small.num_tokens) == (40, 25, 24, 9)
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in own.state_dict().items())
    assert small(images(2)).sum().backward() is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    with pytest.raises(ValueError, match=r"image_size = 7: must be at least one patch, 8 pixels"):
        build_vision_encoder(replace(dino, image_size=7))


def test_weights_that_were_read_are_known_part_by_part(towers: tuple[FusedConfig, list[Any]]) -> None:
    cfg = replace(towers[0], parts=[ViTConfig(**SMALL), towers[0].parts[1]])
    loaded = tiny("joint_decoder", vision_encoder=cfg, noise=0).model.loaded
    assert {name.split(".")[1] for name in loaded} == {"siglip"}
    assert {f"vision_encoder.siglip.{name}" for name, _ in fused(cfg).parts[1].named_parameters()} == loaded


def test_a_pattern_freezes_one_part() -> None:
    names = [name for name, _ in tiny("joint_decoder", vision_encoder=TWO).model.named_parameters()]
    job = tiny_job("joint_decoder", vision_encoder=TWO)
    trained = trainable_names(names, [FreezeSpec("vision_encoder.vit_2.*")], job.module_patterns())
    assert {name for name in names if name.startswith("vision_encoder.vit_2.")} == set(names) - trained


def test_recomputation_changes_nothing(world: World) -> None:
    results = []
    for recompute in (False, True):
        it = tiny("joint_decoder", vision_encoder=FusedConfig(parts=[replace(part, image_size=16) for part in TWO.parts]))
        install(it, world, recompute=recompute)
        results.append(gradients(it.model, it.batch(ONE)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], grad) for name, grad in results[1][1].items())
    assert {name.split(".")[1] for name in results[0][1] if name.startswith("vision_encoder.")} == {"vit", "vit_2"}
    assert copies(it.model).keys() == model_tensors(it.model).keys()


# ---- user errors --------------------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit(towers: tuple[FusedConfig, list[Any]]) -> None:
    small = ViTConfig(**SMALL)
    with pytest.raises(ValueError, match=r"parts: has 1 encoders, needs two or more"):
        FusedConfig(parts=[small])
    with pytest.raises(ValueError, match=r"feature_layer = -2: of type 'fused' each of parts has its own"):
        FusedConfig(parts=[small, small], feature_layer=-2)
    with pytest.raises(ValueError, match=r"parts: features of an image must be as many in all of them, not 9 of 'vit' and 36 of 'vit_2'"):
        FusedConfig(parts=[small, replace(small, patch_size=4)])
    dino, siglip = towers[0].parts
    with pytest.raises(ValueError, match=r"parts: features of an image .* not 25 of 'dinov2' and 9 of 'siglip'"):
        build_vision_encoder(FusedConfig(parts=[replace(dino, image_size=0), siglip]))
    with pytest.raises(ValueError, match=r"parts: pixels along the side of an image .* not 25 of 'dinov2' and 24 of 'siglip'"):
        build_vision_encoder(FusedConfig(parts=[replace(dino, image_size=25), siglip]))


FUSED = """[vision_encoder]
type = "fused"
parts = [
    { type = "vit", image_size = 16, patch_size = 8, dim = 16, n_layers = 2, n_heads = 2, feature_layer = -2 },
    { type = "vit", image_size = 16, patch_size = 8, dim = 32, n_layers = 2, n_heads = 2, mean = [0.4, 0.4, 0.4] },
]
"""
JOB = CONFIG.replace(CONFIG[CONFIG.index("[vision_encoder]") : CONFIG.index("[vlm]")], FUSED + '[adapter]\ntype = "fused_mlp"\n\n')


def test_a_job_from_toml_and_back(tmp_path: Path) -> None:
    job = load_config(make_job(tmp_path, config=JOB))
    cfg: Any = job.vision_encoder
    assert isinstance(cfg, FusedConfig) and cfg.names == ["vit", "vit_2"] and cfg.parts[0].feature_layer == -2
    (tmp_path / "again.toml").write_text(to_toml(job), encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == job


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dim = 16,", "dimm = 16,", r"\[vision_encoder\] parts\[0\]\.dimm = 16: unknown key; did you mean 'dim'"),
        ("dim = 16,", "dim = 15,", r"n_heads = 2: must divide dim = 15"),
        ('"vit"', '"vitt"', r"type = 'vitt': Unknown vision_encoder.type"),
        (
            "patch_size = 8",
            "patch_size = 4",
            r"parts: features of an image must be as many in all of them, not 16 of 'vit' and 4 of 'vit_2'",
        ),
    ],
)
def test_errors_name_the_part(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(make_job(tmp_path, config=JOB.replace(old, new, 1)))


def test_a_run_with_one_part_frozen_that_is_asked(tmp_path: Path) -> None:
    freeze = '[[stages]]\nname = "{}"\nsteps = 2\nfreeze = [{{ module = "vision_encoder.vit_2.*", frozen = {} }}]\n'
    job = make_job(tmp_path, config=JOB, extra="\n" + freeze.format("one", "true") + freeze.format("two", "false"))
    ended = call("train", job, "--checkpoint.interval=1", "--checkpoint.keep_last_n=9")
    assert ended.code == 0, ended.err
    one, two, three, four = (tensors(tmp_path / f"run/checkpoints/step-{step:08d}") for step in (1, 2, 3, 4))

    def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
        names = [name for name in after if ".vision_encoder." in name and name.startswith("model.") and name.endswith(".weight")]
        return {name.split(".")[2] for name in names if not torch.equal(before[name], after[name])}

    assert (moved(one, two), moved(three, four)) == ({"vit"}, {"vit", "vit_2"})
    answer = call("generate", tmp_path / "run", tmp_path / "0.png", "--prompt", "what is on the left?")
    assert answer.code == 0, answer.err


# ---- the projector ------------------------------------------------------------------------------------------------------


def test_the_projector_is_prismatics() -> None:
    adapter = build_adapter(FusedMLPConfig(), 6, 10, 5)
    layers = [module for module in adapter.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(6, 24), (24, 10), (10, 10)]
    assert all(layer.bias is not None for layer in layers)
    x: Tensor = torch.randn(2, 5, 6)
    one, two, three = layers
    gelu = nn.functional.gelu
    assert torch.equal(adapter(x), three(gelu(two(gelu(one(x))))))
    assert adapter.num_tokens == 5
