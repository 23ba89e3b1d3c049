"""The public names of ``kempnerforge.config.vlm``: fields, defaults, methods, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import kempnerforge.config
from kempnerforge.config import JobConfig, RunConfig, TrainConfig, load_config, registry
from kempnerforge.config.vlm import (
    DEFAULT_MODULE_PATTERNS,
    CrossAttentionConfig,
    FreezeSpec,
    FreezeStage,
    JointDecoderConfig,
    MoMaConfig,
    MoTConfig,
    VLMConfig,
)
from kempnerforge.util.errors import InputError

BASE = {"max_text_len": 512, "freeze": [FreezeSpec("vision_encoder", True)], "freeze_schedule": []}
CASES = [
    (JointDecoderConfig, "joint_decoder", {}, []),
    (
        CrossAttentionConfig,
        "cross_attention",
        {"cross_attention_every_n_layers": 4, "cross_attention_n_heads": 0, "cross_attention_n_kv_heads": 0},
        ["cross_attention"],
    ),
    (
        MoTConfig,
        "mot",
        {
            "mot_modalities": ("image", "text"),
            "mot_image_n_heads": 0,
            "mot_image_n_kv_heads": 0,
            "mot_warm_start_from_text": False,
            "mot_warm_start_path": "",
        },
        ["mot"],
    ),
    (
        MoMaConfig,
        "moma",
        {"image_experts": 2, "text_experts": 2, "capacity_factor": 1.0, "router_loss_weight": 0.01},
        ["experts", "routers"],
    ),
]


@pytest.mark.parametrize(("cls", "arch", "own", "aliases"), CASES)
def test_fields_and_defaults(cls: type[VLMConfig], arch: str, own: dict[str, object], aliases: list[str]) -> None:
    cfg = cls()
    assert cfg.arch == arch
    for name, default in (BASE | own).items():
        assert getattr(cfg, name) == default, name
    assert set(cfg.module_patterns) == {"transformer", "vision_encoder", "adapter", *aliases}


@pytest.mark.parametrize(("cls", "arch", "own", "aliases"), CASES)
def test_positional_order(cls: type[VLMConfig], arch: str, own: dict[str, object], aliases: list[str]) -> None:
    names = [f.name for f in dataclasses.fields(cls) if not f.kw_only]
    assert names == ["arch", "max_text_len", "freeze", "freeze_schedule", "module_patterns", *own]
    spec = FreezeSpec("adapter", True)
    cfg = cls(arch, 77, [spec], [], {"mine": ["x.*"]}, *own.values())
    assert (cfg.max_text_len, cfg.freeze, cfg.module_patterns["mine"]) == (77, [spec], ["x.*"])


@pytest.mark.parametrize(("cls", "arch", "own", "aliases"), CASES)
def test_for_arch(cls: type[VLMConfig], arch: str, own: dict[str, object], aliases: list[str]) -> None:
    cfg = VLMConfig.for_arch(arch, max_text_len=2048, **own)
    assert type(cfg) is cls
    assert cfg == cls(max_text_len=2048, **own)
    assert registry.vlm_configs.get(arch) is cls


def test_for_arch_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"Unknown vlm.arch; registered: .*joint_decoder.*did you mean 'mot'"):
        VLMConfig.for_arch("mott")
    monkeypatch.setattr("kempnerforge.config.vlm._RESERVED_ARCHS", frozenset({"planned"}))
    with pytest.raises(NotImplementedError, match="'planned': reserved"):
        VLMConfig.for_arch("planned")
    with pytest.raises(NotImplementedError, match="'planned': reserved"):
        VLMConfig(arch="planned")
    with pytest.raises(TypeError, match="cross_attention_n_heads"):
        VLMConfig.for_arch("mot", cross_attention_n_heads=2)


def test_base_class_stands_for_the_default_arch_alone() -> None:
    assert VLMConfig().arch == "joint_decoder"
    assert VLMConfig(arch="joint_decoder") == VLMConfig()
    for arch in ("mot", "cross_attention"):
        with pytest.raises(ValueError, match="for_arch"):
            VLMConfig(arch=arch)
    with pytest.raises(ValueError, match="MoTConfig"):
        JointDecoderConfig(arch="mot")
    with pytest.raises(ValueError, match="JointDecoderConfig"):
        MoTConfig(arch="joint_decoder")
    with pytest.raises(ValueError, match="nonsense"):
        VLMConfig(arch="nonsense")


@pytest.fixture
def house() -> Iterator[type[VLMConfig]]:
    @registry.register_vlm_config
    @dataclasses.dataclass
    class HouseConfig(VLMConfig):
        arch: str = "house"

        def residual_stream_image_tokens(self, num_tokens: int) -> int:
            return num_tokens + 2

    yield HouseConfig
    del registry.vlm_configs._entries["house"]


def test_base_class_never_passes_for_another_arch_even_with_equal_fields(house: type[VLMConfig]) -> None:
    assert VLMConfig.for_arch("house").residual_stream_image_tokens(5) == 7
    with pytest.raises(ValueError, match="HouseConfig"):
        VLMConfig(arch="house")


def test_image_tokens_in_the_stream() -> None:
    assert [cls().residual_stream_image_tokens(256) for cls, *_ in CASES] == [256, 0, 256, 256]


@pytest.mark.parametrize(
    ("own", "n_heads", "expected"),
    [((0, 0), 12, (12, 12)), ((8, 0), 12, (8, 8)), ((0, 4), 12, (12, 4)), ((8, 2), 12, (8, 2))],
)
def test_resolved_heads(own: tuple[int, int], n_heads: int, expected: tuple[int, int]) -> None:
    cfg = CrossAttentionConfig(cross_attention_n_heads=own[0], cross_attention_n_kv_heads=own[1])
    assert cfg.resolved_heads(n_heads) == expected


def test_resolved_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="cross_attention_n_kv_heads = 5.*12"):
        CrossAttentionConfig(cross_attention_n_kv_heads=5).resolved_heads(12)


@pytest.mark.parametrize(
    ("own", "text", "expected"),
    [
        ((0, 0), (12, 0), (12, 12)),
        ((0, 0), (12, 4), (12, 4)),
        ((8, 0), (12, 4), (8, 4)),
        ((8, 2), (12, 4), (8, 2)),
        ((8, 0), (12, 0), (8, 8)),
    ],
)
def test_resolved_image_heads(own: tuple[int, int], text: tuple[int, int], expected: tuple[int, int]) -> None:
    assert MoTConfig(mot_image_n_heads=own[0], mot_image_n_kv_heads=own[1]).resolved_image_heads(*text) == expected


def test_resolved_image_heads_needs_no_kv_heads() -> None:
    assert MoTConfig().resolved_image_heads(6) == (6, 6)


@pytest.mark.parametrize(
    ("arch", "values", "message"),
    [
        ("joint_decoder", {"max_text_len": 0}, "max_text_len = 0: must be >= 2"),
        ("joint_decoder", {"max_text_len": 1}, "max_text_len = 1: must be >= 2, room for a token and the one that ends the text"),
        ("joint_decoder", {"attention_mask": "full"}, "attention_mask = 'full': allowed are"),
        ("joint_decoder", {"freeze_schedule": [FreezeStage(5, ()), FreezeStage(5, ())]}, "strictly monotonic"),
        ("joint_decoder", {"freeze_schedule": [FreezeStage(5, ()), FreezeStage(2, ())]}, "strictly monotonic"),
        ("cross_attention", {"cross_attention_every_n_layers": 0}, "cross_attention_every_n_layers = 0"),
        ("cross_attention", {"cross_attention_n_heads": -1}, "cross_attention_n_heads = -1: .*non-negative"),
        ("mot", {"mot_image_n_kv_heads": -1}, "mot_image_n_kv_heads = -1: .*non-negative"),
        ("cross_attention", {"cross_attention_n_heads": 6, "cross_attention_n_kv_heads": 4}, "must divide"),
        ("cross_attention", {"attention_mask": "image_bidirectional"}, "no image tokens in the stream"),
        ("cross_attention", {"attention_mask": "image_sees_prompt"}, "no image tokens in the stream"),
        ("mot", {"mot_modalities": ("text",)}, "at least 2 entries"),
        ("mot", {"mot_modalities": ("text", "audio")}, "must include 'image'"),
        ("mot", {"mot_modalities": ("image", "audio")}, "must include 'text'"),
        ("mot", {"mot_modalities": ("image", "text", "text")}, "duplicates"),
        ("mot", {"mot_image_n_heads": 6, "mot_image_n_kv_heads": 4}, "must divide"),
    ],
)
def test_bad_values(arch: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig.for_arch(arch, **values)


def test_freeze_specs_are_frozen_and_hashable() -> None:
    spec = FreezeSpec("mot", True)
    assert (spec.module, spec.frozen) == ("mot", True)
    assert FreezeSpec(module="mot") == spec
    stage = FreezeStage(start_step=3, specs=(spec,))
    assert hash(stage) == hash(FreezeStage(3, (FreezeSpec("mot"),)))
    for value, name in ((spec, "frozen"), (stage, "start_step")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 0)
    with pytest.raises(ValueError, match="module"):
        FreezeSpec("")
    with pytest.raises(ValueError, match="start_step = -1"):
        FreezeStage(-1, ())


def test_aliases_of_the_arch_stay_when_others_are_added() -> None:
    cfg = MoTConfig(module_patterns={"head": ["*.head.*"], "adapter": ["adapter.proj.*"]})
    assert cfg.module_patterns == MoTConfig().module_patterns | {"head": ["*.head.*"], "adapter": ["adapter.proj.*"]}


def test_configs_share_no_mutable_default() -> None:
    first, second = MoTConfig(), MoTConfig()
    first.module_patterns["transformer"].append("x")
    first.freeze.append(FreezeSpec("adapter"))
    assert second == MoTConfig()
    assert DEFAULT_MODULE_PATTERNS["transformer"] == ["transformer", "transformer.*"]
    assert DEFAULT_MODULE_PATTERNS.keys() == {"transformer", "vision_encoder", "adapter"}


@pytest.mark.parametrize("name", registry.list_vlm_configs())
def test_aliases_match_a_module_by_its_own_name(name: str) -> None:
    """A parameter that is a direct child of the model, not one of a module, is frozen by its alias as well. So it is in every arch."""
    for alias, patterns in VLMConfig.for_arch(name).module_patterns.items():
        inside = [pattern for pattern in patterns if pattern.endswith(".*")]
        assert patterns == [part for pattern in inside for part in (pattern.removesuffix(".*"), pattern)], alias
    assert MoTConfig().module_patterns["mot"] == ["transformer.layers", "transformer.layers.*"]


def test_names_of_the_document() -> None:
    assert {"joint_decoder", "cross_attention", "mot", "moma"} <= set(registry.list_vlm_configs())
    assert registry.list_vlm_configs() == sorted(registry.list_vlm_configs())
    assert registry.vlm_configs.get("moma") is kempnerforge.config.MoMaConfig is MoMaConfig


@pytest.mark.parametrize("heads", [0, -2])
@pytest.mark.parametrize("own", [0, 4])
def test_a_model_without_heads_is_refused(heads: int, own: int) -> None:
    for resolve in (
        CrossAttentionConfig(cross_attention_n_heads=own).resolved_heads,
        MoTConfig(mot_image_n_heads=own).resolved_image_heads,
    ):
        with pytest.raises(ValueError, match=f"model_n_heads = {heads}: must be positive"):
            resolve(heads)


def test_the_flag_is_the_gate_of_a_warm_start() -> None:
    def warned(run: RunConfig | None = None, **keys: object) -> list[str]:
        return JobConfig(vlm=VLMConfig.for_arch("mot", **keys), run=run or RunConfig(), train=TrainConfig(max_steps=1)).warnings()

    flag = "mot_warm_start_from_text"
    assert warned() == warned(mot_warm_start_path="x", **{flag: True}) == warned(RunConfig(init_from="x"), **{flag: True}) == []
    assert warned(mot_warm_start_path="x") == [f"vlm.mot_warm_start_path = 'x': is not read, as {flag} = false"]
    assert "without mot_warm_start_path or run.init_from" in warned(**{flag: True})[0]


def test_a_warm_start_that_stands_alone_names_its_weights(tmp_path: Path) -> None:
    """A job can have them from elsewhere, so its section is made without a path."""
    with pytest.raises(InputError, match="needs mot_warm_start_path"):
        MoTConfig(mot_warm_start_from_text=True)
    assert MoTConfig(mot_warm_start_from_text=True, mot_warm_start_path="x").mot_warm_start_from_text
    (tmp_path / "job.toml").write_text('[vlm]\narch = "mot"\nmot_warm_start_from_text = true\n[train]\nmax_steps = 1\n')
    for made in (load_config(tmp_path / "job.toml").vlm, VLMConfig.for_arch("mot", mot_warm_start_from_text=True)):
        assert isinstance(made, MoTConfig) and made.mot_warm_start_from_text and not made.mot_warm_start_path


def test_registry_refuses_a_second_class_of_a_name() -> None:
    @dataclasses.dataclass
    class Impostor(VLMConfig):
        arch: str = "mot"

    with pytest.raises(ValueError, match="already registered"):
        registry.register_vlm_config(Impostor)
    assert registry.vlm_configs.get("mot") is MoTConfig
