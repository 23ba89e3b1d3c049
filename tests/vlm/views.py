"""What is checked of images that are several views, or views with fewer tokens, alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.collate import prompt_batch
from kempnerforge.data.sample import Sample
from kempnerforge.eval.generate import generate
from kempnerforge.model.transformer import Cache
from tests.vlm.tiny import Tiny, gradients, with_answer

Question = tuple[str, tuple[bytes, ...]]
"""A prompt and its images."""


def asked(it: Tiny, rows: Sequence[Question]) -> Batch:
    """A batch to generate from."""
    prompts = [it.encoder.encode_question(prompt, images) for prompt, images in rows]
    views = [it.encoder.views(Sample("", images, ())) for _, images in rows]
    ends = np.cumsum([0, *(len(v) for v in views)])
    pixels = torch.from_numpy(np.stack([view for v in views for view in v])).permute(0, 3, 1, 2)
    which = [range(a, b) for a, b in pairwise(ends.tolist())]
    return prompt_batch(prompts, pixels, which, it.encoder.layout, it.encoder.tokenizer.pad_id)


def samples_are_as_alone(it: Tiny, samples: Sequence[Sample], parts: Sequence[str]) -> None:
    """In rows beside each other and in packs; and a gradient reaches ``parts`` of the model."""
    alone = [it.model(it.batch(sample)).loss for sample in samples]
    torch.testing.assert_close(it.model(it.batch(*samples)).loss, sum(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(it.model(it.pack(samples[:2], samples[2:])).loss, sum(alone), rtol=1e-5, atol=1e-5)
    _, grads = gradients(it.model, it.batch(*samples))
    for part in parts:
        assert any(float(g.abs().max()) > 0 for name, g in grads.items() if name.startswith(part)), part


def generation_is_the_full_forward_pass(it: Tiny, rows: Sequence[Question]) -> None:
    """With a cache, rows of unequal length together, and each alone."""
    it.model.eval()
    together = asked(it, rows)
    made = torch.tensor(generate(it.model, together, max_new_tokens=4, eos_id=-1))
    with torch.no_grad():
        for step in range(4):
            assert torch.equal(it.model(with_answer(together, made[:, :step])).logits.argmax(-1), made[:, step])
        cached = it.model(together, Cache()).logits
        torch.testing.assert_close(cached, it.model(with_answer(together, made[:, :0])).logits, rtol=1e-4, atol=1e-5)
        for row, question in enumerate(rows):
            if question[1]:
                torch.testing.assert_close(it.model(asked(it, [question]), Cache()).logits[0], cached[row], rtol=1e-4, atol=1e-5)
