"""Plain text that a model reads without any image."""

from __future__ import annotations

from kempnerforge.config.data import TextConfig
from kempnerforge.data.sources.build import build_source
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import Layout
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.util.errors import InputError

TOKENS_AT_ONCE = 4096


class PlainText:
    """Windows of a text: each token but the first of all is predicted once.

    Args:
        path: of the text, UTF-8.
        window: tokens read together.
        seed: of the windows that are drawn where not all are read.

    Attributes:
        windows: the source that they are samples of.
        encoder: of ``windows``.
        rows: windows that a rank takes at once.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, path: str, window: int, tokenizer: Tokenizer, seed: int = 0) -> None:
        try:
            source = build_source(TextConfig(path=path), "train")
        except InputError as error:
            raise InputError(str(error).replace("data.path", "eval.text_path")) from None
        assert source is not None
        self.windows = source.tokenised(tokenizer, window)
        self.encoder = Encoder(tokenizer, self.windows.cfg, Layout(0, 0, window, window, window), seed)
        self.rows = max(1, TOKENS_AT_ONCE // window)
