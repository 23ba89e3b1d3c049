"""``[vlm]``: which architecture joins the vision encoder to the language model, how long its texts are, and what is frozen when.

``arch`` selects the subclass: from TOML the loader does it, programs call ``VLMConfig.for_arch("mot", max_text_len=1024)``.
When ``[vlm]`` is absent the job is a pure text run.
"""

from __future__ import annotations

import keyword
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from kempnerforge.config import registry
from kempnerforge.config.adapter import MLPAdapterConfig
from kempnerforge.config.arch import MASKS, JobSections, VLMConfig
from kempnerforge.config.checks import at_least, more_than, one_of
from kempnerforge.config.freeze import DEFAULT_MODULE_PATTERNS, FreezeSpec, FreezeStage, aliases, named
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.vision import ViTConfig
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import PathText

__all__ = [
    "DEFAULT_MODULE_PATTERNS",
    "CrossAttentionConfig",
    "FreezeSpec",
    "FreezeStage",
    "HFConfig",
    "JointDecoderConfig",
    "MoMaConfig",
    "MoTConfig",
    "VLMConfig",
    "aliases",
    "named",
]


@registry.register_vlm_config
@dataclass
class JointDecoderConfig(VLMConfig):
    """Image tokens in one stream with the text (LLaVA: Liu et al. 2023)."""

    arch: str = "joint_decoder"


