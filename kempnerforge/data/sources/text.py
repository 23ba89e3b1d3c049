"""Plain text: one file, one stream of tokens, cut into windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kempnerforge.config import registry
from kempnerforge.config.data import TextConfig
from kempnerforge.data.fingerprint import file_fingerprint
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.source import Source
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import start_of
from kempnerforge.util.reading import regular

BLOCK_CHARACTERS = 2**16


@registry.register_source("text")
class TextSource(Source):
    """A UTF-8 file. EOS is after its last token; window k holds tokens ``k * seq_len .. (k + 1) * seq_len``
    inclusive, so that each token but the first is predicted once. The last window may be shorter.

    Before ``tokenised`` it serves as a corpus for a tokenizer, with its blocks as samples.
    """

    cfg: TextConfig

    def __init__(self, cfg: TextConfig, split: str) -> None:
        super().__init__(cfg, split)
        key = "path" if split == "train" else "eval_path"
        self.path = Path(getattr(cfg, key))
        try:
            content = regular(self.path, f"data.{key}").read_bytes()
            text = content.decode("utf-8-sig")
        except OSError as error:
            raise InputError(f"data.{key} = {str(self.path)!r}: {error.strerror or error}{start_of(self.path)}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"data.{key} = {str(self.path)!r}: not UTF-8: byte {error.start}: {error.reason}") from None
        if not text.strip():
            raise InputError(f"data.{key} = {str(self.path)!r}: empty")
        self._blocks = list(_blocks(text))

    @classmethod
    def has(cls, cfg: Any, split: str) -> bool:
        return split == "train" or bool(cfg.eval_path)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{self.path.name}[{index}]", (), (Text("", self._blocks[index]),))

    def num_images(self, index: int) -> int:
        return 0

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)

    def corpus(self) -> Iterator[str]:
        yield from self._blocks

    def tokenised(self, tokenizer: Tokenizer, seq_len: int) -> Windows:
        ids = [id_ for k, block in enumerate(self._blocks) for id_ in tokenizer.encode(block, "text" if k else "")]
        return Windows(self, np.array([*ids, tokenizer.eos_id], dtype=np.int32), seq_len)


class Windows(Source):
    """Windows of ``seq_len`` tokens and the one after them."""

    def __init__(self, text: TextSource, ids: np.ndarray, seq_len: int) -> None:
        super().__init__(text.cfg, text.split)
        assert seq_len > 0
        self._text, self._ids, self.seq_len = text, ids, seq_len

    def __len__(self) -> int:
        return math.ceil((len(self._ids) - 1) / self.seq_len)

    def __getitem__(self, index: int) -> Sample:
        begin = range(len(self))[index] * self.seq_len
        window = tuple(self._ids[begin : begin + self.seq_len + 1].tolist())
        return Sample(f"{self._text.path.name}[tokens {begin}..]", (), (Text("", window),))

    def length(self, index: int) -> int:
        return min(self.seq_len, len(self._ids) - 1 - index * self.seq_len)

    def num_images(self, index: int) -> int:
        return 0

    def fingerprint(self) -> str:
        return self._text.fingerprint()

    def corpus(self) -> Iterator[str]:
        return self._text.corpus()


def _blocks(text: str) -> Iterator[str]:
    """``text`` in pieces of about ``BLOCK_CHARACTERS``. They end at line ends that no white space follows:
    there no token reaches across.
    """
    begin = 0
    while begin < len(text):
        end = begin + BLOCK_CHARACTERS
        while end < len(text):
            end = text.find("\n", end - 1) + 1 or len(text)
            if end >= len(text) or not text[end].isspace():
                break
            end += 1
        yield text[begin:end]
        begin = end
