"""nanoVLM's checkpoints (``config.json`` of its ``VLMConfig``, one safetensors file): names, settings and
checks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from kempnerforge.config.adapter import PixelShuffleConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.config.vision import ViTConfig, square_side
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.interop.external import (
    ExternalModel,
    FileTensor,
    image_job,
    match_tensors,
    model_parameters,
    tied_head,
)
from kempnerforge.util.errors import InputError, show

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Its ``lm_chat_template``, as the file has it."""
_TURNS = TurnsConfig(
    user="<|im_start|>user\n<image>{prompt}<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>",
    separator="\n",
    bos=False,
)
_QUESTIONS = TurnsConfig(user="Question: {prompt} ", assistant="Answer:", bos=False)
"""The template of the first generation, which has no chat template and no added tokens: the image comes
first."""
IMAGE_TOKEN, GRID = "<|image|>", 8
"""The token at positions of an image, and how many rows and columns of tiles have a token before them."""

NAMES = {
    "transformer.token_embedding.": "decoder.token_embedding.",
    "transformer.norm.": "decoder.norm.",
    "transformer.output_head.": "decoder.head.",
    "vision_encoder.patch_embedding.": "vision_encoder.patch_embedding.conv.",
    "vision_encoder.position_embedding": "vision_encoder.patch_embedding.position_embedding",
    "vision_encoder.norm.": "vision_encoder.layer_norm.",
    "adapter.proj.": "MP.proj.",
}
"""Beginnings of names outside the layers, ours -> those in the files."""

TEXT_LAYER = {"attention_norm": "norm1", "mlp_norm": "norm2", "attention.o_proj": "attn.out_proj", "attention": "attn", "mlp": "mlp"}
VISION_LAYER = {"norm1": "ln1", "norm2": "ln2", "attention.out_proj": "attn.out_proj", "mlp": "mlp"}
"""Parts of a layer, ours -> those in the files. Of two that fit the first counts."""

QKV = {"attention.q_proj": 0, "attention.k_proj": 1, "attention.v_proj": 2}
"""Third of the rows of the vision layers' ``attn.qkv_proj``."""

HEAD = "decoder.head.weight"
KEYS = ("vit_hidden_dim", "lm_hidden_dim", "mp_pixel_shuffle_factor")
SIZES = (
    *("vit_hidden_dim", "vit_inter_dim", "vit_n_heads", "vit_n_blocks", "lm_hidden_dim", "lm_inter_dim", "lm_n_heads", "lm_n_kv_heads"),
    *("lm_n_blocks", "lm_vocab_size", "mp_pixel_shuffle_factor"),
)
MAY_LACK = ("lm_max_position_embeddings", "max_img_size", "mp_image_token_length")
NUMBERS = ("lm_re_base", "lm_rms_eps", "vit_ln_eps", "lm_attn_scaling")
"""Keys that are whole numbers above 0, those among them that older files do not have, and other numbers above
0."""
SHARED = {HEAD: "decoder.token_embedding.weight"}
"""Its file has one of the two names of a tensor: the first in the alphabet."""
SPARE = re.compile(r"decoder\.(head\.weight|rotary_embd\.(inv_freq|cos_cached|sin_cached))$")


def open_nanovlm(path: Path, config: dict[str, Any], files: dict[str, Path]) -> ExternalModel:
    """A directory of nanoVLM. Reads names, not the weights.

    Raises:
        InputError: ours cannot be this model, or tensors are missing or unknown.
    """
    texts = texts_of(config)
    job = image_job(job_of(config), texts.data, views=texts.views)
    parameters = model_parameters(job)
    tensors = {name: file_tensor(name) for name in parameters}
    for kept, other in SHARED.items():
        if other not in files and kept in files:
            tensors = {name: FileTensor(kept) if source.name == other else source for name, source in tensors.items()}
    tensors = match_tensors(path, tensors, files, is_spare)
    tied = tied_head(tensors, files, HEAD)
    return ExternalModel(path, "", job, parameters, tensors, files, tied=tied, added_tokens=texts.tokens, notes=texts.notes)


def is_one(config: dict[str, Any]) -> bool:
    """Whether this ``config.json`` is nanoVLM's."""
    return all(key in config for key in KEYS)


def is_spare(name: str) -> bool:
    """Whether a tensor follows from others: the tied head, tables of angles."""
    return bool(SPARE.search(name))


