"""What ``distributed.tensor_parallel`` must divide, said when a job is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from kempnerforge.config import ConfigError, DistributedConfig, JobConfig, ModelConfig, TrainConfig, VLMConfig
from kempnerforge.util.errors import InputError

GROUPED = ModelConfig(dim=64, n_heads=8, n_kv_heads=2, n_layers=4, ffn_dim=126)


@pytest.mark.parametrize(
    ("count", "model", "vlm", "says"),
    [
        (3, GROUPED, {}, ["model.n_heads = 8", "model.n_kv_heads = 2"]),
        (4, GROUPED, {}, ["model.n_kv_heads = 2", "model.ffn_dim = 126"]),
        (2, GROUPED, {}, []),
        (2, GROUPED, {"arch": "cross_attention"}, []),
        (2, GROUPED, {"arch": "cross_attention", "cross_attention_n_kv_heads": 1}, ["vlm.cross_attention_n_kv_heads = 1"]),
        (2, GROUPED, {"arch": "cross_attention", "cross_attention_n_heads": 1}, ["vlm.cross_attention_n_heads = 1", "vlm.cross_attention_n_kv_heads = 1"]),
        (2, GROUPED, {"arch": "dual_encoder", "caption_weight": 1.0}, []),
        (2, GROUPED, {"arch": "hf", "path": "x"}, ["vlm.arch = 'hf': its layers are those of transformers"]),
    ],
)  # fmt: skip
def test_heads_and_channels_are_divided(count: int, model: ModelConfig, vlm: dict[str, Any], says: list[str]) -> None:
    section = VLMConfig.for_arch(**{"arch": "joint_decoder", "max_text_len": 64, **vlm})
    job = JobConfig(model=model, vlm=section, train=TrainConfig(max_steps=9), distributed=DistributedConfig(tensor_parallel=count))
    try:
        job.validate()
        problems = []
    except ConfigError as error:
        problems = [line for line in error.problems if "tensor_parallel" in line]
    assert len(problems) == len(says)
    for line, words in zip(problems, says, strict=True):
        assert f"tensor_parallel = {count}: " in line and words in line


def test_groups_divide_processes_and_copies() -> None:
    cfg = DistributedConfig(tensor_parallel=4, shard_size=8)
    cfg.check_processes(16)
    for count, says in ((6, "tensor_parallel = 4, context_parallel = 1: their product must divide"), (12, "shard_size = 8: must divide")):
        with pytest.raises(InputError, match=says):
            cfg.check_processes(count)
    with pytest.raises(InputError, match="shard_size = 6: must be a multiple of tensor_parallel = 4"):
        DistributedConfig(tensor_parallel=4, shard_size=6)
