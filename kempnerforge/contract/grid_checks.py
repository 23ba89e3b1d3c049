"""What every architecture with image tokens in the stream can be given: positions by time, row and column
(M-RoPE), features of inner layers of the encoder (DeepStack), and images of any shape. Checks of the other
files, with all three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kempnerforge.config import VLMConfig
from kempnerforge.contract import generation_checks, model_checks, training_checks
from kempnerforge.contract.cases import (
    FOREIGN,
    INTERLEAVED,
    LATE,
    MODEL,
    NO_IMAGE,
    ONE,
    Tiny,
    all_logits,
    gives_layers,
    picture,
    seeing,
    tiny,
    with_grids,
)
from kempnerforge.contract.marks import FIRST_MASKED, ranked
from kempnerforge.contract.ranks import GRIDS, RECOMPUTED
from kempnerforge.contract.training_checks import same_as_one_process

STREAMED = [
    (arch, mask)
    for arch, mask in FIRST_MASKED
    if arch is not None and arch not in FOREIGN and VLMConfig.class_for(arch)(arch).residual_stream_image_tokens(1)
]
each_streamed = pytest.mark.parametrize(("arch", "mask"), STREAMED, ids=[str(arch) for arch, _ in STREAMED])


def gridded(arch: str, *args: Any, **sections: Any) -> Tiny:
    """``tiny`` with all three."""
    return tiny(arch, *args, **with_grids(arch, **sections))


@each_streamed
@pytest.mark.parametrize("interleaved", [False, True], ids=["sections", "interleaved"])
def test_rows_and_columns_turn_image_tokens(arch: str, mask: str, interleaved: bool) -> None:
    """Words without an image are turned as without M-RoPE."""
    sections = replace(MODEL, rope_sections=[4, 2, 2], rope_interleaved=interleaved)
    plain, it = (tiny(arch, mask, model=model) for model in (MODEL, sections))
    for one, same in ((NO_IMAGE, True), (ONE, False)):
        logits = [all_logits(each.model.eval(), each.batch(one)) for each in (plain, it)]
        assert torch.allclose(*logits, rtol=1e-4, atol=1e-5) == same, "model.rope_sections: see VLM.rope_positions"


@each_streamed
def test_features_of_inner_layers_count(arch: str, mask: str) -> None:
    """Each adapter of them changes the logits of words, has the alias "adapter", and learns."""
    if not gives_layers(arch):
        pytest.skip("its encoder has no layers")
    it = gridded(arch, mask)
    batch, names = it.batch(ONE), [name for name in seeing(it) if name.startswith("adapter.deepstack.")]
    it.model.eval()
    want = all_logits(it.model, batch)
    it.model(batch).loss.backward()
    for number in range(2):
        own = [name for name in names if name.startswith(f"adapter.deepstack.{number}.")]
        assert own
        for name in own:
            parameter = it.model.get_parameter(name)
            assert parameter.grad is not None and parameter.grad.any(), f"{name} gets no gradient"
            with torch.no_grad():
                parameter += 0.1
        assert ((all_logits(it.model, batch) - want).abs().amax(-1)[batch.kinds > 1] > 1e-5).all()


@each_streamed
def test_images_may_have_any_shape(arch: str, mask: str) -> None:
    """A sample beside others, and in a pack, has the loss that it has alone."""
    if not gives_layers(arch):
        pytest.skip("its images have one size")
    it = gridded(arch, mask)
    it.model.train(it.model.causal_in_training)
    wide, tall, small = picture(1, width=12, height=5), picture(2, width=4), picture(3, width=8, height=8)
    samples = (
        replace(ONE, images=(wide,)),
        replace(INTERLEAVED, images=(small, tall)),
        replace(ONE, images=(tall,)),
        replace(LATE, images=(wide, ONE.images[0], small)),
    )
    batch, alone = it.batch(*samples), torch.stack([it.model(it.batch(sample)).loss for sample in samples]).sum()
    assert batch.row_image_tokens < batch.row_images * it.model.num_image_tokens
    for one in (batch, it.pack(samples[:2], samples[2:]), it.pack(samples)):
        torch.testing.assert_close(it.model(one).loss, alone, rtol=1e-5, atol=1e-5)


Check = Callable[[str, str, pytest.MonkeyPatch, Any], None]
CHECKS: dict[str, Check] = {
    "images": lambda arch, mask, patch, world: model_checks.test_no_image_leaks(arch, INTERLEAVED),
    "pack": lambda arch, mask, patch, world: model_checks.test_a_sample_in_a_pack_learns_as_it_does_alone(arch, mask, True, patch),
    "samples": lambda arch, mask, patch, world: model_checks.test_nothing_leaks_from_sample_to_sample(arch, mask, False, patch),
    "cache": lambda arch, mask, patch, world: generation_checks.test_the_cache_is_the_full_forward_pass(arch, mask, MODEL),
    "prompts": lambda arch, mask, patch, world: generation_checks.test_prompts_together_are_prompts_one_by_one(arch, mask),
    "views": lambda arch, mask, patch, world: training_checks.test_no_layer_reads_a_view(arch),
    "recomputed": lambda arch, mask, patch, world: training_checks.test_activation_checkpointing_changes_nothing(arch, world),
    "flops": lambda arch, mask, patch, world: training_checks.test_flops_on_meta_are_those_that_run(arch, mask, True, patch),
}


@each_streamed
@pytest.mark.parametrize("check", CHECKS)
def test_with_grids(arch: str, mask: str, check: str, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (model_checks, generation_checks, training_checks):
        monkeypatch.setattr(module, "tiny", gridded)
    CHECKS[check](arch, mask, monkeypatch, world)


@pytest.mark.dist
@pytest.mark.timeout(600)
@ranked(STREAMED, f"{GRIDS}+{RECOMPUTED}")
def test_two_ranks_with_grids(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    same_as_one_process(ranked, ranks(ranked))
