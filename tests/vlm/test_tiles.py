"""Tiled images through every arch: a step of training, and generation."""

from __future__ import annotations

import pytest
import torch

from kempnerforge.config import TrainConfig
from kempnerforge.config.data import JsonlConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.data.batching.batch import Kind
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.training.setup import assemble
from tests.data.samples import noise
from tests.vlm.tiny import Tiny, accepted_masks, all_logits, gradients, shake, tiny_job
from tests.vlm.views import generation_is_the_full_forward_pass

TILES = ImagesConfig(fit="tiles", max_side=32, marker_grid=2)
CASES = [(arch, mask) for arch in ("joint_decoder", "cross_attention", "mot", "moma") for mask in accepted_masks(arch)]
each_arch = pytest.mark.parametrize(("arch", "mask"), CASES)


WIDE, SQUARE, SMALL = noise(40, 15, 0), noise(30, 30, 1), noise(16, 16, 2)  # 3, 5 and 5 views
SAMPLES = [
    Sample("leading", (WIDE,), (Text("what colour is it?", "red"), Text("is it red?", "yes"))),
    Sample("among words", (SQUARE, WIDE), (Text("is <image> like <image> ?", "no"),)),
    Sample("inside an answer", (WIDE,), (Text("what?", "red <image> blue"),)),
    Sample("none", (), (Text("what?", "no"),)),
]


def build(arch: str, mask: str) -> Tiny:
    job = tiny_job(
        arch, mask, data=JsonlConfig(path="unread.jsonl", images=TILES), train=TrainConfig(max_steps=4, seq_len=96, mixed_precision="fp32")
    )
    tokenizer = Tokenizer.train(["what colour is it?\n", "red", "blue", "yes", "no"] * 4, 300)
    assembly = assemble(job, tokenizer, data=False)
    shake(assembly.model, 0.3)
    return Tiny(assembly.job, assembly.model, assembly.stages, assembly.data.encoder(assembly.stages[0]))


@each_arch
def test_a_step_on_tiles_learns(arch: str, mask: str) -> None:
    it = build(arch, mask)
    batch = it.batch(*SAMPLES)
    assert batch.num_images == 3 + 5 + 3 + 3 and batch.row_images == 8
    optimizer = torch.optim.AdamW(it.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss, found = gradients(it.model, batch)
        losses.append(float(loss))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    for part in ("vision_encoder", "adapter", "transformer.new_tokens"):
        assert any(float(g.abs().max()) > 0 for name, g in found.items() if name.startswith(part)), part


@each_arch
def test_every_view_is_seen(arch: str, mask: str) -> None:
    it = build(arch, mask)
    it.model.eval()
    batch = collate([it.encode(SAMPLES[1])], it.encoder.tokenizer.pad_id, None)
    before = all_logits(it.model, batch)
    assert batch.images is not None
    words = int(batch.kinds.eq(Kind.ANSWER).nonzero()[0, 1])
    for view in range(batch.num_images):
        pixels = batch.images.clone()
        batch.images[view] = 255 - batch.images[view]
        assert not torch.allclose(all_logits(it.model, batch)[0, words:], before[0, words:], atol=1e-6), f"view {view}"
        batch.images[:] = pixels


@each_arch
def test_generation_with_a_cache_is_the_full_forward_pass(arch: str, mask: str) -> None:
    rows = [("what colour is it?", (WIDE,)), ("is <image> like <image> ?", (SQUARE, SMALL)), ("what?", ()), ("is it <image>", (SQUARE,))]
    generation_is_the_full_forward_pass(build(arch, mask), rows)
