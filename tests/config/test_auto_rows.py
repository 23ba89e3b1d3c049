"""``train.batch_size = "auto"`` in a config: which keys belong to it, in the section, in stages and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from kempnerforge.config import ConfigError, TrainConfig, load_config, to_toml
from kempnerforge.config.job import JobConfig

STAGES = """
[train]
batch_size = "auto"
rows_per_step = 24
[data]
source = "text"
path = "x"
tokenizer = "bytes"
[[stages]]
name = "as the run"
steps = 2
[[stages]]
name = "fewer"
steps = 2
train.rows_per_step = 6
[[stages]]
name = "numbers"
steps = 2
train = {batch_size = 8, grad_accum_steps = 2}
"""


def load(folder: Path, text: str, *words: str) -> JobConfig:
    (folder / "job.toml").write_text(text, encoding="utf-8")
    return load_config(folder / "job.toml", words)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": "auto"}, 'batch_size = "auto": needs rows_per_step'),
        ({"batch_size": "auto", "rows_per_step": 8, "grad_accum_steps": 2}, 'grad_accum_steps = 2: batch_size = "auto" chooses it'),
        ({"batch_size": 8, "rows_per_step": 8}, 'rows_per_step = 8: only batch_size = "auto" reads it'),
        ({"batch_size": "auto", "rows_per_step": -1}, "rows_per_step = -1: must be >= 0"),
        ({"batch_size": "auto", "rows_per_step": 1 << 21}, "rows_per_step = 2097152: must be <= 1048576"),
        ({"batch_size": "auto", "rows_per_step": 8, "total_samples": 7}, "total_samples = 7: must be at least one batch, batch_size = 8"),
    ],
)
def test_the_keys_belong_together(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TrainConfig(**keys)  # type: ignore[arg-type]


def test_only_one_word_is_a_batch_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"""batch_size = ['"]most['"]: must be an integer or ['"]auto['"], not a string"""):
        load(tmp_path, '[train]\nbatch_size = "most"\nmax_steps = 1\n')


def test_steps_follow_from_rows() -> None:
    assert TrainConfig(batch_size="auto", rows_per_step=8, total_samples=33).max_steps == 4
    assert TrainConfig(batch_size="auto", rows_per_step=8).step_rows == TrainConfig(batch_size=8).step_rows == 8


def test_stages_say_it_in_their_own_way(tmp_path: Path) -> None:
    job = load(tmp_path, STAGES)
    found = [(stage.train.batch_size, stage.train.step_rows, stage.train.grad_accum_steps) for stage in job.resolved_stages()]
    assert found == [("auto", 24, 1), ("auto", 6, 1), (8, 8, 2)]
    (tmp_path / "again.toml").write_text(to_toml(job), encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == job
    numbers = STAGES.replace('batch_size = "auto"', "batch_size = 24").replace("rows_per_step = 24", "grad_accum_steps = 3")
    own = numbers.replace("train.rows_per_step = 6", 'train = {batch_size = "auto", rows_per_step = 6}')
    found = [(stage.train.step_rows, stage.train.grad_accum_steps) for stage in load(tmp_path, own).resolved_stages()]
    assert found == [(24, 3), (6, 1), (8, 2)]
    with pytest.raises(ConfigError, match=r"#2 train.rows_per_step = 6: only batch_size = \"auto\" reads it"):
        load(tmp_path, numbers)


def test_the_command_line_says_it(tmp_path: Path) -> None:
    plain = STAGES.partition("[[")[0].replace('"auto"', "4").replace("rows_per_step = 24", "max_steps = 1")
    job = load(tmp_path, plain, "--train.batch_size=auto", "--train.rows_per_step", "12")
    assert (job.train.batch_size, job.train.step_rows) == ("auto", 12)
