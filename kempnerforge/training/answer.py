"""Answers of a trained model, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kempnerforge.data.encode import prompt_batch
from kempnerforge.data.images import load_image
from kempnerforge.eval.generate import Sampling, generate
from kempnerforge.training.restore import restore

MAX_NEW_TOKENS = 64


class Answerer:
    """A checkpoint that can be asked.

    Args:
        path: checkpoint or run directory.
        overrides: of its config.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        restored = restore(path, overrides, data=False)
        self.path, self.device, self.assembly = restored.path, restored.device, restored.assembly
        self.encoder = self.assembly.encoder(self.assembly.stages[-1])
        self.has_images = self.assembly.model.has_images

    def answer(
        self, prompt: str, image: Path | None, max_new_tokens: int | None, sampling: Sampling, stream: Callable[[str], None] | None = None
    ) -> str:
        """The model's answer to ``prompt`` about ``image``.

        Args:
            max_new_tokens: None: ``MAX_NEW_TOKENS``, or as many as there is room for.
            stream: called with each new piece of text; together the pieces are the answer.

        Raises:
            ValueError: the image cannot be read, the model takes none, or there is no room for prompt and answer.
        """
        if image is not None and not self.has_images:
            raise ValueError(f"{image}: this model was trained on text alone and takes no image")
        tokenizer, layout = self.encoder.tokenizer, self.encoder.layout
        images, places = None, None
        if self.has_images:
            size = layout.image_size
            pixels = torch.zeros(0, 3, size, size, dtype=torch.uint8)
            if image is not None:
                pixels = torch.from_numpy(load_image(image, size).copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)
            images, places = pixels, [[0] if image is not None else []]
        ids = self.encoder.encode_prompt(prompt)
        start = len(ids) + (layout.image_tokens if image is not None else 0)
        room = self.assembly.job.model.max_seq_len - start
        wanted = max_new_tokens if max_new_tokens is not None else max(1, min(MAX_NEW_TOKENS, room))
        if not 1 <= wanted <= room:
            raise ValueError(
                f"--max-new-tokens = {wanted}: must be at least 1, and with the prompt's {start} positions"
                f" at most model.max_seq_len = {self.assembly.job.model.max_seq_len}"
            )
        batch = prompt_batch([ids], images, places, layout, tokenizer.pad_id).to(self.device)
        written: list[int] = []
        shown = ""

        def on_token(step: Tensor) -> None:
            nonlocal shown
            written.extend(i for i in step.tolist() if i != tokenizer.eos_id)
            text = tokenizer.decode(written)
            if stream is not None and text.startswith(shown) and not text.endswith("\ufffd"):  # a character may take several tokens
                stream(text[len(shown) :])
                shown = text

        made = generate(self.assembly.model, batch, max_new_tokens=wanted, eos_id=tokenizer.eos_id, sampling=sampling, on_token=on_token)
        text = tokenizer.decode(made[0])
        if stream is not None and text.startswith(shown):
            stream(text[len(shown) :])  # what was held back and never became whole
        return text