def job_of(config: dict[str, Any]) -> JobConfig:
    """The sections that make the model. Its images have RGB in [0, 1], without further normalisation.

    Raises:
        InputError: a setting that our model does not have.
    """
    for key in (*SIZES, *MAY_LACK, *NUMBERS):
        value = config.get(key, None if key in SIZES else 1)
        if isinstance(value, bool) or not isinstance(value, int if key in SIZES + MAY_LACK else int | float) or not value > 0:
            raise InputError(f"{key} = {show(value)}: must be a {'whole ' if key not in NUMBERS else ''}number above 0")
    if config.get("vit_cls_flag"):
        raise InputError("vit_cls_flag = true: an image is its CLS token alone; only patches are read")
    if not config.get("lm_tie_weights", True):
        raise InputError("lm_tie_weights = false: cannot be read")
    model = ModelConfig(
        dim=config["lm_hidden_dim"],
        n_layers=config["lm_n_blocks"],
        n_heads=config["lm_n_heads"],
        n_kv_heads=config["lm_n_kv_heads"],
        ffn_dim=config["lm_inter_dim"],
        norm_eps=config.get("lm_rms_eps", 1e-5),
        rope_theta=float(config.get("lm_re_base", 100_000)),
        max_seq_len=config.get("lm_max_position_embeddings", 8192),
        vocab_size=config["lm_vocab_size"],
        attention_scale=_attention_scale(config),
    )
    vision = ViTConfig(
        image_size=square_side("vit_img_size", config.get("vit_img_size")),
        patch_size=square_side("vit_patch_size", config.get("vit_patch_size")),
        dim=config["vit_hidden_dim"],
        n_layers=config["vit_n_blocks"],
        n_heads=config["vit_n_heads"],
        mlp_dim=config["vit_inter_dim"],
        norm_eps=config.get("vit_ln_eps", 1e-6),
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )
    adapter = PixelShuffleConfig(factor=config["mp_pixel_shuffle_factor"], bias=False)
    tokens = (vision.grid // adapter.factor) ** 2
    if config.get("mp_image_token_length", tokens) != tokens:
        raise InputError(f"mp_image_token_length = {config['mp_image_token_length']}: an image of these sizes has {tokens} tokens")
    return JobConfig(model=model, vision_encoder=vision, adapter=adapter, vlm=VLMConfig())


def _attention_scale(config: dict[str, Any]) -> float:
    """The factor multiplies the rotary tables, so queries and keys both have it; 0 is the usual scale."""
    factor = config.get("lm_attn_scaling", 1.0)
    return 0.0 if factor == 1 else factor**2 * (config["lm_hidden_dim"] // config["lm_n_heads"]) ** -0.5


class Texts(NamedTuple):
    """The layout of its training data.

    Attributes:
        data: keys of ``[data]``.
        tokens: added to the tokenizer by its code, in the order of their ids.
        notes: differences between its code and ours, for people.
        views: of an image, at most.
    """

    data: dict[str, Any]
    tokens: tuple[str, ...]
    notes: tuple[str, ...]
    views: int = 1


def texts_of(config: dict[str, Any]) -> Texts:
    """The generation of nanoVLM that a ``config.json`` is of.

    Raises:
        InputError: it is unknown.
    """
    added, template = config.get("vlm_extra_tokens") or {}, config.get("lm_chat_template")
    if not isinstance(added, dict) or not all(isinstance(name, str) for name in added.values()):
        raise InputError(f"vlm_extra_tokens = {show(added)}: must be a table of names")
    tokens = tuple(added.values())
    if template is None and not tokens:
        return Texts({"template": "turns", "turns": _QUESTIONS}, (), ())
    if template not in (None, CHATML):
        raise InputError(f"lm_chat_template = {show(template)}: only nanoVLM's own, which is ChatML, is known")
    if tokens and tokens[0] != IMAGE_TOKEN:
        raise InputError(f"vlm_extra_tokens: begins with {tokens[0]!r}, not {IMAGE_TOKEN!r}")
    data: dict[str, Any] = {"template": "turns", "turns": _TURNS}
    notes, views = ["the line break after <|im_end|> is not trained; it is there"], 1
    if len(tokens) > 1:
        side, longest = config["vit_img_size"], config.get("max_img_size", 2048)
        if longest % side or not 1 <= longest // side <= GRID:
            raise InputError(f"max_img_size = {longest}: must be 1 to {GRID} times vit_img_size = {side}")
        views = 1 + (longest // side) ** 2
        images = ImagesConfig(
            fit="tiles",
            max_side=longest,
            resize_to_max_side=bool(config.get("resize_to_max_side_len", True)),
            marker_grid=GRID,
            number_images=True,
        )
        if tokens[1:] != tuple(images.new_tokens()):
            raise InputError(f"vlm_extra_tokens: {len(tokens)} names, not {IMAGE_TOKEN!r} and the names of {GRID} x {GRID} tiles")
        notes.append("the view of a whole image is bicubic here and bilinear, of the stretched image, there: pixels up to about 0.04 apart")
        notes.append("a prompt with several images has them where <image> is written; nanoVLM puts all in front of the first turn")
        data["images"] = images
    return Texts(data, tokens, tuple(notes), views)


def file_tensor(name: str) -> FileTensor:
    """The tensor in the files that is our parameter, or whose rows it is a third of."""
    for start, file_start in NAMES.items():
        if name.startswith(start):
            return FileTensor(file_start + name.removeprefix(start))
    found = re.fullmatch(r"(transformer|vision_encoder)\.layers\.(\d+)\.(.*)", name)
    assert found is not None, name
    text = found[1] == "transformer"
    layer, rest = f"{'decoder' if text else found[1]}.blocks.{found[2]}", found[3]
    for part, number in QKV.items():
        if not text and rest.startswith(part):
            return FileTensor(f"{layer}.attn.qkv_proj{rest.removeprefix(part)}", number, 3)
    parts = TEXT_LAYER if text else VISION_LAYER
    part = next(part for part in parts if rest.startswith(part + "."))
    return FileTensor(f"{layer}.{parts[part]}{rest.removeprefix(part)}")
