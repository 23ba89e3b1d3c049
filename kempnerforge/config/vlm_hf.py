"""``[vlm]`` with ``arch = "hf"``: a whole vision-language model of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.config.adapter import MLPAdapterConfig
from kempnerforge.config.checks import at_least
from kempnerforge.config.freeze import named
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.sections import JobSections
from kempnerforge.config.vision import ViTConfig
from kempnerforge.config.vlm import MASKS, VLMConfig
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import PathText

OWN_MASK = "model"
"""The value of ``attention_mask`` that selects the mask of the class, with which it was trained."""
KEPT_KEYS = ("max_seq_len", "vocab_size", "new_tokens")
"""Keys of ``[model]`` that apply to a model of transformers, too. (The tokenizer sets the second, and may set
the third.)
"""


@registry.register_vlm_config
@dataclass
class HFConfig(VLMConfig):
    """A whole model of transformers. Sizes and normalisation come from its files: ``[vision_encoder]`` and
    ``[adapter]`` are not read, and of ``[model]`` only ``max_seq_len`` and ``new_tokens``, which the model
    must have room for.

    Attributes:
        attention_mask: "model" is what the class was trained with: "prefix" for PaliGemma,
            "image_bidirectional" for Gemma 3, else "causal".
        path: a directory with ``config.json``, the image processor's config and a tokenizer (and weights), or
            a hub id where there is a network.
        image_size: pixels along a side of all images, for a model that takes any size (Qwen2-VL and later,
            LLaVA-NeXT, LLaVA-OneVision, Mistral 3); 0: the one of the model.
        pretrained: a fresh run begins with the weights there, unless ``run.init_from`` names others; false:
            with random ones.
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
            "adapter": named(
                *("model.multi_modal_projector", "model.image_newline", "model.connector"),
                *("model.visual.merger", "model.visual.deepstack_merger_list"),
            ),
        }
    )
    attention_mask: str = field(default=OWN_MASK, kw_only=True)
    path: PathText = field(default="", kw_only=True)
    image_size: int = field(default=0, kw_only=True)
    pretrained: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "image_size")

    def image_tokens(self, job: JobSections) -> None:
        """None: the built model knows."""
        return

    @property
    def files(self) -> str:
        return self.path

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
        if (count := job.distributed.tensor_parallel) > 1:
            raise InputError(f"arch = {self.arch!r}: its layers are those of transformers, not for distributed.tensor_parallel = {count}")
        if job.distributed.balance_images:
            raise InputError(f"arch = {self.arch!r}: encodes its images itself; set distributed.balance_images = false")
        if job.train.feature_cache:
            raise InputError(f"arch = {self.arch!r}: keeps no features of images; set train.feature_cache = ''")
