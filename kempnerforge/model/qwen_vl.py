"""The vision towers of Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923, section 2.1.1) and Qwen3-VL (Bai et al.
2025, arXiv 2511.21631, section 2), as transformers has them, without the mergers after them: these are
adapters, ``adapter.type = "patch_merger"``. The library is imported when a tower is built, not before.

Shapes: N images, H x H pixels, F patches of the square, P patches of all images, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, at_most
from kempnerforge.config.vision import LARGEST_SIDE, HFTowerConfig
from kempnerforge.model.attention import additive, attend
from kempnerforge.model.hf_files import read_tensors, tensor_files
from kempnerforge.model.hf_towers import Clip, Siglip, build_tower, chosen_normalisation, plain_settings, tower_config, tower_kind, where
from kempnerforge.model.rope import rotate
from kempnerforge.model.transfer import moved
from kempnerforge.model.vision import VisionEncoder, inside
from kempnerforge.util.errors import InputError, show

OF_THE_ADAPTER = ("spatial_merge_size", "out_hidden_size")
"""Keys of a tower's config that say what its merger does."""
UNREAD = (*OF_THE_ADAPTER, "tokens_per_second", "initializer_range")
PREFIXES = ("model.visual.", "visual.", "")
"""Of the tower's weights, in files of a whole model or of a tower."""


@registry.register_vision_config
@dataclass
class QwenTowerConfig(HFTowerConfig):
    """The tower of Qwen2.5-VL (window attention) or Qwen3-VL (learned positions, and ``deepstack_layers``).
    It takes images of any shape: ``data.images.fit = "native"``.

    Attributes:
        path: a local directory, of the whole model or of its tower.
        image_size: pixels along a side of the square that an image has to fit into; a multiple of the patch
            size. No weight depends on it.
        full_attention_layers: of Qwen2.5-VL: the layers, from 0, in which a patch sees the whole image. Read
            with ``settings``; at ``path`` they are in ``config.json``.
    """

    type: str = "qwen_vl"
    image_size: int = 448
    full_attention_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "image_size")
        at_most(self, LARGEST_SIDE, "image_size")
        if self.feature_layer != -1:
            raise InputError(
                f"feature_layer = {self.feature_layer}: type {self.type!r} gives its last layer, and deepstack_layers; take -1"
            )
        if given := [key for key in OF_THE_ADAPTER if key in self.settings]:
            raise InputError(f"settings.{given[0]}: the adapter does this; see adapter.type = 'patch_merger'")
        if self.path and self.full_attention_layers:
            raise InputError(f"full_attention_layers = {self.full_attention_layers}: with path they are in its config.json")


class Groups(NamedTuple):
    """Which patches see each other: S groups of L patches or fewer.

    Attributes:
        at: (S, L) the patches of each group, filled up with its first one.
        real: (S, 1, 1, L) bool: what is no filling; None: all.
        back: (P,) where each patch is among S * L.
    """

    at: Tensor
    real: Tensor | None
    back: Tensor

    @classmethod
    def of(cls, ends: Tensor, device: torch.device) -> Groups:
        """Groups that follow one another: ``ends`` (S + 1,) on the CPU are 0 and where each of them ends."""
        lengths = ends.diff()[:, None]  # (S, 1)
        steps = torch.arange(int(lengths.max()), device=ends.device)
        real = steps < lengths  # (S, L)
        at, back = ends[:-1, None] + steps * real, real.flatten().nonzero()[:, 0]
        return cls(moved(at, device), None if real.all() else moved(real[:, None, None], device), moved(back, device))


