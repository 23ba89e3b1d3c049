"""The models in ``configs/models``, on the meta device: as many parameters as the models that they name."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from kempnerforge.config import load_config
from kempnerforge.vlm.build import build_model
from tests.dist import ROOT

PRESETS = ROOT / "configs" / "models"
COUNTS = {
    "nanovlm-460m": 460_113_984,
    "nanovlm-222m": 222_082_176,
    "paligemma-3b-224": 2_923_466_480,
    "llava-1.5-7b": 7_050_828_800,
    "vlm_11m": 10_610_048,
    "vlm_100m": 91_670_720,
    "vlm_1b": 1_849_978_608,
    "vlm_3b": 2_393_353_968,
}
PALIGEMMA_AS_RELEASED = 2_923_335_408
LLAVA_IN_TRANSFORMERS = 7_063_427_072
IMAGE_TOKENS = {"nanovlm-460m": 64, "nanovlm-222m": 49, "paligemma-3b-224": 256, "llava-1.5-7b": 576, "vlm_11m": 256, "vlm_1b": 256}


def count(name: str, *overrides: str) -> int:
    model = build_model(load_config(PRESETS / f"{name}.toml", overrides), "meta")
    assert model.num_image_tokens == IMAGE_TOKENS.get(name, 256)
    return sum(p.numel() for p in model.parameters())


def test_all_are_counted() -> None:
    assert {path.stem for path in PRESETS.glob("*.toml") if not path.stem.startswith("hf-")} == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    assert count(name) == COUNTS[name]
    assert f"{COUNTS[name]:,}" in (PRESETS / f"{name}.toml").read_text()


def test_paligemma_is_that_of_transformers_and_as_released() -> None:
    assert count("paligemma-3b-224", "--model.vocab_size=257152") == PALIGEMMA_AS_RELEASED
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
    text = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1}
    with torch.device("meta"):
        vision = hf.SiglipVisionConfig(**tower, image_size=224, vision_use_head=False)
        config = hf.PaliGemmaConfig(vision_config=vision, text_config=hf.GemmaConfig(**text, vocab_size=257216), projection_dim=2048)
        theirs = hf.PaliGemmaForConditionalGeneration(config)
    assert sum(p.numel() for p in theirs.parameters()) == COUNTS["paligemma-3b-224"]


def test_llava_is_that_of_transformers_without_what_nothing_reads() -> None:
    with torch.device("meta"):
        theirs = hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=hf.LlamaConfig(vocab_size=32064)))
    assert sum(p.numel() for p in theirs.parameters()) == LLAVA_IN_TRANSFORMERS
    tower = theirs.model.vision_tower
    unread = [*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters()]
    assert LLAVA_IN_TRANSFORMERS - sum(p.numel() for p in unread) == COUNTS["llava-1.5-7b"]


@pytest.mark.parametrize(
    ("name", "dim", "layers", "vocab"), [("vlm_11m", 96, 8, 49280), ("vlm_100m", 512, 12, 49280), ("vlm_1b", 2048, 24, 49280),
                                         ("vlm_3b", 2048, 18, 257216)]
)  # fmt: skip
def test_decoders_of_vla_foundry(name: str, dim: int, layers: int, vocab: int) -> None:
    """Multi-head attention, SwiGLU of width 256 * ceil(8 * dim / 3 / 256), no biases, embedding and head apart; LayerNorms, in the second
    preset one more.
    """
    model = build_model(load_config(PRESETS / f"{name}.toml"), "meta")
    ffn = 256 * -(-8 * dim // 3 // 256)
    norms = 2 * layers + 1 + (name == "vlm_100m")
    want = 2 * vocab * dim + layers * (4 * dim**2 + 3 * dim * ffn) + 2 * dim * norms
    assert sum(p.numel() for p in model.transformer.parameters()) == want
