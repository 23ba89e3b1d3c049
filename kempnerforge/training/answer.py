"""Answers of a trained model, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kempnerforge.data.collate import prompt_batch
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

    def groups(self, prompt: str, images: Sequence[Path]) -> list[tuple[Path, ...]]:
        """``images`` as they are asked about: as many together as ``prompt`` has placeholders, one by one if it has none.

        Raises:
            ValueError: they cannot be shared out.
        """
        together = self.encoder.count_placeholders(prompt)
        step = together or 1
        if len(images) % step or (together and not images and self.has_images):
            name = self.encoder.cfg.image_placeholder
            raise ValueError(f"{len(images)} images, and a prompt with {together} of {name!r}: give a multiple of {together} images")
        return [tuple(images[k : k + step]) for k in range(0, len(images), step)] or [()]

    def answer(
        self,
        prompt: str,
        images: Sequence[Path],
        max_new_tokens: int | None,
        sampling: Sampling,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """The model's answer to ``prompt`` about ``images``, which stand where its placeholders are, or in front.

        Args:
            images: none, or one of ``groups``.
            max_new_tokens: None: ``MAX_NEW_TOKENS``, or as many as there is room for.
            stream: called with each new piece of text; together the pieces are the answer.

        Raises:
            ValueError: an image cannot be read, the model takes none, the prompt has another number of placeholders, or there is no room for
                prompt and answer.
        """
        if images and not self.has_images:
            raise ValueError(f"{images[0]}: this model was trained on text alone and takes no image")
        tokenizer, layout = self.encoder.tokenizer, self.encoder.layout
        pixels = None
        if self.has_images:
            size = layout.image_size
            pixels = torch.zeros(len(images), 3, size, size, dtype=torch.uint8)
            for k, image in enumerate(images):
                pixels[k] = torch.from_numpy(load_image(image, size).copy()).permute(2, 0, 1)  # (3, H, W)
        asked = self.encoder.encode_prompt(prompt, len(images))
        start = len(asked.ids) + layout.image_tokens * len(images)
        room = self.assembly.job.model.max_seq_len - start
        wanted = max_new_tokens if max_new_tokens is not None else max(1, min(MAX_NEW_TOKENS, room))
        if not 1 <= wanted <= room:
            raise ValueError(
                f"--max-new-tokens = {wanted}: must be at least 1, and with the prompt's {start} positions"
                f" at most model.max_seq_len = {self.assembly.job.model.max_seq_len}"
            )
        batch = prompt_batch([asked], pixels, [range(len(images))], layout, tokenizer.pad_id).to(self.device)
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
