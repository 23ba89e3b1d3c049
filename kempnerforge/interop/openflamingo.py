"""The resampler and the gated blocks of an OpenFlamingo checkpoint (Awadalla et al. 2023) under our names."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from kempnerforge.util.errors import InputError, library_call
from kempnerforge.util.paths import start_of
from kempnerforge.util.reading import regular

GATED = re.compile(r"lang_encoder\.(?:gated_cross_attn_layers\.(\d+)|.+\.(\d+)\.gated_cross_attn_layer)\.(.+)")
"""A block has one name or the other, or both: the module is in two places."""
RESAMPLED = re.compile(r"perceiver\.layers\.(\d+)\.(.+)")
BLOCK = {
    "attn.norm": "norm",
    "attn.to_q": "q_proj",
    "attn.to_out": "o_proj",
    "ff.0": "mlp_norm",
    "ff.1": "mlp.fc1",
    "ff.3": "mlp.fc2",
    "attn_gate": "attention_gate",
    "ff_gate": "mlp_gate",
}
RESAMPLER_LAYER = {
    "0.norm_media": "media_norm",
    "0.norm_latents": "latents_norm",
    "0.to_q": "q_proj",
    "0.to_out": "o_proj",
    "1.0": "mlp_norm",
    "1.1": "mlp.fc1",
    "1.3": "mlp.fc2",
}


def read_openflamingo(path: Path | str) -> dict[str, Tensor]:
    """The tensors of resampler and gated blocks at ``path``, which has others as well (embeddings of words).

    Args:
        path: safetensors.

    Returns:
        ``adapter.*`` and ``transformer.layers.*.cross_attention.*`` -> tensor on the CPU.

    Raises:
        InputError: it cannot be read, has no such tensors or one whose place is not known.
    """
    found = dict[str, Tensor]()
    for name, tensor in _read(Path(path)).items():
        if (gated := GATED.fullmatch(name)) is not None:
            place, rest, table = f"transformer.layers.{gated[1] or gated[2]}.cross_attention", gated[3], BLOCK
        elif (layer := RESAMPLED.fullmatch(name)) is not None:
            place, rest, table = f"adapter.layers.{layer[1]}", layer[2], RESAMPLER_LAYER
        elif name.startswith("perceiver."):
            found[f"adapter.{name.removeprefix('perceiver.')}"] = tensor
            continue
        else:
            continue
        part, dot, kind = rest.rpartition(".")
        part, kind = (part, dot + kind) if kind in ("weight", "bias") else (rest, "")
        if part.endswith("to_kv") and tensor.ndim == 2 and not len(tensor) % 2:
            found |= dict(zip((f"{place}.k_proj{kind}", f"{place}.v_proj{kind}"), tensor.chunk(2), strict=True))
        elif part in table:
            found[f"{place}.{table[part]}{kind}"] = tensor
        else:
            raise InputError(f"{path}: {name} is no tensor of OpenFlamingo")
    if not found:
        raise InputError(f"{path}: has neither perceiver.* nor gated cross-attention layers; is it a checkpoint of OpenFlamingo?")
    return found


def _read(path: Path) -> dict[str, Tensor]:
    """Names without the "module." of a training run."""
    if not path.exists():
        raise InputError(f"vlm.openflamingo_path = {str(path)!r}: no such file{start_of(path)}")
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path}: a checkpoint of OpenFlamingo is read from safetensors alone, no pickle is; docs/weights.md has how to write it"
        )
    with library_call(f"{path}", "cannot be read as tensors"):
        held = load_file(regular(path))
    return {name.removeprefix("module."): tensor for name, tensor in held.items()}