class GroupAttention(nn.Module):
    """The attention of a block, whose parameters it takes over, on all groups at once: the class goes through
    them one by one, which is slow, and each number of them another graph to compile.
    """

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = theirs.num_heads, theirs.qkv, theirs.proj

    def forward(self, x: Tensor, cu_seqlens: Groups, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        """(P, D) -> (P, D). The tables are (P, E), both halves alike."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (P, H, E) each
        cos, sin = (table[:, None, : table.shape[-1] // 2] for table in position_embeddings)
        q, k, v = (each[cu_seqlens.at].transpose(1, 2) for each in (rotate(q, (cos, sin)), rotate(k, (cos, sin)), v))  # (S, H, L, E)
        mask = None if cu_seqlens.real is None else additive(cu_seqlens.real, q.dtype)
        return self.proj(attend(q, k, v, mask, causal=False).flatten(0, 1)[cu_seqlens.back])


@registry.register_vision_encoder("qwen_vl")
class QwenTower(VisionEncoder):
    """The tower of transformers on the patches of each image, row by row. A still image is as many equal
    frames as a patch has.

    NOTE: the class has the patches in the order of its merger. With windows of one patch (``spatial_merge_size
    = 1``) this order is row by row, and all else is the same: attention takes patches in any order.

    Raises:
        ValueError: no such model, another family, or a config that the class does not take.
    """

    models: ClassVar = {
        **dict.fromkeys(("qwen2_5_vl", "qwen2_5_vl_vision"), ("Qwen2_5_VisionTransformerPretrainedModel", Clip.normalisation)),
        **dict.fromkeys(("qwen3_vl", "qwen3_vl_vision"), ("Qwen3VLVisionModel", Siglip.normalisation)),
    }
    """``model_type`` in ``config.json``, of the whole model or of its tower -> class, mean and std."""
    tower: Any

    def __init__(self, cfg: QwenTowerConfig) -> None:
        tower = self._load(cfg)
        config, side = tower.config, cfg.image_size // tower.config.patch_size
        self.layers: list[int] = list(cfg.deepstack_layers)
        mean, std = chosen_normalisation(cfg, self.models[type(config).model_type][1])
        dim = config.hidden_size
        super().__init__(
            num_tokens=side**2,
            dim=dim * (1 + len(self.layers)),
            image_size=cfg.image_size,
            mean=mean,
            std=std,
            layer_dim=dim if hasattr(config, "deepstack_visual_indexes") else 0,
            side=side,
        )
        vars(self)["tower"] = tower  # its children are adopted, as those of ``HFTower``
        for name, child in tower.named_children():
            self.add_module(name, child)
        assert {id(p) for p in self.parameters()} == {id(p) for p in tower.parameters()}, "a parameter belongs to no child"
        self.train()

    def _load(self, cfg: QwenTowerConfig) -> Any:
        """The tower without mergers; their places are identities."""
        import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as second
        import transformers.models.qwen3_vl.modeling_qwen3_vl as third

        name = self.models[tower_kind(cfg, self.models)][0]
        model_class = getattr(second, name, None) or getattr(third, name)
        config = tower_config(model_class.config_class, cfg)
        config.spatial_merge_size = 1
        if hasattr(config, "fullatt_block_indexes") and not cfg.path:
            config.fullatt_block_indexes = list(cfg.full_attention_layers)
        elif cfg.full_attention_layers:
            raise InputError(
                f"full_attention_layers = {cfg.full_attention_layers}: in a {config.model_type} all layers have full attention"
            )
        cfg.check_depth(config.depth, f"the tower has only {config.depth} layers")
        if hasattr(config, "deepstack_visual_indexes"):
            config.deepstack_visual_indexes = sorted(config.depth + layer for layer in cfg.deepstack_layers)
        _check(where(cfg), config)
        if cfg.image_size % config.patch_size:
            raise InputError(f"image_size = {cfg.image_size}: must be a multiple of the patch size, {config.patch_size} pixels")
        tower = build_tower(model_class, config, cfg.without_weights())
        tower.merger = nn.Identity()
        for block in tower.blocks:
            block.attn = GroupAttention(block.attn)
        if hasattr(config, "deepstack_visual_indexes"):
            tower.deepstack_merger_list = nn.ModuleList(nn.Identity() for _ in cfg.deepstack_layers)
        if cfg.has_weights and torch.get_default_device().type != "meta":
            _read(tower, Path(cfg.path))
        return tower

    @property
    def signature(self) -> str:
        return self.tower.config.to_json_string()

    def check_files(self, cfg: QwenTowerConfig) -> None:
        if cfg.has_weights:
            with torch.device("meta"):
                _read(self.tower, Path(cfg.path))

    def standing_alone(self, cfg: QwenTowerConfig) -> QwenTowerConfig:
        mean, std = self.normalisation
        windows = list(getattr(self.tower.config, "fullatt_block_indexes", ()))
        settings = qwen_settings(self.tower.config.to_dict(), type(self.tower.config)())
        return replace(cfg, path="", pretrained=True, settings=settings, full_attention_layers=windows, mean=list(mean), std=list(std))

    @property
    def units(self) -> list[nn.Module]:
        return list(self.tower.blocks)

    def forward(self, images: Tensor, grids: Sequence[tuple[int, int]] = ()) -> Tensor:
        """(N, 3, H, H) uint8 -> (N, F, D times 1 + the number of ``deepstack_layers``); zeros outside of
        ``grids``.
        """
        pixels = self.normalise(images if len(images) else images.new_zeros(1, *images.shape[1:]))  # the class cannot run on nothing
        sizes, config = grids or [(self.side, self.side)] * len(pixels), self.tower.config
        image, place = moved(inside(sizes, self.side, torch.device("cpu")).flatten(1).nonzero().T, pixels.device)  # (P,) each
        patches = cut(pixels, config.patch_size, config.temporal_patch_size)[image, place]  # (P, 3 * frames * patch * patch)
        grid = torch.tensor([(1, *size) for size in sizes], device="cpu")
        known: dict[str, Any] = known_of_grids(self.tower, grid, pixels.device)
        known |= {name: Groups.of(ends, pixels.device) for name, ends in known.items() if name.startswith("cu_")}
        found = self.tower(patches, grid_thw=grid, **known)
        deeper = dict(zip(sorted(self.layers), getattr(found, "deepstack_features", ()), strict=True))
        features = torch.cat([found.pooler_output, *(deeper[layer] for layer in self.layers)], dim=-1)  # (P, D')
        whole = features.new_zeros(len(pixels), self.num_tokens, features.shape[-1])
        return whole.index_put((image, place), features)[: len(images)]  # (N, F, D')


def cut(pixels: Tensor, patch: int, frames: int, merge: int = 1) -> Tensor:
    """(N, 3, H, H) -> (N, F, 3 * frames * patch * patch): patches row by row, those of ``merge`` rows and columns
    that become one token next to each other. A still image is ``frames`` equal frames.
    """
    blocks = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (N, row, column, row in token, column in token, 3, patch, patch)
    return blocks.unsqueeze(6).expand(*[-1] * 6, frames, -1, -1).flatten(5).flatten(1, 4)


def known_of_grids(tower: Any, grid: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What a Qwen tower computes of its grids (N, 3): time, rows and columns. It is computed on the CPU, where
    nothing waits for it, as the tower reads lengths as numbers; the meta device has none.
    """
    from transformers import vision_utils as known

    config = tower.config
    merge, patch = config.spatial_merge_size, config.patch_size
    with torch.device("cpu"):  # the default may be meta
        found = {"position_ids": known.get_vision_position_ids(grid, merge)}
        lengths = {"cu_seqlens": known.get_vision_cu_seqlens(grid)}
        if hasattr(tower, "window_size"):
            found["window_index"], lengths["cu_window_seqlens"] = known.get_vision_window_index(grid, merge, tower.window_size, patch)
        if hasattr(tower, "num_grid_per_side"):
            how = {"mode": tower.interpolation_mode, "align_corners": tower.interpolation_align_corners}
            taps = known.get_vision_interpolation_indices_and_weights(grid, tower.num_grid_per_side, spatial_merge_size=merge, **how)
            found |= dict(zip(("interp_indices", "interp_weights"), taps, strict=True))
    return {name: moved(value, device) for name, value in found.items()} | lengths


def qwen_settings(config: Mapping[str, Any], known: Any) -> dict[str, Any]:
    """``vision_encoder.settings`` of a tower's config.

    Args:
        known: a config of the tower's class.
    """
    return {"model_type": known.model_type} | plain_settings(known, config, UNREAD)


def _check(name: str, config: Any) -> None:
    """Refuses sizes with which the class can be built, but not run.

    Args:
        name: whose they are.
    """
    for key in ("temporal_patch_size", "window_size", "num_position_embeddings"):
        if not isinstance(value := getattr(config, key, 1), int) or value < 1:
            raise InputError(f"{name}: {key} = {show(value)}: must be a whole number above 0")
    if config.hidden_size % (4 * config.num_heads):
        raise InputError(f"{name}: hidden_size = {config.hidden_size}: must be a multiple of 4 * num_heads = {4 * config.num_heads}")
    if (rope := config.rope_parameters) != type(config)().rope_parameters:
        raise InputError(f"{name}: rope_parameters = {show(rope)}: only {type(config)().rope_parameters} can be used")
    if getattr(config, "window_size", config.patch_size) < config.patch_size:
        raise InputError(f"{name}: window_size = {config.window_size}: must be at least patch_size = {config.patch_size}")
    full = getattr(config, "fullatt_block_indexes", [])
    if any(not isinstance(layer, int) or not 0 <= layer < config.depth for layer in full):
        raise InputError(f"{name}: full_attention_layers = {show(full)} (fullatt_block_indexes): layers from 0 to {config.depth - 1}")


@torch.no_grad()
def _read(tower: nn.Module, path: Path) -> None:
    """Fills ``tower`` from the files at ``path``."""
    files, wanted = tensor_files(path), dict(tower.named_parameters())
    prefix = next((start for start in PREFIXES if f"{start}{next(iter(wanted))}" in files), "")
    if missing := [name for name in wanted if prefix + name not in files]:
        raise InputError(f"path = {str(path)!r}: of the tower's weights {len(missing)} are missing: {', '.join(missing[:3])}")
    for name, tensor in read_tensors(files, [prefix + name for name in wanted]):
        parameter = wanted[name.removeprefix(prefix)]
        if tensor.shape != parameter.shape:
            raise InputError(f"path = {str(path)!r}: {name} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(tensor)
