"""Keys of ``arch = "cross_attention"`` about what is in its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from kempnerforge.config.checks import at_least, one_of, only_if
from kempnerforge.util.paths import PathText


@dataclass
class CrossAttentionBlockConfig:
    """What a gated block is made of, and where its weights are from.

    Attributes:
        cross_attention_block: "backbone": RMSNorm, and the feed-forward of the text backbone. "openflamingo"
            (Awadalla et al. 2023): LayerNorm with bias, two layers with an exact GELU, four times
            ``model.dim`` wide, and no norm on media or heads.
        cross_attention_head_dim: width of a head; 0: as in the text backbone. (OpenFlamingo has 8 of 64.)
        openflamingo_path: a checkpoint of OpenFlamingo, as safetensors, with whose resampler and
            blocks a fresh run begins, if ``cross_attention_block`` is "openflamingo" and the adapter a
            "perceiver" with ``project = false``.
    """

    cross_attention_block: str = field(default="backbone", kw_only=True)
    cross_attention_head_dim: int = field(default=0, kw_only=True)
    openflamingo_path: PathText = field(default="", kw_only=True)

    def check_block(self) -> None:
        """Raises ValueError if the keys do not go together."""
        one_of(self, "cross_attention_block", ("backbone", "openflamingo"))
        at_least(self, 0, "cross_attention_head_dim")
        theirs = self.cross_attention_block == "openflamingo"
        only_if(self, not theirs, "cross_attention_block = 'backbone'", "cross_attention_qk_norm", "cross_attention_media_norm")
        only_if(self, theirs, "cross_attention_block = 'openflamingo'", "openflamingo_path")