@registry.register_vlm_config
@dataclass
class CrossAttentionConfig(VLMConfig):
    """Image keys and values flow into gated cross-attention blocks (Flamingo: Alayrac et al. 2022).

    Attributes:
        cross_attention_every_n_layers: one such block before every n-th layer.
        cross_attention_n_heads, cross_attention_n_kv_heads: 0 takes them from the text backbone, see ``resolved_heads``.
        cross_attention_media: which images before it in its own text a word sees: "all" of them, or the "latest" alone. With "latest", of
            two images in front of the same word only the second is ever seen; Flamingo's data has one image for each stretch of text. With
            "latest_group" it is seen with those before it that follow one another within a token each, which is that of the image itself in
            Llama 3.2 Vision.
        cross_attention_qk_norm: RMSNorm on each head's q and k (Llama 3.2 Vision).
        cross_attention_media_norm: RMSNorm on the media before keys and values.
        cross_attention_blind: what a block does to a word that sees no image. "feed_forward": the word reads nothing, and the feed-forward
            acts on it all the same. "nothing": neither of the two (Llama 3.2 Vision as Meta has it). "attention": it reads all images of its
            own text and of what that shares, later ones too, and the feed-forward leaves it alone (Llama 3.2 Vision in transformers). Where
            there is no image at all the last two leave the text model as it is.
        cross_attention_seen_tokens: of the tokens of an image so many are seen, the first; words that see no image may read the others. 0:
            all. (After the only tile of an image in Llama 3.2 Vision stand those of empty ones.)
        unwritten_tokens: so many tokens, the last of the vocabulary, are read and never written: the output head has no rows for them (the
            token of an image in Llama 3.2 Vision). Not with ``model.tie_embeddings`` or ``model.new_tokens``.
    """

    stands_for: ClassVar[str] = "mllama"

    arch: str = "cross_attention"
    module_patterns: dict[str, list[str]] = field(
        default_factory=lambda: aliases(cross_attention=named("transformer.layers.*.cross_attention"))
    )
    cross_attention_every_n_layers: int = 4
    cross_attention_n_heads: int = 0
    cross_attention_n_kv_heads: int = 0
    cross_attention_media: str = field(default="all", kw_only=True)
    cross_attention_qk_norm: bool = field(default=False, kw_only=True)
    cross_attention_media_norm: bool = field(default=True, kw_only=True)
    cross_attention_blind: str = field(default="feed_forward", kw_only=True)
    cross_attention_seen_tokens: int = field(default=0, kw_only=True)
    unwritten_tokens: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "cross_attention_every_n_layers")
        at_least(self, 0, "cross_attention_n_heads", "cross_attention_n_kv_heads", "cross_attention_seen_tokens", "unwritten_tokens")
        one_of(self, "cross_attention_media", ("all", "latest", "latest_group"))
        one_of(self, "cross_attention_blind", ("feed_forward", "nothing", "attention"))
        if self.attention_mask == "image_bidirectional":
            raise InputError(f"attention_mask = {self.attention_mask!r}: {self.arch} has no image tokens in the stream")
        heads, kv = self.cross_attention_n_heads, self.cross_attention_n_kv_heads
        if heads and kv and heads % kv:
            raise InputError(f"cross_attention_n_kv_heads = {kv}: must divide cross_attention_n_heads = {heads}")

    def residual_stream_image_tokens(self, num_tokens: int) -> int:
        """0: the residual stream carries text only."""
        return 0

    @property
    def latest_image_alone(self) -> str:
        return "cross_attention_media = 'latest'" if self.cross_attention_media == "latest" else ""

    def resolved_heads(self, model_n_heads: int) -> tuple[int, int]:
        """``(n_heads, n_kv_heads)`` with zeros resolved: heads from the text backbone, key/value heads from the heads.

        Raises:
            ValueError: the backbone has no heads, or the key/value heads do not divide the heads.
        """
        _positive("model_n_heads", model_n_heads)
        heads = self.cross_attention_n_heads or model_n_heads
        kv = self.cross_attention_n_kv_heads or heads
        if heads % kv:
            source = "cross_attention_n_heads" if self.cross_attention_n_heads else "model.n_heads, as cross_attention_n_heads = 0"
            raise InputError(f"cross_attention_n_kv_heads = {kv}: must divide the {heads} heads of cross-attention ({source})")
        return heads, kv

    def check(self, job: JobSections) -> None:
        every, model = self.cross_attention_every_n_layers, job.model
        if every > model.n_layers:
            raise InputError(f"cross_attention_every_n_layers = {every}: gives no block in model.n_layers = {model.n_layers} layers")
        heads, _ = self.resolved_heads(model.n_heads)
        if not model.head_dim and model.dim % heads:
            raise InputError(f"cross_attention_n_heads = {heads}: must divide model.dim = {model.dim}, or set model.head_dim")
        if self.unwritten_tokens and (model.tie_embeddings or model.new_tokens):
            reason = f"model.new_tokens = {model.new_tokens}" if model.new_tokens else "model.tie_embeddings = true"
            raise InputError(f"unwritten_tokens = {self.unwritten_tokens}: are in the embedding and not in the head; not with {reason}")

    def warnings(self, job: JobSections) -> list[str]:
        """Gates start closed, and through closed ones no gradient reaches the adapter or the encoder."""
        block = f"transformer.layers.{self.cross_attention_every_n_layers - 1}.cross_attention"
        gates = [f"{block}.{part}" for part in ("attention_gate", "mlp_gate")]
        if job.run.init_from or not all(self.frozen(gate, job.freeze_at(0)) for gate in gates):
            return []
        return ["the gates of cross_attention start closed and frozen: adapter and encoder get no gradient; thaw cross_attention with them"]


UNTIE = ("ffn", "attn", "norm")
"""What the towers of ``mot`` may have apart."""

BLOCK_PARTS = ("attention", "attention_norm", "mlp", "mlp_norm", "cfg", "layer", "rope", "scale", "softcap")
"""Names inside a block, which no tower can have."""


