"""``[vlm]`` with ``arch = "dual_encoder"``: images and texts in one space of embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, one_of
from kempnerforge.config.freeze import aliases, named
from kempnerforge.config.sections import JobSections
from kempnerforge.config.vlm import CrossAttentionConfig, VLMConfig
from kempnerforge.util.errors import InputError


@registry.register_vlm_config
@dataclass
class DualEncoderConfig(VLMConfig):
    """A contrastive dual encoder (CLIP: Radford et al. 2021; SigLIP: Zhai et al. 2023), which may write
    captions, too (CoCa: Yu et al. 2022). Images take no positions of the stream.

    Attributes:
        attention_mask: "bidirectional": all words of a text see each other (SigLIP).
        loss: "clip": softmax over all pairs of a micro-batch on all ranks, both ways; "siglip": a yes or no
            for each image with each text.
        pooling: the embedding of a text is from its "last" token, or the "mean" of its tokens. Of an image it
            is the mean of the tokens that the adapter gives.
        embed_dim: width of the embeddings.
        image_projection: false: the mean of an image's tokens is its embedding as it is (SigLIP), and
            ``embed_dim`` their width.
        text_projection_bias: whether the projection of texts has a bias (SigLIP).
        caption_weight: of the cross-entropy of a trained token, added to the loss of a pair. 0: the model
            learns embeddings alone and writes no text. Above 0 the lower half of the layers is the text
            tower, and each layer of the upper half reads the images through gated cross-attention.
    """

    masks: ClassVar[tuple[str, ...]] = ("causal", "prefix", "bidirectional")
    stands_for: ClassVar[tuple[str, ...]] = ("clip", "siglip")

    arch: str = "dual_encoder"
    module_patterns: dict[str, list[str]] = field(
        default_factory=lambda: aliases(
            contrastive=named("image_projection", "text_projection", "logit_scale", "logit_bias"),
            cross_attention=named("transformer.layers.*.cross_attention"),
        )
    )
    loss: str = field(default="clip", kw_only=True)
    pooling: str = field(default="last", kw_only=True)
    embed_dim: int = field(default=512, kw_only=True)
    image_projection: bool = field(default=True, kw_only=True)
    text_projection_bias: bool = field(default=False, kw_only=True)
    caption_weight: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "loss", ("clip", "siglip"))
        one_of(self, "pooling", ("last", "mean"))
        at_least(self, 1, "embed_dim")
        at_least(self, 0, "caption_weight")
        if self.caption_weight and self.attention_mask == "bidirectional":
            raise InputError(f"attention_mask = 'bidirectional': a word would see what it predicts, caption_weight = {self.caption_weight}")

    def residual_stream_image_tokens(self, num_tokens: int) -> int:
        """0: the residual stream carries text only."""
        return 0

    @property
    def captioning(self) -> CrossAttentionConfig:
        """Of the layers that read images."""
        return CrossAttentionConfig(cross_attention_every_n_layers=1)

    def check(self, job: JobSections) -> None:
        if self.caption_weight and job.model.n_layers < 2:
            raise InputError(f"caption_weight = {self.caption_weight}: needs model.n_layers of 2 or more, not {job.model.n_layers}")
