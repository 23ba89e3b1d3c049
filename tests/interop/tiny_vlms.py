"""Tiny random vision-language models of transformers (and one of nanoVLM's form), saved with a tokenizer as they are on the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

VOCAB, IMAGE = 340, 3
TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 28,
    "patch_size": 7,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS = ["what is in the picture?", "answer en where is the cat", "USER: a\nb ASSISTANT: caption en\n", "User: Assistant: user assistant"]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "<end_of_utterance>", "<|im_start|>", "<|im_end|>"]
FRAMES = ["<fake_token_around_image>", "<global-img>"]
"""What Idefics 3 has around an image."""


def _paligemma() -> Any:
    text = hf.GemmaConfig(**TEXT | {"num_key_value_heads": 1})
    vision = hf.SiglipVisionConfig(**TOWER, vision_use_head=False)
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=32, image_token_id=IMAGE)
    return hf.PaliGemmaForConditionalGeneration(config)


def _paligemma2() -> Any:
    text = hf.Gemma2Config(**TEXT, sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
    vision = hf.SiglipVisionConfig(**TOWER, vision_use_head=False)
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=32, image_token_id=IMAGE)
    return hf.PaliGemmaForConditionalGeneration(config)


def _llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, image_seq_length=16
    )
    return hf.LlavaForConditionalGeneration(config)


def _idefics3() -> Any:
    vision = hf.models.idefics3.Idefics3VisionConfig(**TOWER)
    config = hf.Idefics3Config(vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2)
    return hf.Idefics3ForConditionalGeneration(config)


def _smolvlm() -> Any:
    vision = hf.models.smolvlm.SmolVLMVisionConfig(**TOWER)
    config = hf.SmolVLMConfig(vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2)
    return hf.SmolVLMForConditionalGeneration(config)


MODELS = {"paligemma": _paligemma, "paligemma2": _paligemma2, "llava": _llava, "idefics3": _idefics3, "smolvlm": _smolvlm}


GRID: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
QWEN2 = {key: value for key, value in TEXT.items() if key != "head_dim"} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
}
"""Its heads are as wide as hidden_size says."""


def _qwen2_vl() -> Any:
    vision = GRID | {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(text_config=QWEN2, vision_config=vision, image_token_id=IMAGE)
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> Any:
    vision = GRID | {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40, "window_size": 14, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(text_config=QWEN2, vision_config=vision, image_token_id=IMAGE)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}}
    sizes = {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40, "num_position_embeddings": 16}
    vision = GRID | sizes | {"deepstack_visual_indexes": [0, 1]}
    config = hf.Qwen3VLConfig(text_config=TEXT | rope, vision_config=vision, image_token_id=IMAGE)
    return hf.Qwen3VLForConditionalGeneration(config)


GRIDS = {"qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}
"""Models of transformers that take images of any size, by their ``model_type``."""


COARSE: dict[str, Any] = TOWER | {"patch_size": 14}
PLAIN: dict[str, Any] = QWEN2 | {"rope_parameters": None}
SQUARES = [[28, 56], [56, 28], [56, 56], [28, 84]]
"""Resolutions of views of 28 pixels."""


def _llava_next() -> Any:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**COARSE),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=SQUARES,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> Any:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**COARSE, vision_use_head=False),
        text_config=hf.Qwen2Config(**PLAIN),
        image_token_index=IMAGE,
        video_token_index=VOCAB - 1,
        image_grid_pinpoints=SQUARES,
        vision_aspect_ratio="anyres_max_2",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _mistral3() -> Any:
    tower: dict[str, Any] = TOWER | {"head_dim": 12}
    vision = hf.PixtralVisionConfig(**tower)
    text: dict[str, Any] = TEXT | {"sliding_window": None}
    config = hf.Mistral3Config(
        vision_config=vision, text_config=hf.MistralConfig(**text), image_token_index=IMAGE, tie_word_embeddings=False
    )
    return hf.Mistral3ForConditionalGeneration(config)


def _pixtral() -> Any:
    tower: dict[str, Any] = TOWER | {"head_dim": 12}
    text = hf.LlamaConfig(**TEXT)
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**tower),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=1,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return hf.LlavaForConditionalGeneration(config)


def _idefics2() -> Any:
    tower: dict[str, Any] = TOWER | {"image_size": 56}
    vision = hf.models.idefics2.configuration_idefics2.Idefics2VisionConfig(**tower)
    sizes: dict[str, Any] = {
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "num_key_value_heads": 1,
    }
    resampler = hf.models.idefics2.configuration_idefics2.Idefics2PerceiverConfig(hidden_size=32, **sizes)
    text: dict[str, Any] = TEXT | {"sliding_window": 8}
    config = hf.Idefics2Config(vision_config=vision, perceiver_config=resampler, text_config=hf.MistralConfig(**text), image_token_id=IMAGE)
    return hf.Idefics2ForConditionalGeneration(config)


def internvl() -> Any:
    sizes: dict[str, Any] = TOWER | {"image_size": [28, 28], "patch_size": [7, 7]}
    vision = hf.InternVLVisionConfig(**sizes, use_qk_norm=True, attention_bias=True)
    config = hf.InternVLConfig(vision_config=vision, text_config=hf.Qwen2Config(**PLAIN), image_token_id=IMAGE, image_seq_length=4)
    return hf.InternVLForConditionalGeneration(config)


SIZED = {"llava_next": _llava_next, "llava_onevision": _llava_onevision, "mistral3": _mistral3, "pixtral": _pixtral, "idefics2": _idefics2}
"""Further models that take other images than squares of one size, by their ``model_type``."""
IMAGE_SIZES = dict.fromkeys((*GRIDS, *SIZED), 28) | {"llava_next": 56, "llava_onevision": 56}
"""``vlm.image_size`` of those that need it."""
BREAKS = ["[IMG_BREAK]", "[IMG_END]"]
"""What Mistral 3 has between rows of an image and after the last."""


def write_tokenizer(path: Path, prefix: bool, more: Sequence[str] = ()) -> None:
    """A small BPE, with ``more`` special tokens. With ``prefix`` it is of Llama's kind: a space in front, BOS before every text."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never")
    alphabet = [chr(i) for i in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[*SPECIAL, *more], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(WORDS, trainer)
    if prefix:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(path)


def save(name: str, path: Path) -> Any:
    """Writes a random model to ``path``; every tensor of it is away from its usual start."""
    model = (MODELS | GRIDS | SIZED | {"internvl": internvl})[name]().eval()
    draws = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in key and "pali" not in name), std=0.1, generator=draws)
    model.save_pretrained(path)
    write_tokenizer(
        path, prefix=name == "llava", more={"idefics3": FRAMES, "smolvlm": FRAMES, "mistral3": BREAKS, "pixtral": BREAKS}.get(name, ())
    )
    mean, std = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]) if name == "llava" else ([0.5] * 3, [0.5] * 3)
    size = {"shortest_edge": 28} if name == "llava" else {"height": 28, "width": 28}
    images = {"image_mean": mean, "image_std": std, "size": size, "do_center_crop": name == "llava"}
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    return model


def rename(source: Path, target: Path, names: dict[str, str]) -> None:
    """A copy of the model with its keys renamed by their beginnings."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, Tensor] = {}
    for key, value in load_file(source / "model.safetensors").items():
        old = max((old for old in names if key.startswith(old)), key=len, default="")
        tensors[names.get(old, "") + key.removeprefix(old)] = value
    save_file(tensors, target / "model.safetensors")
