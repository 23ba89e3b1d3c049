"""Pictures that are written, and what the classifier sees in them."""

from __future__ import annotations

import torch

from kempnerforge.eval.generate import Sampling, generate
from tests.vlm.tiny import picture, tiny


def test_only_what_is_allowed_is_written() -> None:
    it = tiny("mot", noise=0.3)
    it.model.eval()
    codes = it.encoder.layout.codes
    allowed = (range(5, 6), *[codes] * 6, range(9, 11))
    prompts = it.prompts([("what?", [0]), ("red", [1])], [picture(0), picture(1)])
    sampling = Sampling(temperature=1.0, seed=3, allowed=allowed)
    made = generate(it.model, prompts, max_new_tokens=9, eos_id=-1, sampling=sampling)
    for row in made:
        assert [id_ in ids for id_, ids in zip(row, allowed, strict=False)] == [True] * 8
    assert made[0] != made[1] and made == generate(it.model, prompts, max_new_tokens=9, eos_id=-1, sampling=sampling)
    greedy = generate(it.model, prompts, max_new_tokens=2, eos_id=-1, sampling=Sampling(allowed=allowed))
    with torch.no_grad():
        assert [row[0] for row in greedy] == [5, 5]
