"""GGUF files of the Llama architecture (llama.cpp's format): weights of any quantisation, and the tokenizer.

Of the package ``gguf`` are used: ``GGUFReader`` (parses the file), ``quants.dequantize``, and
``get_tensor_name_map`` with ``MODEL_ARCH`` (names of tensors). Ours are:

* the settings: transformers' reader of GGUF ignores keys that it does not know (such as
  ``llama.attention.clamp_kqv``), and the model would compute something else;
* the order of rows in queries and keys: ``gguf`` does not undo the permutation that llama.cpp's converter
  makes;
* the tokenizer: ``gguf`` has none, and transformers' converter does not know the rule ``smollm``, which
  splits numbers into digits.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from kempnerforge.config.model import ModelConfig, RopeScaling
from kempnerforge.data.fingerprint import Signature, signature
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.interop.external import ExternalModel, FileTensor, backbone_parameters, check_tensor, match_tensors, text_job
from kempnerforge.interop.families import text_names
from kempnerforge.interop.write import Progress, nothing
from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import regular

SETTINGS = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "ffn_dim": "feed_forward_length",
    "max_seq_len": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
"""``[model]`` key -> key of the file, after ``llama.``."""

INERT = {
    *("context_length", "vocab_size", "tensor_data_layout", "rope.freq_base", "rope.dimension_count", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scale_linear", "attention.key_length", "attention.value_length", "rope.scaling.finetuned"),
}
"""Further keys after ``llama.`` that are read below, or that say how the file was made. Any other is refused,
unless its value is the one in ``PLAIN``, or 0 or empty: llama.cpp's architecture can do more than ours."""
PLAIN: dict[str, Any] = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "logit_scale": 1.0,
    "rope.scaling.original_context_length": None,
}
"""Keys whose values change nothing only if they are these; None: any value."""