@registry.register_vlm_config
@dataclass
class MoTConfig(VLMConfig):
    """Mixture-of-Transformers (Liang et al. 2024, Algorithm 1): a set of weights per modality, one global attention.

    Attributes:
        mot_modalities: names of the towers, in any order, "image" and "text" among them.
        mot_image_n_heads, mot_image_n_kv_heads: 0 takes them from the text backbone, see ``resolved_image_heads``.
        mot_warm_start_from_text: copy the text tower into the other towers when a fresh run starts.
        mot_warm_start_path: what to load before that: a checkpoint or run directory of ours, or a Hugging Face directory. By TOML and
            ``for_arch`` it may be empty, as a job can have text weights from ``run.init_from``; a config that is alone needs it.
        untie: what every tower has for itself: "attn" (projections, q and k norms), "ffn", "norm" (two a block). The rest is shared.
        norm_placement: "pre" (before attention and feed-forward, as pretrained models have it) or "paper" (on what they give).
    """

    arch: str = "mot"
    module_patterns: dict[str, list[str]] = field(default_factory=lambda: aliases(mot=named("transformer.layers")))
    mot_modalities: tuple[str, ...] = ("image", "text")
    mot_image_n_heads: int = 0
    mot_image_n_kv_heads: int = 0
    mot_warm_start_from_text: bool = False
    mot_warm_start_path: PathText = ""
    untie: list[str] = field(default_factory=lambda: list(UNTIE), kw_only=True)
    norm_placement: str = field(default="pre", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = list(self.mot_modalities)
        objections = {
            "must have at least 2 entries": len(names) < 2,
            "must include 'text'": "text" not in names,
            "must include 'image'": "image" not in names,
            "must not have duplicates": len(set(names)) != len(names),
        }
        if found := [text for text, wrong in objections.items() if wrong]:
            raise InputError(f"mot_modalities = {names}: {', '.join(found)}")
        taken = lambda name: keyword.iskeyword(name) or name.startswith("_") or name in BLOCK_PARTS
        if bad := [name for name in names if not name.isidentifier() or taken(name)]:
            rule = f"use a Python identifier, none of {', '.join(BLOCK_PARTS)}"
            raise InputError(f"mot_modalities = {names}: {bad[0]!r} cannot name a tower; {rule}")
        if not self.untie or len(set(self.untie)) != len(self.untie) or not set(self.untie) <= set(UNTIE):
            raise InputError(f"untie = {self.untie}: needs one or more of {', '.join(repr(part) for part in UNTIE)}, each once")
        one_of(self, "norm_placement", ("pre", "paper"))
        at_least(self, 0, "mot_image_n_heads", "mot_image_n_kv_heads")
        heads, kv = self.mot_image_n_heads, self.mot_image_n_kv_heads
        if heads and kv and heads % kv:
            raise InputError(f"mot_image_n_kv_heads = {kv}: must divide mot_image_n_heads = {heads}")
        if self.mot_warm_start_from_text and not self.mot_warm_start_path:
            raise InputError("mot_warm_start_from_text: needs mot_warm_start_path; where run.init_from has the weights, use for_arch")

    @classmethod
    def in_job(cls, *, mot_warm_start_from_text: bool = False, **kwargs: Any) -> MoTConfig:
        made = cls(**kwargs)
        made.mot_warm_start_from_text = mot_warm_start_from_text
        return made

    @property
    def names_weights(self) -> bool:
        return self.mot_warm_start_from_text and bool(self.mot_warm_start_path)

    def resolved_image_heads(self, model_n_heads: int, model_n_kv_heads: int = 0) -> tuple[int, int]:
        """``(n_heads, n_kv_heads)`` of the image tower, zeros resolved against the text backbone's.

        Raises:
            ValueError: the backbone has no heads.
        """
        _positive("model_n_heads", model_n_heads)
        heads = self.mot_image_n_heads or model_n_heads
        return heads, self.mot_image_n_kv_heads or model_n_kv_heads or heads

    def check(self, job: JobSections) -> None:
        text = (job.model.n_heads, job.model.kv_heads)
        image = self.resolved_image_heads(*text)
        if image != text:
            own = f"mot_image_n_heads = {self.mot_image_n_heads}, mot_image_n_kv_heads = {self.mot_image_n_kv_heads}"
            raise InputError(f"{own}: one attention over both modalities needs model.n_heads = {text[0]} and model.n_kv_heads = {text[1]}")

    def warnings(self, job: JobSections) -> list[str]:
        path, asked = self.mot_warm_start_path, self.mot_warm_start_from_text
        if path and not asked:
            return [f"vlm.mot_warm_start_path = {path!r}: is not read, as mot_warm_start_from_text = false"]
        if asked and not path and not job.run.init_from:
            return ["vlm.mot_warm_start_from_text = true: without mot_warm_start_path or run.init_from the copied text tower is random"]
        return []


def _positive(name: str, heads: int) -> None:
    if heads < 1:
        raise ValueError(f"{name} = {heads}: must be positive, a model has at least one head")


@registry.register_vlm_config
@dataclass
class MoMaConfig(VLMConfig):
    """Groups of experts per modality; an expert chooses its tokens (MoMa: Lin et al. 2024).

    Attributes:
        image_experts, text_experts: in each layer. The first text expert is the feed-forward layer of the text backbone.
        capacity_factor: an expert takes ``ceil(capacity_factor * tokens / experts)`` of the tokens that a row has of its modality. At 1 the
            feed-forward layers cost what one dense layer costs; at the number of experts every expert takes every token.
        router_loss_weight: of the loss that trains the auxiliary routers. The rest of the model gets no gradient from it; the weight only
            says how much these routers count in the gradient's norm.
    """

    arch: str = "moma"
    module_patterns: dict[str, list[str]] = field(
        default_factory=lambda: aliases(
            experts=named("transformer.layers.*.experts"),
            routers=named("transformer.layers.*.routers", "transformer.layers.*.auxiliary_routers"),
        )
    )
    image_experts: int = 2
    text_experts: int = 2
    capacity_factor: float = 1.0
    router_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "image_experts", "text_experts")
        more_than(self, 0, "capacity_factor", "router_loss_weight")

    def experts(self) -> dict[str, int]:
        """Modality -> experts in each layer."""
        return {"text": self.text_experts, "image": self.image_experts}


