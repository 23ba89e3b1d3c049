"""What ``distributed.tensor_parallel`` must divide, said when a job is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from kempnerforge.config import ConfigError, DistributedConfig, JobConfig, ModelConfig, TrainConfig, VLMConfig
from kempnerforge.util.errors import InputError

GROUPED = ModelConfig(dim=64, n_heads=8, n_kv_heads=2, n_layers=4, ffn_dim=126)


@pytest.mark.parametrize(
    ("count", "vlm", "says"),
    [
        (3, {}, ["[model] n_heads = 8, n_kv_heads = 2: distributed.tensor_parallel = 3 must divide it"]),
        (4, {}, ["[model] n_kv_heads = 2, ffn_dim = 126: distributed.tensor_parallel = 4 must divide it"]),
        (2, {}, []),
        (2, {"arch": "cross_attention"}, []),
        (2, {"arch": "cross_attention", "cross_attention_n_kv_heads": 1}, ["[vlm] cross_attention_n_kv_heads = 1: distributed.tensor_parallel = 2"]),
        (4, {"arch": "cross_attention", "cross_attention_n_heads": 2}, ["[vlm] cross_attention_n_heads = 2, cross_attention_n_kv_heads = 2", "[model]"]),
        (2, {"arch": "dual_encoder", "caption_weight": 1.0}, []),
    ],
)  # fmt: skip
def test_heads_and_channels_are_divided(count: int, vlm: dict[str, Any], says: list[str]) -> None:
    section = VLMConfig.for_arch(**{"arch": "joint_decoder", "max_text_len": 64, **vlm})
    job = JobConfig(model=GROUPED, vlm=section, train=TrainConfig(max_steps=9), distributed=DistributedConfig(tensor_parallel=count))
    problems = []
    try:
        job.validate()
    except ConfigError as error:
        problems = [line for line in error.problems if "tensor_parallel" in line]
    assert len(problems) == len(says) and all(words in line for line, words in zip(problems, says, strict=True)), problems


def test_models_of_transformers_are_refused() -> None:
    section = VLMConfig.for_arch("hf", path="x", max_text_len=64)
    job = JobConfig(model=ModelConfig(), vlm=section, train=TrainConfig(max_steps=9), distributed=DistributedConfig(tensor_parallel=2))
    with pytest.raises(ConfigError, match="arch = 'hf': its layers are those of transformers, not for distributed.tensor_parallel = 2"):
        job.validate()


def test_groups_divide_processes_and_copies() -> None:
    cfg = DistributedConfig(tensor_parallel=4, shard_size=8)
    cfg.check_processes(16)
    for count, says in ((6, "tensor_parallel = 4, context_parallel = 1: their product must divide"), (12, "shard_size = 8: must divide")):
        with pytest.raises(InputError, match=says):
            cfg.check_processes(count)
    with pytest.raises(InputError, match="shard_size = 6: must be a multiple of tensor_parallel = 4"):
        DistributedConfig(tensor_parallel=4, shard_size=6)
