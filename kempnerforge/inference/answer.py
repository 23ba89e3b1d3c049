"""Answers of a trained model, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from kempnerforge.config.template import WITH_SYSTEM
from kempnerforge.data.batching.collate import prompt_batch, stack_views
from kempnerforge.data.sample import ImageSource
from kempnerforge.eval.generate import Sampling, TextStream, tokens_of
from kempnerforge.inference.processor import AS_IT_IS, Processor, processing
from kempnerforge.inference.restore import restore
from kempnerforge.util.errors import InputError

MAX_NEW_TOKENS = 64


class Answer:
    """An answer that is written while one iterates over it: a piece of text for each token, some of them empty. The model works only when the
    next piece is asked for.

    Args:
        tokens: ids, as the model makes them.
        ends: those that end the answer.
        decode: ids -> text.
        byte_ids: see ``TextStream``.

    Attributes:
        num_tokens: made so far, the one that ended it among them.
    """

    def __init__(
        self, tokens: Iterable[int], ends: Collection[int], decode: Callable[[Sequence[int]], str], byte_ids: Collection[int] = ()
    ) -> None:
        self.num_tokens = 0
        self._tokens, self._ends, self._decode = iter(tokens), ends, decode
        self._stream = TextStream(decode, byte_ids)

    def __iter__(self) -> Iterator[str]:
        for token in self._tokens:
            self.num_tokens += 1
            if token in self._ends:
                break
            yield self._stream.push(token)
        yield self._stream.finish()

    @property
    def text(self) -> str:
        """What has been written so far."""
        return self._decode(self._stream.ids)

    def finish(self) -> str:
        """All of it."""
        for _ in self:
            pass
        return self.text


class Answerer:
    """A checkpoint that can be asked.

    Args:
        path: checkpoint or run directory.
        overrides: of its config.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        restored = restore(path, overrides)
        self.path, self.device, self.assembly = restored.path, restored.device, restored.assembly
        followed = processing(restored.state.imported)
        as_it_is = restored.as_written and followed["follows"] == AS_IT_IS  # of a language model that was not trained here
        self.processor = Processor(self.assembly, **followed if as_it_is else {})
        self.encoder = self.processor.encoder
        self.has_images = self.assembly.model.has_images

    def groups(self, prompt: str, images: Sequence[Path]) -> list[tuple[Path, ...]]:
        """``images`` as they are asked about: as many together as ``prompt`` has placeholders; if it has none, as many as each question of the
        training had, or one by one.

        Raises:
            ValueError: they cannot be shared out.
        """
        together = self.encoder.count_placeholders(prompt)
        usual = self.encoder.asking.together
        step = together or (usual if usual and not len(images) % usual else 1)
        if len(images) % step or (together and not images and self.has_images):
            name = self.encoder.cfg.image_placeholder
            raise InputError(f"{len(images)} images, and a prompt with {together} of {name!r}: give a multiple of {together} images")
        return [tuple(images[k : k + step]) for k in range(0, len(images), step)] or [()]

    @property
    def has_turns(self) -> bool:
        """Whether the model's template is one of conversations, so that a question may well have earlier ones before it."""
        return self.encoder.texts[0].cfg.template in WITH_SYSTEM

    def ask(
        self,
        prompt: str,
        images: Sequence[ImageSource],
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> Answer:
        """The model's answer to ``prompt`` about ``images``, which are where its placeholders are, or in front.

        Args:
            images: none, or one of ``groups``; files or encoded.
            max_new_tokens: None: ``MAX_NEW_TOKENS``, or as many as there is room for.
            sampling: greedy by default.
            history: (prompt, answer) of the turns before. The images are the whole conversation's.

        Raises:
            ValueError: an image cannot be read, the model takes none, or no turns, the prompt has another number of placeholders, or there is
                no room for prompt and answer.
        """
        if images and not self.has_images:
            name = images[0] if isinstance(images[0], Path) else "image"
            raise InputError(f"{name}: this model was trained on text alone and takes no image")
        tokenizer, layout, texts = self.encoder.tokenizer, self.encoder.layout, self.encoder.texts[0]
        asked = self.processor.prompt(prompt, images, history)
        start = asked.length(layout.image_tokens)
        room = self.assembly.job.model.max_seq_len - start
        if room < 1:
            raise InputError(
                f"no room for an answer: the prompt's {start} positions, model.max_seq_len = {self.assembly.job.model.max_seq_len}"
            )
        wanted = max_new_tokens if max_new_tokens is not None else min(MAX_NEW_TOKENS, room)
        if not 1 <= wanted <= room:
            raise InputError(
                f"--max-new-tokens = {wanted}: must be at least 1, and with the prompt's {start} positions"
                f" at most model.max_seq_len = {self.assembly.job.model.max_seq_len}"
            )
        pixels = self.processor.views(asked, images)
        views = stack_views(pixels, layout.image_size) if self.has_images else None
        batch = prompt_batch([asked], views, [range(0 if views is None else len(views))], layout, tokenizer.pad_id).to(self.device)
        tokens = tokens_of(self.assembly.model, batch, max_new_tokens=wanted, eos_id=texts.stops, sampling=sampling)
        return Answer(tokens, texts.stops, tokenizer.decode, tokenizer.byte_ids)
