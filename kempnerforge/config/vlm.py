"""``[vlm]``: which architecture joins vision encoder and language model, and what is frozen when.

The loader selects the subclass by ``arch``, programs call ``VLMConfig.for_arch("mot", max_text_len=1024)``.
Without ``[vlm]`` the job is a pure text run.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, defaults, divides, more_than, one_of
from kempnerforge.config.freeze import DEFAULT_MODULE_PATTERNS, FreezeSpec, FreezeStage, aliases, named
from kempnerforge.config.sections import JobSections
from kempnerforge.config.vlm_cross_attention import CrossAttentionBlockConfig
from kempnerforge.util.errors import InputError, NotBuiltError
from kempnerforge.util.name_rules import matches_any, patterns_of
from kempnerforge.util.paths import PathText

__all__ = [
    "DEFAULT_MODULE_PATTERNS",
    "CrossAttentionConfig",
    "FreezeSpec",
    "FreezeStage",
    "JointDecoderConfig",
    "MoMaConfig",
    "MoTConfig",
    "VLMConfig",
    "aliases",
    "named",
]

MASKS = ("causal", "image_bidirectional", "prefix", "image_sees_prompt")

_RESERVED_ARCHS: frozenset[str] = frozenset()
"""Names kept for planned architectures: asking for one is a ``NotImplementedError``."""


@dataclass
class VLMConfig:
    """The keys of every architecture. Subclasses register with ``@registry.register_vlm_config``.

    Attributes:
        arch: the discriminator.
        max_text_len: text tokens of one sample at most, and the padded length of ``data.batching = "pad"``.
        freeze: what does not train. The default is the vision encoder, which then needs pretrained weights:
            to train one from scratch, say ``freeze = []``.
        freeze_schedule: what is added to it at optimizer steps; ``start_step`` strictly increasing. See
            ``freeze_at``.
        module_patterns: alias -> fnmatch patterns over parameter names. The arch's are always there; one of
            them may be given other patterns, with a warning. An alias needs patterns, and has to match.
        attention_mask: "causal"; "image_bidirectional" (the tokens of an image see each other); "prefix"
            (image and prompt see each other: PaliGemma, Beyer et al. 2024); "image_sees_prompt" (causal, an
            image sees all of the prompt: Wang et al. 2025, arXiv 2503.02597). One of several texts sees none.
        masks: no key: the values that ``attention_mask`` takes.
        stands_for: no key either: ``model_type`` in transformers of the models that it can be.

    Raises:
        ValueError: a value is out of range, or ``arch`` has another class.
    """

    masks: ClassVar[tuple[str, ...]] = MASKS
    stands_for: ClassVar[tuple[str, ...]] = ()

    arch: str = "joint_decoder"
    max_text_len: int = 512
    freeze: list[FreezeSpec] = field(default_factory=lambda: [FreezeSpec("vision_encoder")])
    freeze_schedule: list[FreezeStage] = field(default_factory=list)
    module_patterns: dict[str, list[str]] = field(default_factory=aliases)
    attention_mask: str = field(default="causal", kw_only=True)

    def __post_init__(self) -> None:
        cls = self.class_for(self.arch)
        if not isinstance(self, cls) and not (type(self) is VLMConfig and self.arch == VLMConfig.arch):
            raise InputError(f"arch = {self.arch!r}: has its own class; use VLMConfig.for_arch({self.arch!r}, ...) or {cls.__name__}")
        self.module_patterns = {**defaults(type(self))["module_patterns"], **self.module_patterns}
        if empty := [name for name, patterns in self.module_patterns.items() if not patterns]:
            raise InputError(f"module_patterns: {empty[0]} = []: an alias needs one pattern or more over parameter names")
        if self.max_text_len < 2:
            raise InputError(f"max_text_len = {self.max_text_len}: must be >= 2, room for a token and the one that ends the text")
        one_of(self, "attention_mask", self.masks)
        starts = [stage.start_step for stage in self.freeze_schedule]
        if any(b <= a for a, b in pairwise(starts)):
            raise InputError(f"freeze_schedule: start_step must be strictly monotonic, each larger than the one before, not {starts}")

    @staticmethod
    def class_for(arch: str) -> type[VLMConfig]:
        """The config class of ``arch``; errors as of ``for_arch``."""
        if arch in _RESERVED_ARCHS and arch not in registry.vlm_configs:
            raise NotBuiltError(f"arch = {arch!r}: reserved, not built yet; {registry.vlm_configs.known()}")
        return registry.vlm_configs.get(arch)

    @classmethod
    def for_arch(cls, arch: str, **kwargs: Any) -> VLMConfig:
        """The config of ``arch`` with ``kwargs`` as its fields.

        Raises:
            ValueError: ``arch`` is not registered, or a field has a bad value.
            NotImplementedError: ``arch`` is planned.
        """
        return cls.class_for(arch).in_job(arch=arch, **kwargs)

    @classmethod
    def in_job(cls, **kwargs: Any) -> VLMConfig:
        """The section of a job, as TOML and ``for_arch`` make it: what other sections can give may be
        missing.
        """
        return cls(**kwargs)

    def residual_stream_image_tokens(self, num_tokens: int) -> int:
        """How many of an image's ``num_tokens`` tokens this arch places in the residual stream."""
        return num_tokens

    def image_tokens(self, job: JobSections) -> int | None:
        """Tokens of one image after the adapter; None when only the built encoder knows.

        Raises:
            ValueError: the adapter cannot take as many features as the encoder gives.
        """
        features = job.vision_encoder.num_tokens()
        return None if features is None else job.adapter.num_tokens(features)

    @property
    def latest_image_alone(self) -> str:
        """The key and value by which a word sees the latest image alone; empty if it sees all before it."""
        return ""

    @property
    def files(self) -> str:
        """Directory or hub id of the model's processor, whose tokenizer is the default; empty without one."""
        return ""

    def check(self, job: JobSections) -> None:
        """What must hold between this section and the others; called when a job is loaded.

        Raises:
            ValueError: it does not hold.
        """

    def warnings(self, job: JobSections) -> list[str]:
        """What is allowed but may not be meant."""
        return []

    def freeze_at(self, step: int) -> list[FreezeSpec]:
        """The freeze specs that apply at optimizer step ``step``: ``freeze``, then the specs of every stage
        of ``freeze_schedule`` that has begun, in order. Of those that match a parameter the last one counts.
        """
        return [*self.freeze, *(spec for stage in self.freeze_schedule if stage.start_step <= step for spec in stage.specs)]

    def own_patterns(self) -> dict[str, list[str]]:
        """The aliases that the arch does not have, or for which it has other patterns."""
        known = defaults(type(self))["module_patterns"]
        return {name: patterns for name, patterns in self.module_patterns.items() if known.get(name) != patterns}

    def frozen(self, name: str, specs: Iterable[FreezeSpec]) -> bool:
        """Whether a parameter called ``name`` is frozen under ``specs``."""
        hits = (spec.frozen for spec in specs if matches_any(name, patterns_of(spec.module, self.module_patterns)))
        return ([False, *hits])[-1]


