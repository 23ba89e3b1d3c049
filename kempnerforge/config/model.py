"""``[model]``: the text backbone, with the knobs that the Llama, Mistral, SmolLM2, SmolLM3, Qwen and Gemma
families need, and the text towers of CLIP and SigLIP.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from kempnerforge.config.checks import at_least, at_most, more_than, one_of, only_if
from kempnerforge.util.errors import InputError

MAX_LAYERS = 4096
GATED = ("swiglu", "geglu")
"""Values of ``activation`` with a third matrix, whose product multiplies the activation."""
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_local_theta", "nope_interval", "rope_sections")
BEGIN_PICTURE, END_PICTURE = "<boi>", "<eoi>"
CODE = re.compile(r"<code_(\d+)>")
"""Tokens of a picture that is written: its codes, in rows from the upper left, between these two."""


def picture_tokens(codes: int) -> list[str]:
    """The names of all tokens that write pictures of a codebook with ``codes`` entries."""
    return [BEGIN_PICTURE, END_PICTURE, *(f"<code_{code}>" for code in range(codes))]


def is_picture_token(name: str) -> bool:
    """Whether ``picture_tokens`` may name it."""
    return name in (BEGIN_PICTURE, END_PICTURE) or CODE.fullmatch(name) is not None


@dataclass(frozen=True)
class RopeScaling:
    """``[model.rope_scaling]``: longer contexts by slower rotation.

    Attributes:
        type: "linear" divides every frequency by ``factor`` (Chen et al. 2023); "llama3" only the low ones
            (Llama 3.1's rule).
        factor: by how much.
        low_freq_factor, high_freq_factor, original_max_seq_len: read by "llama3" alone.
    """

    type: str = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        one_of(self, "type", ("linear", "llama3"))
        at_least(self, 1, "factor", "original_max_seq_len")
        more_than(self, self.low_freq_factor, "high_freq_factor")


@dataclass
class ModelConfig:
    """The text backbone.

    Attributes:
        dim: width of the residual stream.
        n_layers, n_heads: depth, query heads.
        n_kv_heads: key/value heads: 0 means ``n_heads``, 1 is multi-query (Shazeer 2019), between is
            grouped-query (Ainslie et al. 2023).
        head_dim: 0 means ``dim / n_heads``; otherwise free of ``dim``.
        ffn_dim: hidden width of the feed-forward; 0 means 8/3 of ``dim`` rounded up to 32 for the gated
            ones, ``4 * dim`` for the others.
        activation: gated "swiglu" or "geglu" (Shazeer 2020; tanh GELU); not gated "gelu" (tanh), "gelu_exact"
            or "quick_gelu" (``x * sigmoid(1.702 * x)``: CLIP).
        bias: biases on all linear layers of attention and feed-forward (GPT-2, CLIP, SigLIP).
        positions: "rope", or "learned": ``max_seq_len`` embeddings, one added at each position of the stream
            (GPT-2, CLIP, SigLIP).
        vocab_size: 0 takes the tokenizer's; a larger one pads the embedding, unless there are ``new_tokens``;
            a smaller one is an error.
        new_tokens: tokens that the tokenizer gets in addition, such as "<image>". Their embeddings are a
            separate module, ``transformer.new_tokens``, so that they can train while the rest of the
            embedding is frozen.
        unwritten_new_tokens: the last of ``new_tokens``, so many, are read and never written: there is no
            logit of them (LLaVA-NeXT's vector at the end of a row of image tokens).
        max_seq_len: positions that the model is meant for; longer streams are refused.
        norm: "rms_norm", or "layer_norm" with gain and bias (Ba et al. 2016; VLA Foundry).
        embed_norm: norm of the stream before the first layer, images included (VLA Foundry's
            ``post_embed_norm``).
        norm_eps, norm_plus_one: RMSNorm (Zhang and Sennrich 2019); ``norm_plus_one`` scales by ``1 + weight``
            (Gemma).
        post_norms: RMSNorm on the outputs of attention and feed-forward, in addition to the one on their
            inputs (Gemma 2).
        qkv_bias, qk_norm: biases on the q, k, v projections (Qwen2); RMSNorm on each head's q and k (Qwen3).
        rope_theta, rope_scaling: rotary positions (Su et al. 2021).
        rope_local_theta, rope_global_interval: every ``rope_global_interval``-th layer has the two above, all
            others have this base and no scaling (Gemma 3); 0: all layers are alike.
        nope_interval: every n-th layer has no rotary positions (SmolLM3); 0: none is without.
        rope_sections: M-RoPE (Wang et al. 2024, arXiv 2409.12191, section 2.1): how many of the pairs of
            channels of a head are turned by time, by row and by column, [16, 24, 24] in Qwen2-VL. An image
            token has its row and column in the image; an image counts as many positions as it has tokens
            along its longer side, and the words after it go on from there. Words are turned as without it, and so is
            all where images take no position. Empty: every pair is turned by the position in the stream.
        rope_interleaved: the three take turns from pair to pair (Qwen3-VL); otherwise pairs of one kind
            follow one another.
        sliding_window: a token sees this many positions of its text at most, itself the last of them
            (Mistral: Jiang et al. 2023); positions that see each other in both directions do so however far
            apart they are (PaliGemma 2). 0: all the way.
        window_pattern: which layers that holds for, from the first on and repeated: "S" slides, "F" sees the
            full stream. "S" is Mistral, "SF" Gemma 2, "SSSSSF" Gemma 3. Read with ``sliding_window`` alone.
        tie_embeddings: the output head is the embedding.
        embed_scale: embeddings times ``sqrt(dim)`` (Gemma).
        attention_scale: of the scores; 0 means ``head_dim ** -0.5``.
        attention_softcap, logit_softcap: ``cap * tanh(x / cap)`` (Gemma 2); 0 is off.
        dropout: on what attention and feed-forward add to the stream, in training (Srivastava et al. 2014).
        answer_dropout: in place of ``dropout`` at positions whose next token is trained (Molmo's
            ``response_residual_dropout``); 0: there as elsewhere.
        init_std: normal init of all matrices; 0 keeps PyTorch's default for linear layers, the embedding has
            0.02 then.
    """

    dim: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 0
    head_dim: int = 0
    ffn_dim: int = 0
    activation: str = "swiglu"
    bias: bool = False
    positions: str = "rope"
    vocab_size: int = 0
    max_seq_len: int = 2048
    norm: str = "rms_norm"
    embed_norm: bool = False
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float = 0.0
    rope_global_interval: int = 6
    nope_interval: int = 0
    rope_sections: list[int] = field(default_factory=list)
    rope_interleaved: bool = False
    sliding_window: int = 0
    window_pattern: str = "S"
    tie_embeddings: bool = True
    embed_scale: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    dropout: float = 0.0
    answer_dropout: float = 0.0
    init_std: float = 0.0
    new_tokens: list[str] = field(default_factory=list)
    unwritten_new_tokens: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "dim", "n_layers", "n_heads", "max_seq_len", "rope_global_interval")
        at_most(self, MAX_LAYERS, "n_layers")
        at_least(self, 0, "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "init_std")
        at_least(self, 0, "attention_scale", "attention_softcap", "logit_softcap", "rope_local_theta", "nope_interval", "sliding_window")
        at_least(self, 0, "unwritten_new_tokens")
        more_than(self, 0, "norm_eps", "rope_theta")
        one_of(self, "activation", (*GATED, "gelu", "gelu_exact", "quick_gelu"))
        one_of(self, "positions", ("rope", "learned"))
        only_if(self, self.positions == "rope", "positions = 'rope'", *ROPE_KEYS)
        one_of(self, "norm", ("rms_norm", "layer_norm"))
        only_if(self, self.norm == "rms_norm", "norm = 'rms_norm'", "norm_plus_one")
        if not self.window_pattern or set(self.window_pattern) - set("SF"):
            raise InputError(f"window_pattern = {self.window_pattern!r}: needs a letter for each layer, S (slides) or F (full), repeated")
        only_if(self, self.sliding_window, "sliding_window", "window_pattern")
        if self.sliding_window and not any(self.windows):
            raise InputError(f"sliding_window = {self.sliding_window}: window_pattern = {self.window_pattern!r} has it in no layer")
        for name in ("dropout", "answer_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: must be at least 0 and less than 1")
        if "" in self.new_tokens or len(set(self.new_tokens)) != len(self.new_tokens):
            raise InputError(f"new_tokens = {self.new_tokens}: needs names, each once")
        if self.unwritten_new_tokens > len(self.new_tokens):
            raise InputError(
                f"unwritten_new_tokens = {self.unwritten_new_tokens}: must be at most the number of names in new_tokens = {self.new_tokens}"
            )
        if not self.head_dim and self.dim % self.n_heads:
            raise InputError(f"n_heads = {self.n_heads}: must divide dim = {self.dim}, or set head_dim")
        if self.n_heads % self.kv_heads:
            raise InputError(f"n_kv_heads = {self.n_kv_heads}: must divide n_heads = {self.n_heads}")
        if self.positions == "rope" and self.head_width % 2:
            raise InputError(f"head_dim = {self.head_width}: rotary positions need an even one")
        only_if(self, self.rope_sections, "rope_sections", "rope_interleaved")
        if self.rope_sections and [self.rope_axes.count(axis) for axis in range(len(self.rope_sections))] != self.rope_sections:
            alike = ", of which interleaved ones can be no more than a third" if self.rope_interleaved else ""
            raise InputError(
                f"rope_sections = {self.rope_sections}: must be three counts of at least 1, for time, row and column{alike},"
                f" whose sum is {self.head_width // 2}, half the width of a head"
            )

    @property
    def rope_axes(self) -> list[int]:
        """What turns each pair of channels: 0 the time, 1 the row, 2 the column. Empty: the position turns all."""
        if len(self.rope_sections) != 3 or min(self.rope_sections) < 1 or 2 * sum(self.rope_sections) != self.head_width:
            return []
        if self.rope_interleaved:
            return [pair % 3 if pair < 3 * self.rope_sections[pair % 3] else 0 for pair in range(self.head_width // 2)]
        return [axis for axis, pairs in enumerate(self.rope_sections) for _ in range(pairs)]

    @property
    def codes(self) -> range:
        """Ids of the tokens "<code_0>", "<code_1>", ... among ``new_tokens``: of the modality "image" wherever
        there are towers or experts. ``vocab_size`` is resolved.
        """
        at = [place for place, name in enumerate(self.new_tokens) if CODE.fullmatch(name)]
        if at and at[-1] - at[0] >= len(at):
            raise InputError(f"new_tokens: {self.new_tokens[at[0] + 1]!r} is between '<code_N>'; these must follow one another")
        return range(self.vocab_size + at[0], self.vocab_size + at[-1] + 1) if at else range(0)

    def window(self, layer: int) -> int:
        """How many positions a token sees in ``layer`` at most; 0: all of them."""
        return self.sliding_window if self.window_pattern[layer % len(self.window_pattern)] == "S" else 0

    @property
    def windows(self) -> tuple[int, ...]:
        """``window`` of the kinds of layers that there are."""
        return tuple(sorted({self.window(layer) for layer in range(self.n_layers)}))

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_dim or (-(-8 * self.dim // 3 // 32) * 32 if self.activation in GATED else 4 * self.dim)
