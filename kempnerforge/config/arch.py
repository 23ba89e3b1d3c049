"""What the section ``[vlm]`` has for every architecture; ``config/vlm.py`` has one class for each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, ClassVar, Protocol

from kempnerforge.config import registry
from kempnerforge.config.adapter import AdapterConfig
from kempnerforge.config.checks import one_of
from kempnerforge.config.freeze import FreezeSpec, FreezeStage, aliases
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.training import RunConfig, TrainConfig
from kempnerforge.config.vision import VisionEncoderConfig
from kempnerforge.util.errors import InputError, NotBuiltError

MASKS = ("causal", "image_bidirectional", "prefix")

_RESERVED_ARCHS: frozenset[str] = frozenset()
"""Names kept for architectures that are planned; asking for one is a ``NotImplementedError``, for anything else unknown a ``ValueError``."""


class JobSections(Protocol):
    """What a ``[vlm]`` section may read of its job; a ``JobConfig`` is one."""

    run: RunConfig
    model: ModelConfig
    vision_encoder: VisionEncoderConfig
    adapter: AdapterConfig
    train: TrainConfig

    def freeze_at(self, step: int) -> tuple[FreezeSpec, ...]:
        """The freeze specs in force at ``step``."""
        ...


@dataclass
class VLMConfig:
    """What every architecture has. Subclasses register with ``@registry.register_vlm_config`` and set ``arch``'s default.

    Attributes:
        arch: the discriminator.
        max_text_len: text tokens of one sample at most, and the padded length of ``data.batching = "pad"``.
        freeze: what does not train. The default is the vision encoder, which then needs pretrained weights: to train one from scratch, say
            ``freeze = []``.
        freeze_schedule: what is added to it at optimizer steps; ``start_step`` strictly increasing. See ``freeze_at``.
        module_patterns: alias -> fnmatch patterns over parameter names. Those of the arch are always there, with other patterns if given.
        attention_mask: "causal"; "image_bidirectional" (the tokens of an image see each other); "prefix" (image and prompt see each
            other: PaliGemma, Beyer et al. 2024; of several texts of one image it sees none, they must not meet there).
        masks: no key, but a fact about the class: the values that ``attention_mask`` takes.
        stands_for: no key either: ``model_type`` of the class in transformers that has blocks of this arch's own kind, if one has.

    Raises:
        ValueError: a value is out of range, or ``arch`` belongs to another class than the one constructed.
    """

    masks: ClassVar[tuple[str, ...]] = MASKS
    stands_for: ClassVar[str] = ""

    arch: str = "joint_decoder"
    max_text_len: int = 512
    freeze: list[FreezeSpec] = field(default_factory=lambda: [FreezeSpec("vision_encoder")])
    freeze_schedule: list[FreezeStage] = field(default_factory=list)
    module_patterns: dict[str, list[str]] = field(default_factory=aliases)
    attention_mask: str = field(default="causal", kw_only=True)

    def __post_init__(self) -> None:
        cls = self.class_for(self.arch)
        if not isinstance(self, cls) and not (type(self) is VLMConfig and self.arch == VLMConfig.arch):
            raise InputError(f"arch = {self.arch!r}: has a class of its own; use VLMConfig.for_arch({self.arch!r}, ...) or {cls.__name__}")
        patterns = next(f.default_factory for f in fields(self) if f.name == "module_patterns")
        assert callable(patterns), "module_patterns has a default_factory in every class"
        self.module_patterns = {**patterns(), **self.module_patterns}
        if self.max_text_len < 2:
            raise InputError(f"max_text_len = {self.max_text_len}: must be >= 2, room for a token and the one that ends the text")
        one_of(self, "attention_mask", self.masks)
        starts = [stage.start_step for stage in self.freeze_schedule]
        if any(b <= a for a, b in pairwise(starts)):
            raise InputError(f"freeze_schedule: start_step must be strictly monotonic, each larger than the one before, not {starts}")

    @staticmethod
    def class_for(arch: str) -> type[VLMConfig]:
        """The config class of ``arch``.

        Raises:
            ValueError: ``arch`` is not registered.
            NotImplementedError: ``arch`` is reserved for later.
        """
        if arch in _RESERVED_ARCHS and arch not in registry.vlm_configs:
            raise NotBuiltError(f"arch = {arch!r}: reserved, not built yet; {registry.vlm_configs.known()}")
        return registry.vlm_configs.get(arch)

    @classmethod
    def for_arch(cls, arch: str, **kwargs: Any) -> VLMConfig:
        """The config of ``arch`` with ``kwargs`` as its fields.

        Raises:
            ValueError: ``arch`` is not registered, or a field has a bad value.
            NotImplementedError: ``arch`` is reserved for later.
        """
        return cls.class_for(arch).in_job(arch=arch, **kwargs)

    @classmethod
    def in_job(cls, **kwargs: Any) -> VLMConfig:
        """The section of a job, as TOML and ``for_arch`` make it: what other sections can give may be missing."""
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
        """The key and value by which a word sees the image before it and no earlier one; nothing if it sees them all."""
        return ""

    @property
    def files(self) -> str:
        """A directory or hub id with the files of the model's own processor, if it has one: its tokenizer is taken unless ``data.tokenizer``
        names another.
        """
        return ""

    @property
    def names_weights(self) -> bool:
        """Whether this section names files with weights that a fresh run begins with."""
        return False

    def check(self, job: JobSections) -> None:
        """What must hold between this section and the others; called when a job is loaded.

        Raises:
            ValueError: it does not hold.
        """

    def warnings(self, job: JobSections) -> list[str]:
        """What is allowed but may not be meant."""
        return []

    def freeze_at(self, step: int) -> list[FreezeSpec]:
        """The freeze specs in force at optimizer step ``step``: ``freeze``, then those of every stage of ``freeze_schedule`` that has begun, in
        order. Of those that match a parameter the last one counts.
        """
        return [*self.freeze, *(spec for stage in self.freeze_schedule if stage.start_step <= step for spec in stage.specs)]

    def frozen(self, name: str, specs: Iterable[FreezeSpec]) -> bool:
        """Whether a parameter called ``name`` is frozen under ``specs``."""
        hits = (spec.frozen for spec in specs if any(fnmatchcase(name, p) for p in self.module_patterns.get(spec.module, [spec.module])))
        return ([False, *hits])[-1]