OWN_MASK = "model"
"""The value of ``attention_mask`` that is what the class has learned with."""
KEPT_KEYS = ("max_seq_len", "vocab_size", "new_tokens")
"""Of ``[model]``: those that hold for a model of transformers, too. (The tokenizer sets the second, and may set the third.)"""


@registry.register_vlm_config
@dataclass
class HFConfig(VLMConfig):
    """A whole model of transformers. Sizes and normalisation come from its files: ``[vision_encoder]`` and ``[adapter]`` are not read, and of
    ``[model]`` only ``max_seq_len`` and ``new_tokens``, which the model must have room for.

    Attributes:
        attention_mask: "model" is what the class was trained with: "prefix" for PaliGemma, "image_bidirectional" for Gemma 3, else "causal".
        path: a directory with ``config.json``, the image processor's config and a tokenizer (and weights), or a hub id where there is a network.
        pretrained: a fresh run begins with the weights there, unless ``run.init_from`` names others; false: with random ones.
    """

    masks: ClassVar[tuple[str, ...]] = (OWN_MASK, *MASKS)

    arch: str = "hf"
    module_patterns: dict[str, list[str]] = field(
        default_factory=lambda: {
            "transformer": named("model.language_model", "model.text_model", "language_model", "lm_head"),
            "vision_encoder": named(
                "model.vision_tower",
                "model.vision_model",
                *(f"model.visual.{part}" for part in ("patch_embed", "blocks", "pos_embed", "rotary_pos_emb")),
            ),
            "adapter": named("model.multi_modal_projector", "model.connector", "model.visual.merger", "model.visual.deepstack_merger_list"),
        }
    )
    attention_mask: str = field(default=OWN_MASK, kw_only=True)
    path: PathText = field(default="", kw_only=True)
    pretrained: bool = field(default=True, kw_only=True)

    def image_tokens(self, job: JobSections) -> None:
        """None: the built model knows."""
        return

    @property
    def files(self) -> str:
        return self.path

    @property
    def names_weights(self) -> bool:
        return self.pretrained

    def check(self, job: JobSections) -> None:
        if not self.path:
            raise InputError(f"path = '': arch {self.arch!r} needs a directory or a hub id")
        kept = {key: getattr(job.model, key) for key in KEPT_KEYS}
        sections = {
            "model": (job.model, ModelConfig(**kept)),
            "vision_encoder": (job.vision_encoder, ViTConfig()),
            "adapter": (job.adapter, MLPAdapterConfig()),
        }
        for name, (given, default) in sections.items():
            if given != default:
                same = type(given) is type(default)
                keys = [f.name for f in fields(given) if not same or getattr(given, f.name) != getattr(default, f.name)]
                raise InputError(f"arch = {self.arch!r}: takes its sizes from path = {self.path!r} and does not read {name}.{keys[0]}")
        if job.train.feature_cache:
            raise InputError(f"arch = {self.arch!r}: keeps no features of images; set train.feature_cache = ''")