@registry.register_vlm_config
@dataclass
class JointDecoderConfig(VLMConfig):
    """Image tokens in one stream with the text (LLaVA: Liu et al. 2023)."""

    arch: str = "joint_decoder"


@registry.register_vlm_config
@dataclass
class CrossAttentionConfig(CrossAttentionBlockConfig, VLMConfig):
    """Image keys and values flow into gated cross-attention blocks (Flamingo: Alayrac et al. 2022).

    Attributes:
        cross_attention_every_n_layers: one such block before every n-th layer.
        cross_attention_n_heads, cross_attention_n_kv_heads: 0: as in the text backbone; ``resolved_heads``.
        cross_attention_media: which of the images before it, in its own text, a word sees. "all"; "latest":
            the last one alone (Flamingo); "latest_group": the last one and those before it that are at most
            one token apart (in Llama 3.2 Vision the token of the image itself).
        cross_attention_qk_norm: RMSNorm on each head's q and k (Llama 3.2 Vision).
        cross_attention_media_norm: RMSNorm on the media before keys and values.
        cross_attention_blind: what a block does to a word that sees no image. "feed_forward": only the
            feed-forward acts on it. "nothing" (Llama 3.2 Vision by Meta). "attention": it reads all images of
            its own text and of the shared part, later ones too, and the feed-forward does not act on it
            (Llama 3.2 Vision in transformers). Without any image the last two leave the text model as it is.
        cross_attention_seen_tokens: the first tokens of an image, as many as are seen; words that see no
            image may read the others. 0: all. (In Llama 3.2 Vision the tokens of empty tiles follow the
            tokens of the only tile.)
        unwritten_tokens: the last tokens of the vocabulary, so many, are read and never written: the head has
            no rows for them (Llama 3.2 Vision: an image's). Not with tied embeddings or ``model.new_tokens``.
    """

    stands_for: ClassVar[tuple[str, ...]] = ("mllama",)

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
        self.check_block()
        at_least(self, 1, "cross_attention_every_n_layers")
        at_least(self, 0, "cross_attention_n_heads", "cross_attention_n_kv_heads", "cross_attention_seen_tokens", "unwritten_tokens")
        one_of(self, "cross_attention_media", ("all", "latest", "latest_group"))
        one_of(self, "cross_attention_blind", ("feed_forward", "nothing", "attention"))
        if self.attention_mask.startswith("image_"):
            raise InputError(f"attention_mask = {self.attention_mask!r}: {self.arch} has no image tokens in the stream")
        if self.cross_attention_n_heads and self.cross_attention_n_kv_heads:
            divides(self, "cross_attention_n_kv_heads", "cross_attention_n_heads")

    def residual_stream_image_tokens(self, num_tokens: int) -> int:
        """0: the residual stream carries text only."""
        return 0

    @property
    def latest_image_alone(self) -> str:
        return "cross_attention_media = 'latest'" if self.cross_attention_media == "latest" else ""

    def resolved_heads(self, model_n_heads: int) -> tuple[int, int]:
        """``(n_heads, n_kv_heads)``. A zero takes the text backbone's heads; for key/value heads, the heads.

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
        heads, kv_heads = self.resolved_heads(model.n_heads)
        job.distributed.check_shared({"cross_attention_n_heads": heads, "cross_attention_n_kv_heads": kv_heads})
        if not (model.head_dim or self.cross_attention_head_dim) and model.dim % heads:
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
    """Mixture-of-Transformers (Liang et al. 2024, Algorithm 1): a set of weights per modality, one global
    attention.

    Attributes:
        mot_modalities: names of the towers, in any order, "image" and "text" among them.
        mot_image_n_heads, mot_image_n_kv_heads: 0 takes them from the text backbone, see
            ``resolved_image_heads``.
        mot_warm_start_from_text: copy the text tower into the other towers when a fresh run starts.
        mot_warm_start_path: what to load before that: a checkpoint or run directory of ours, or a Hugging
            Face directory. A job may have the weights from ``run.init_from`` instead; a config that is made
            alone needs it.
        untie: the parts that are separate in each tower: "attn" (projections, q and k norms), "ffn", "norm"
            (two a block). All other parts are shared.
        norm_placement: "pre" (before attention and feed-forward, as pretrained models have it) or "paper" (on
            what they give).
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
        if self.mot_image_n_heads and self.mot_image_n_kv_heads:
            divides(self, "mot_image_n_kv_heads", "mot_image_n_heads")
        if self.mot_warm_start_from_text and not self.mot_warm_start_path:
            raise InputError("mot_warm_start_from_text: needs mot_warm_start_path; where run.init_from has the weights, use for_arch")

    @classmethod
    def in_job(cls, *, mot_warm_start_from_text: bool = False, **kwargs: Any) -> MoTConfig:
        made = cls(**kwargs)
        made.mot_warm_start_from_text = mot_warm_start_from_text
        return made

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
        if self.resolved_image_heads(*text) != text:
            keys = f"mot_image_n_heads = {self.mot_image_n_heads}, mot_image_n_kv_heads = {self.mot_image_n_kv_heads}"
            raise InputError(f"{keys}: one attention over both modalities needs model.n_heads = {text[0]} and model.n_kv_heads = {text[1]}")

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
        image_experts, text_experts: in each layer. The first text expert is the text backbone's feed-forward layer.
        capacity_factor: an expert takes ``ceil(capacity_factor * tokens / experts)`` of a row's tokens of its
            modality. At 1 they cost what one dense layer costs; at the number of experts each takes every token.
        router_loss_weight: of the loss that trains the auxiliary routers and nothing else; it only says how much
            these routers count in the gradient's norm.
        batched_experts: a modality's experts in batched products: fewer kernels, copies of weights (docs/runs.md).
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
    batched_experts: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "image_experts", "text_experts")
        more_than(self, 0, "capacity_factor", "router_loss_weight")

    def experts(self) -> dict[str, int]:
        """Modality -> experts in each layer."""
        return {"text": self.text_experts, "image": self.image_experts}
