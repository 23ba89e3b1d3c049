"""A vision-language model of transformers as one unit: any ``AutoModelForImageTextToText`` that takes square
images as ``pixel_values`` alone, as a grid of patches (``hf_grids``), or as views or rows (``hf_views``).

Its own ``forward`` runs, after its own embedding, from a stream that is laid out as ours are: words, image
features in their places, a position and a row of the mask for each. So a mask is never left to the class
(without ``token_type_ids`` PaliGemma's hides nothing of an answer in some versions), images may be anywhere,
one image in several rows, and several texts and samples in a row are exact.

Shapes: B rows, S positions, K keys, D width, N images, F tokens of one image, T trained positions, V
vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kempnerforge.config import registry
from kempnerforge.config.lora import LORA_PARAMETERS
from kempnerforge.config.vision import square_side
from kempnerforge.config.vlm_hf import OWN_MASK, HFConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.known_features import KnownFeatures
from kempnerforge.interop.families import FAMILIES
from kempnerforge.interop.vlms import VLM_FAMILIES
from kempnerforge.model.attention import Segments, additive
from kempnerforge.model.hf_checks import check_room, class_call
from kempnerforge.model.hf_files import find_weights, load_whole, read_named_config
from kempnerforge.model.hf_towers import Clip, Dinov2, Siglip2
from kempnerforge.model.image_processor import read_image_settings
from kempnerforge.model.transfer import told
from kempnerforge.model.transformer import Cache
from kempnerforge.util.errors import InputError, cut
from kempnerforge.vlm.base import VLM, Output
from kempnerforge.vlm.hf_grids import GRID_KINDS, Grid
from kempnerforge.vlm.hf_images import Framed, Resampled, SquareImages
from kempnerforge.vlm.hf_views import Rows, Views

OWN_MASKS = {"paligemma": "prefix", "gemma3": "image_bidirectional"}
"""``model_type`` -> its mask; all others are causal."""

IMAGES: dict[str, type[SquareImages]] = {
    **dict.fromkeys(("idefics3", "smolvlm"), Framed),
    **dict.fromkeys(GRID_KINDS, Grid),
    **dict.fromkeys(("llava_next", "llava_onevision"), Views),
    "mistral3": Rows,
    "pixtral": Rows,
    "idefics2": Resampled,
}
"""``model_type`` -> how it takes images, if not as ``pixel_values`` alone. A LLaVA with Pixtral's tower is
"pixtral"."""

REFUSED = {
    "blip-2": "its forward encodes images itself and cannot begin from a stream of words and features",
    "instructblip": "its features of an image depend on the words of the prompt (qformer_input_ids)",
    "instructblipvideo": "its features of an image depend on the words of the prompt (qformer_input_ids)",
}
"""``model_type`` with ``get_image_features`` that cannot be used -> why."""

NORMALISATIONS = {kind: family.normalisation for family in (Siglip2, Clip, Dinov2) for kind in family.models}
"""``model_type`` of a vision tower -> what its family takes."""


@registry.register_arch("hf")
class HF(VLM):
    """``[vlm].path`` as transformers builds it; parameters have the names that they have there.

    Raises:
        ValueError: no such model, it takes more than square images, or does not fit the job.
    """

    def build(self) -> None:
        cfg = self.config
        model = _build(cfg.path)
        # NOTE: the model itself stays outside the module tree and its children are adopted, so no name gets a
        # prefix.
        self.__dict__["hf_model"] = model
        for name, child in model.named_children():
            self.add_module(name, child)
        if {id(p) for p in self.parameters()} != {id(p) for p in model.parameters()}:
            raise InputError(f"path = {cfg.path!r}: {type(model).__name__} has parameters outside of its parts and cannot be used")
        self.kind: str = model.config.model_type
        self.images: SquareImages = _taken(model.config)("vlm.image_size", model, cfg.image_size)
        self._image_size, self._normalisation = _image_geometry(cfg, model)
        self.num_image_tokens = self._count_image_tokens()
        self._check_room()

    @property
    def config(self) -> HFConfig:
        """The ``[vlm]`` section."""
        assert isinstance(self.job.vlm, HFConfig), "the loader makes the section of the arch's own class"
        return self.job.vlm

    @property
    def attention_mask(self) -> str:
        asked = self.config.attention_mask
        return OWN_MASKS.get(self.kind, "causal") if asked == OWN_MASK else asked

    @property
    def image_size(self) -> int:
        return self._image_size

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self._normalisation

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, H) uint8 -> fp32, the views that the class takes of them."""
        mean, std = (told(values, images.device).view(3, 1, 1) for values in self.normalisation)
        return self.images.cut(images).float().div_(255).sub_(mean).div_(std)

    def with_image_ids(self, batch: Batch, image_id: int) -> Tensor:
        return self.images.ids(batch, image_id)

    def encode(self, images: Tensor, known: KnownFeatures | None = None, grids: Sequence[tuple[int, int]] = (), **told: Any) -> Tensor:
        assert known is None and not grids and not told, "the config refuses a feature cache, and cell is 0"
        return self.images.features(self.normalise(images).to(self.hf_model.get_input_embeddings().weight.dtype))

    def forward(self, batch: Batch, cache: Cache | None = None) -> Output:
        words = self.hf_model.get_input_embeddings()(batch.input_ids)  # (B, S, D)
        features = None
        if batch.images is not None:
            images = batch.images if len(batch.images) else batch.images.new_zeros(1, *batch.images.shape[1:])
            features = self.encode(images)  # (N, F, D)
        deeper: list[Tensor] = []
        if features is not None:
            features, *deeper = features.split(words.shape[-1], dim=-1)
        stream = self.insert(words, features, batch)
        if cache is not None:
            logits = self._logits(stream, batch, cache, deeper)  # (B, V)
            return Output(logits.new_zeros(()), logits)
        if not self.in_pieces(batch):
            return self.score(self._logits(stream, batch, None, deeper), batch)
        rows: list[Tensor] = []
        self._logits(stream, batch, None, deeper, apart=rows)
        head = self.hf_model.get_output_embeddings()
        return self.score_stream(rows[0], batch, lambda x: head(x).float())

    def _logits(
        self, stream: Tensor, batch: Batch, cache: Cache | None, deeper: Sequence[Tensor], apart: list[Tensor] | None = None
    ) -> Tensor:
        """(B, S, D) -> (T, V) at the targets; with a cache (B, V) at the last position. The head runs on no
        others.

        Args:
            deeper: (N, F, D) each, what is added to the image tokens after the first layers.
            apart: gets what the head would read, (T, D), and the head runs on nothing.

        Raises:
            InputError: ``apart``, and the class changes what its head gives.
        """
        segments, past = replace(self.segments(batch), positions=batch.positions), None
        self.hf_model.training = self.training  # it is outside of the module tree
        if cache is not None:
            cache.segments = segments = segments if cache.segments is None else cache.segments.extend(segments)
            past = cache.kept.setdefault("past", _empty_cache())

        def chosen(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            rows = args[0].flatten(0, 1)[batch.targets] if cache is None else args[0][:, -1]  # (T, D) or (B, D)
            if apart is None:
                return (rows,)
            apart.append(rows)
            return (rows[:0],)

        from_head: list[Tensor] = []

        masks = self._masks(segments, stream)
        mask = next(iter(masks.values()))

        def masked(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, named | {"attention_mask": masks if len(masks) > 1 else mask}

        def deepened(features: Tensor) -> Callable[..., Tensor]:
            added = self.insert(torch.zeros_like(stream), features, batch)  # (B, S, D)
            return lambda _, args, out: out + added

        # NOTE: not every class with images hands several masks down
        decoder = self.hf_model.get_decoder()
        handles = [
            self.hf_model.get_output_embeddings().register_forward_pre_hook(chosen),
            self.hf_model.get_output_embeddings().register_forward_hook(lambda _, args, out: from_head.append(out)),
            decoder.register_forward_pre_hook(masked, with_kwargs=True),
            *(layer.register_forward_hook(deepened(each)) for layer, each in zip(decoder.layers, deeper, strict=False)),
        ]
        try:
            found = self.hf_model(
                inputs_embeds=stream,
                attention_mask=mask,
                position_ids=self.images.positions(batch, cache),
                past_key_values=past,
                use_cache=past is not None,
            )
        finally:
            for handle in handles:
                handle.remove()
        if apart is not None and found.logits is not from_head[0]:
            name, at_once = type(self.hf_model).__name__, self.logits_at_once
            raise InputError(f"train.logits_at_once = {at_once}: {name} changes what its head gives, by a softcap or a scale; set it to 0")
        return found.logits.float()

    def _masks(self, segments: Segments, stream: Tensor) -> dict[str, Tensor]:
        """(B, 1, S, K) for each kind of layer that there is."""
        text = self.hf_model.config.get_text_config()
        window = getattr(text, "sliding_window", None) or 0
        kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"]) if window else {"full_attention"}
        visible = {kind: segments.visible(stream.shape[1], window if kind == "sliding_attention" else 0) for kind in kinds}
        return {kind: additive(seen, stream.dtype) for kind, seen in visible.items()}

    def warm_start(self) -> None:
        """The weights at ``path``, read with the class's own rules, but none may be missing or left over."""
        cfg = self.config
        if not cfg.pretrained or self.job.run.init_from:
            return
        parameters = {name: p for name, p in self.named_parameters() if name.rpartition(".")[2] not in LORA_PARAMETERS}
        what = "its weights cannot be loaded (pretrained = false begins without)"
        self.loaded |= parameters.keys()
        if torch.get_default_device().type == "meta":
            find_weights(cfg.path, f"path = {cfg.path!r}: {what}")
            return
        for parameter in parameters.values():
            parameter.data = parameter.data.new_empty(0)  # room for those that are read
        loaded = dict(load_whole(type(self.hf_model), cfg.path, f"path = {cfg.path!r}", what).named_parameters())
        assert loaded.keys() == parameters.keys(), "one class, one config, one set of names"
        for name, parameter in parameters.items():
            parameter.data = loaded[name].data

    def shard_units(self) -> Iterator[nn.Module]:
        """The layers of the language model and of the vision encoder: whatever transformers itself would
        checkpoint one by one.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        inside: set[int] = set()
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
                inside |= {id(child) for child in module.modules()}
                yield module

    def _count_image_tokens(self) -> int:
        """Tokens of one image: what a blank one gives, which must be what the model's config says.

        Raises:
            ValueError: the model takes more than pixels, or its config says another number.
        """
        where, is_known = f"path = {self.config.path!r}", type(self.images) is not SquareImages
        takes, name = inspect.signature(self.hf_model.get_image_features).parameters.values(), type(self.hf_model).__name__
        needed = [p.name for p in takes if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "pixel_values"]
        if needed and not is_known:
            raise InputError(f"{where}: {name} needs {', '.join(needed)} beside pixel_values; only square images are given")
        device = self.hf_model.get_input_embeddings().weight.device
        blank = self.normalise(torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=device))
        what, given = f"{name} does not take square images as pixel_values alone", self.hf_model.config.to_dict()
        try:
            with class_call(where, what, given), torch.no_grad():
                features = self.images.features(blank)
        except InputError as error:
            also = [p.name for p in takes if p.default is None and "Tensor" in str(p.annotation) and p.name != "pixel_values"]
            if not also or is_known:
                raise
            said = f"{where}: {what}" if "NoneType" in str(error) else error  # then it lacks what it is not given
            raise InputError(f"{said}: it reads {', '.join(also)} as well, which arch = 'hf' does not give it") from error
        width = self.hf_model.get_input_embeddings().weight.shape[1]
        wide = features.shape[-1] // width if self.images.adds_features else 1
        if features.ndim != 3 or len(features) != 1 or features.shape[2] != wide * width:
            raise InputError(f"{where}: one image gives features of shape {tuple(features.shape)}; must be (1, tokens, {width})")
        config = self.hf_model.config
        for key in self.images.counted:
            part = config.get_text_config() if key == "num_image_tokens" else config
            if (stated := getattr(part, key, None)) is not None and stated != features.shape[1]:
                raise InputError(f"{where}: an image gives {features.shape[1]} tokens, but {key} = {stated} in its config.json")
        return features.shape[1]

    def _check_room(self) -> None:
        """
        Raises:
            ValueError: the model has too few positions or token embeddings for the job.
        """
        where, text, job = f"path = {self.config.path!r}", self.hf_model.config.get_text_config(), self.job.model
        limit = getattr(text, "max_position_embeddings", None)
        if limit is not None and job.max_seq_len > limit:
            raise InputError(f"{where}: it sees {limit} positions (max_position_embeddings), model.max_seq_len = {job.max_seq_len} is more")
        if other := set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}:
            raise InputError(f"{where}: has layers with {', '.join(sorted(other))}, for which there is no mask here")
        rows, wanted = self.hf_model.get_input_embeddings().weight.shape[0], job.vocab_size + len(job.new_tokens)
        if wanted > rows:
            raise InputError(
                f"{where}: its embedding has {rows} rows, and the tokenizer {wanted} tokens, {len(job.new_tokens)} of them new"
            )


# ---- files ---------------------------------------------------------------------------------------


def _build(path: str) -> Any:
    """The class that ``path`` names, with random weights in fp32."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

    read, where = read_named_config(path), f"path = {path!r}"
    kind = cut(repr(read.get("model_type")))
    if "auto_map" in read and read.get("model_type") not in CONFIG_MAPPING:
        raise InputError(f"{where}: model_type {kind} is code in the directory (auto_map in its config.json), which is not run")
    with class_call(where, f"its config.json, of model_type {kind}, cannot be used", read):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        instead = "; it is a language model, which `kempnerforge import` and run.init_from read" if config.model_type in FAMILIES else ""
        raise InputError(f"{where}: model_type {kind} is no model of transformers that reads images and words and writes words{instead}")
    model_class: Any = AutoModelForImageTextToText._model_mapping[type(config)]
    if not hasattr(model_class, "get_image_features"):
        instead = "; `kempnerforge import` reads it" if config.model_type in VLM_FAMILIES else ""
        raise InputError(
            f"{where}: {model_class.__name__} gives no features of images that could be placed among words (it has no "
            f"get_image_features), which arch = 'hf' needs{instead}"
        )
    if config.model_type in REFUSED:
        raise InputError(f"{where}: {model_class.__name__} cannot be used by arch = 'hf': {REFUSED[config.model_type]}")
    what, given = f"{model_class.__name__} cannot be built", config.to_dict()
    check_room(lambda: model_class._from_config(config), where, what, given)
    with class_call(where, what, given):
        model = model_class._from_config(config, dtype=torch.float32)
    if model.get_output_embeddings() is None:
        raise InputError(f"{where}: {model_class.__name__} writes no words: it has no output embedding")
    return model.float()


def _taken(config: Any) -> type[SquareImages]:
    """How the class of ``config`` takes images."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    return IMAGES.get(tower if (config.model_type, tower) == ("llava", "pixtral") else config.model_type, SquareImages)


def _image_geometry(cfg: HFConfig, model: Any) -> tuple[int, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Pixels along a side, and the normalisation."""
    path, vision = cfg.path, getattr(model.config, "vision_config", None)
    kind = model.config.model_type
    size = cfg.image_size if _taken(model.config).any_size else getattr(vision, "image_size", None)
    if vision is None or size is None:
        raise InputError(f"path = {path!r}: {type(model).__name__} does not say how large its images are (vision_config.image_size)")
    files = read_image_settings(path)
    known = GRID_KINDS.get(kind) or NORMALISATIONS.get(vision.model_type)
    found = files.normalisation if files and files.normalisation else known
    if found is None:
        raise InputError(
            f"path = {path!r}: has no image processor's config (preprocessor_config.json), so how to normalise images is not known"
        )
    side = square_side(f"path = {path!r}: vision_config.image_size", size)
    if cfg.image_size not in (0, side):
        raise InputError(f"image_size = {cfg.image_size}: the images of path = {path!r} have {side} pixels along a side; leave it out")
    return side, (tuple(found[0]), tuple(found[1]))


def _empty_cache() -> Any:
    """Keys and values of all positions for every layer: which of them a layer sees, the mask says."""
    from transformers import DynamicCache

    return DynamicCache()
