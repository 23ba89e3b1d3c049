"""Texts and prompts -> tokens, and the places of images among them. A, text tokens of one text."""

from __future__ import annotations

import numpy as np

from kempnerforge.config.data import DataConfig
from kempnerforge.data.batch import Kind
from kempnerforge.data.interleave import INPUT_IDS, KINDS, LABELS, POSITIONS, TEXT_IDS, Layout, Prompt, Words
from kempnerforge.data.sample import SampleError, Text, render_answer, render_prompt
from kempnerforge.data.tokenizer import Tokenizer

CACHED_TEXTS = 65536


class TextEncoder:
    """Tokenises for one model.

    Args:
        tokenizer: of the model.
        data_cfg: templates and placeholder.
        layout: what the model needs.
    """

    def __init__(self, tokenizer: Tokenizer, data_cfg: DataConfig, layout: Layout) -> None:
        self.tokenizer, self.cfg, self.layout = tokenizer, data_cfg, layout
        self._cache: dict[tuple[str, str], Words] = {}

    def encode(self, text: Text) -> Words:
        """One text of a sample.

        Raises:
            SampleError: an empty answer, a text that is not Unicode, an image that the token behind it cannot see.
        """
        if isinstance(text.answer, tuple):
            return self._window(text.answer)
        if not isinstance(text.prompt, str) or not isinstance(text.answer, str):
            raise SampleError(f"prompt and answer must be strings, not {type(text.prompt).__name__} and {type(text.answer).__name__}")
        key = text.prompt, text.answer
        words = self._cache.get(key)
        if words is None:
            if len(self._cache) >= CACHED_TEXTS:
                self._cache.clear()
            words = self._cache[key] = self._encode_text(text.prompt, text.answer)
        return words

    def encode_prompt(self, prompt: str, num_images: int) -> Prompt:
        """What stands before an answer, for generation: the same as in training. Placeholders that ``data.answer_template`` begins with
        stand before it, too.

        Args:
            prompt: with a placeholder for each image, or with none: the images stand in front then.
            num_images: how many the question has.

        Raises:
            ValueError: ``prompt`` is not Unicode text, its placeholders are not as many as the images, or an image ends it where the model
                needs a token behind it.
        """
        name = self.cfg.image_placeholder
        if not self.layout.image_size:
            ids, _, _ = self._start(self._split(render_prompt(self.cfg, prompt)), ([], []))
            return Prompt(ids)
        if name in render_answer(self.cfg, "").removeprefix(name * self._opening):
            raise ValueError(f"data.answer_template = {self.cfg.answer_template!r}: {name!r} behind text cannot be generated")
        ids, at, _ = self._start(self._split(render_prompt(self.cfg, prompt)), self._split(name * self._opening))
        if at and len(at) != num_images:
            raise ValueError(f"{len(at)} of {name!r} in the prompt and {num_images} images: must be as many, or no {name!r}")
        if not self.layout.image_tokens and len(ids) in at:
            raise ValueError(f"an image ends the prompt, and no token behind it could see it: {self._remedy}")
        return Prompt(ids, at or (0,) * num_images)

    def count_placeholders(self, prompt: str) -> int:
        """Images that stand where ``prompt`` (and the templates) say; 0: they stand in front, or the job has none."""
        if not self.layout.image_size:
            return 0
        return render_prompt(self.cfg, prompt).count(self.cfg.image_placeholder) + self._opening

    @property
    def _opening(self) -> int:
        """Placeholders that every answer begins with, by the template."""
        name, count = self.cfg.image_placeholder, 0
        while render_answer(self.cfg, "").startswith(name * (count + 1)):
            count += 1
        return count

    @property
    def _mark(self) -> int | None:
        """The token that stands at a placeholder where images take no position, if the tokenizer has one for it."""
        if self.layout.image_tokens or not self.layout.image_size or self.cfg.image_placeholder not in self.tokenizer.new_tokens:
            return None
        return self.tokenizer.token_id(self.cfg.image_placeholder)

    @property
    def _remedy(self) -> str:
        return f"add {self.cfg.image_placeholder!r} to model.new_tokens"

    def _split(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of ``text``, and for each placeholder how many come before it."""
        mark = self._mark
        first, *rest = text.split(self.cfg.image_placeholder)
        ids, at = self.tokenizer.encode(first), []
        for piece in rest:
            at.append(len(ids))
            ids += [] if mark is None else [mark]
            ids += self.tokenizer.encode(piece)
        return ids, at if self.layout.image_size else []

    def _start(self, prompt: tuple[list[int], list[int]], answer: tuple[list[int], list[int]]) -> tuple[list[int], tuple[int, ...], int]:
        """Prompt and answer, each as from ``_split``, with the token that they start with: ids, ``Words.image_at``, ``Words.lead``."""
        ids = prompt[0] + answer[0]
        at = prompt[1] + [len(prompt[0]) + k for k in answer[1]]
        lead = sum(k == 0 for k in at) if self._mark is None else 0
        start = self.tokenizer.bos_id
        if start is None and not prompt[0]:
            start = self.tokenizer.eos_id  # without a BOS, EOS starts an empty prompt: the first answer token needs one before it
        if start is None:
            return ids, tuple(at), lead
        return [start, *ids], tuple([0] * lead + [k + 1 for k in at[lead:]]), lead

    def _encode_text(self, prompt: str, answer: str) -> Words:
        if not answer.replace(self.cfg.image_placeholder, "").strip():
            raise SampleError("empty answer")
        try:
            before, after = self._split(render_prompt(self.cfg, prompt)), self._split(render_answer(self.cfg, answer))
        except ValueError as error:
            raise SampleError(str(error)) from None
        ids, at, lead = self._start(before, after)
        ids.append(self.tokenizer.eos_id)
        trained = np.arange(len(ids)) >= len(ids) - len(after[0]) - 1
        if self._mark is not None:
            trained[list(at)] = False
        elif not self.layout.image_tokens and trained[list(at)].any():
            raise SampleError(
                f"an image stands right before a trained token, and no position could see it and predict that: {self._remedy}"
            )
        return Words.of(ids, trained, at, lead)

    def _window(self, ids: tuple[int, ...]) -> Words:
        if len(ids) < 2:
            raise SampleError(f"a window of {len(ids)} tokens: nothing to predict")
        table = np.empty((5, len(ids) - 1), dtype=np.int64)
        table[INPUT_IDS], table[LABELS] = ids[:-1], ids[1:]
        table[POSITIONS] = np.arange(len(ids) - 1)
        table[TEXT_IDS], table[KINDS] = 1, Kind.ANSWER
        return Words(table)