DIGITS = {"smollm": True, "gpt-2": False, "gpt2": False}
"""``tokenizer.ggml.pre`` -> whether digits are alone, for byte-level BPE with GPT-2's rule for words."""
CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens."""


@dataclass(frozen=True)
class GGUFModel(ExternalModel):
    """A file; ``path`` is the file itself."""

    def read(self, progress: Progress = nothing) -> dict[str, Tensor]:
        quants, opened = _package().quants, _open(self.path).tensors
        cfg, tensors = self.job.model, {}
        for name, wanted in self.parameters.items():
            source = opened[self.file_tensors[name].name]
            value = torch.from_numpy(np.array(quants.dequantize(source.data, source.tensor_type), dtype=np.float32))
            if ".q_proj." in name or ".k_proj." in name:
                value = _halves(value, cfg.n_heads if ".q_proj." in name else cfg.kv_heads)
            check_tensor(self.path, f"{source.name} ({name})", value, wanted)
            tensors[name] = value
            progress(f"reading {self.path.name}", len(tensors), len(self.parameters))
        return tensors


def _halves(weight: Tensor, heads: int) -> Tensor:
    """(H * E, D): the file rotates neighbouring rows of a head together, our attention its first half with
    its second.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def open_gguf(path: Path) -> ExternalModel:
    """Reads settings and names, not the weights.

    Raises:
        InputError: it cannot be read, lacks a setting, is of another architecture, or lacks tensors or has
            unknown ones.
    """
    names, fields = _open(path)
    if fields.get("general.architecture") != "llama":
        raise InputError(f"{path}: general.architecture = {fields.get('general.architecture')!r}: only 'llama' is read")
    if "rope_freqs.weight" in names:
        raise InputError(f"{path}: its rotary positions are scaled (rope_freqs.weight), which is not read from GGUF; take the safetensors")
    _check_keys(path, fields)
    settings = {key: fields[f"llama.{gguf_key}"] for key, gguf_key in SETTINGS.items()}
    width = fields.get("llama.attention.key_length", settings["dim"] // settings["n_heads"])
    model = ModelConfig(
        **settings,
        head_dim=0 if width * settings["n_heads"] == settings["dim"] else width,
        rope_scaling=_rope_scaling(path, fields),
        rope_theta=float(fields.get("llama.rope.freq_base", 10_000.0)),
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        tie_embeddings="output.weight" not in names,
    )
    if fields.get("llama.rope.dimension_count", model.head_width) != model.head_width:
        raise InputError(f"{path}: llama.rope.dimension_count is not the width of a head, {model.head_width}")
    known = _package().get_tensor_name_map(_package().MODEL_ARCH.LLAMA, model.n_layers)
    parameters, files = backbone_parameters(model), dict.fromkeys(names, path)
    tensors = {name: FileTensor(known.get_name(hf_name, [".weight"])) for name, hf_name in text_names(parameters, "llama").items()}
    tensors = match_tensors(path, tensors, files, lambda name: False)
    return GGUFModel(path, "LlamaForCausalLM", text_job(model), parameters, tensors, files)


def _check_keys(path: Path, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        key = name.removeprefix("llama.")
        if key == name or key in INERT or key in SETTINGS.values():
            continue
        fine = PLAIN[key] in (None, value) if key in PLAIN else value in (0, "", False)
        if not fine:
            raise InputError(f"{path}: {name} = {value!r}: is not read from GGUF; take the safetensors")
    length, value_length = (fields.get(f"llama.attention.{part}_length") for part in ("key", "value"))
    if length != value_length and None not in (length, value_length):
        raise InputError(f"{path}: llama.attention.value_length = {value_length}: must be llama.attention.key_length, {length}")


def _rope_scaling(path: Path, fields: dict[str, Any]) -> RopeScaling | None:
    """As llama.cpp: a factor without a type is linear, and so is that under the older key."""
    key = next((key for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear") if key in fields), "")
    factor, kind = float(fields[key] if key else 0) or 1.0, fields.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise InputError(f"{path}: llama.rope.scaling.type = {kind!r}: 'none' and 'linear' are read from GGUF; take the safetensors")
    if kind == "none" or factor == 1:
        return None
    if factor < 1:
        raise InputError(f"{path}: {key} = {factor}: must be at least 1")
    return RopeScaling("linear", factor)


def read_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer inside the file.

    Raises:
        ValueError: it is not one that is known.
    """
    fields = _open(path).fields
    kind, rule = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or rule not in DIGITS:
        raise InputError(
            f"{path}: its tokenizer is {kind!r} with the rule {rule!r}; 'gpt2' with {', '.join(map(repr, DIGITS))} is read;"
            " name a directory that has it with --tokenizer"
        )
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: k for k, token in enumerate(tokens)}, merges=merges))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = [pre_tokenizers.Digits(individual_digits=True)] if DIGITS[rule] else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, words])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == USER_DEFINED])
    _check_tokenizer(path, fields)
    names = {role: fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "padding")}
    if names["eos"] is None:
        raise InputError(f"{path}: its tokenizer has no EOS token, so answers could not end")
    named: dict[str, Any] = {role: None if number is None else tokens[number] for role, number in names.items()}
    stops = [number for role in ("eot", "eom") if (number := fields.get(f"tokenizer.ggml.{role}_token_id")) is not None]
    return Tokenizer(
        backend,
        eos=named["eos"],
        bos=named["bos"],
        pad=named["padding"],
        chat_template=fields.get("tokenizer.chat_template"),
        adds_bos=named["bos"] is not None and bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        stops=stops,
    )


def _check_tokenizer(path: Path, fields: dict[str, Any]) -> None:
    """What a tokenizer may do that ours does not."""
    for name, plain in (("add_sep_token", False), ("add_space_prefix", False), ("remove_extra_whitespaces", False)):
        if fields.get(f"tokenizer.ggml.{name}", plain) not in (plain, None):
            raise InputError(f"{path}: tokenizer.ggml.{name} = true: is not read; name a directory of a tokenizer with --tokenizer")


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise InputError("GGUF files need the package 'gguf': pip install 'kempnerforge[gguf]'") from None


class _Fields(dict[str, Any]):
    """Settings of a file, by name."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise InputError(f"{self._path}: does not say {name}")


class _GGUFFile(NamedTuple):
    """Tensors by name, which stay on disk until they are read, and settings."""

    tensors: dict[str, Any]
    fields: _Fields


def _open(path: Path) -> _GGUFFile:
    if (version := signature(regular(path))) is None:
        raise InputError(f"{path}: no such file")
    return _read(path, version)


@lru_cache(maxsize=1)
def _read(path: Path, version: Signature) -> _GGUFFile:
    """Kept for the next call: 50,000 tokens take seconds to read."""
    package = _package()
    try:
        opened = package.GGUFReader(path)
        fields = _Fields(path, {name: field.contents() for name, field in opened.fields.items()})
        return _GGUFFile({tensor.name: tensor for tensor in opened.tensors}, fields)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as GGUF; {error}") from None
