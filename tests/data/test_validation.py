"""A validation split that is cut from the training data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kempnerforge.config import load_config
from kempnerforge.data import build_source
from kempnerforge.data.source import Source
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import InputError
from tests.training.tiny import call, make_job, metrics

MIXED = """
[data]
source = "mixture"
tokenizer_vocab_size = 300
weights = [3.0, 1.0]
[[data.parts]]
source = "jsonl"
path = "{folder}/train.jsonl"
prompt_column = "prompt"
[[data.parts]]
source = "jsonl"
path = "{folder}/test.jsonl"
prompt_column = "prompt"
"""


def names(source: Source) -> list[str]:
    return [source[k].id for k in range(len(source))]


def parts(job: Path, *overrides: str) -> tuple[Source, Source]:
    data = load_config(job, overrides).data
    train, held_out = build_source(data, "train"), build_source(data, "test")
    assert train is not None and held_out is not None
    return train, held_out


def test_the_parts_are_the_training_samples(tmp_path: Path):
    job = make_job(tmp_path)
    everything = build_source(load_config(job).data, "train")
    train, held_out = parts(job, "--data.validation=0.25")
    assert everything is not None and (len(train), len(held_out)) == (12, 4)
    assert sorted(names(train) + names(held_out)) == sorted(names(everything))
    assert names(parts(job, "--data.validation=0.25", "--train.seed=5")[1]) == names(held_out)
    assert len({everything.fingerprint(), train.fingerprint(), held_out.fingerprint()}) == 3


def test_the_order_holds_training_samples_alone_and_all_of_them(tmp_path: Path):
    train, held_out = parts(make_job(tmp_path), "--data.validation=0.25")
    stream = train.order(3).indices(0, 32)
    assert set(stream.tolist()) == set(range(12))
    assert (train.order(3).indices(5, 20) == stream[5:20]).all()
    assert train.peers(0) == range(12) and held_out.peers(3) == range(4)


def test_a_mixture_keeps_its_weights(tmp_path: Path):
    config = (Path(__file__).parents[1] / "training" / "tiny.py").read_text().split('CONFIG = """\\\n')[1].split('"""')[0]
    begin, end = config.index("[data]"), config.index("[train]")
    train, held_out = parts(make_job(tmp_path, config=config[:begin] + MIXED + config[end:]), "--data.validation=0.25")
    drawn = train.order(0).indices(0, 400)
    share = np.mean([train.part(int(k)) == 0 for k in drawn])
    assert 0.7 < share < 0.8, "three of four"
    assert (len(train), len(held_out)) == (18, 6)
    for k in (0, len(train) - 1):
        assert {train.part(peer) for peer in train.peers(k)} == {train.part(k)}


def test_a_run_is_evaluated_on_what_is_held_out(tmp_path: Path):
    job = make_job(tmp_path)
    assert call("train", job, "--data.validation=0.25", "--data.eval_path=").code == 0
    assert metrics(tmp_path / "run")[-1]["eval/questions"] == 4


def test_the_tokenizer_is_that_of_all_training_samples(tmp_path: Path):
    job = make_job(tmp_path)
    a, b = (assemble(load_config(job, more), device="meta").tokenizer for more in ([], ["--data.validation=0.25"]))
    assert a.encode("what is on the left?") == b.encode("what is on the left?")


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"data.validation = 0.01: of 16 training samples it holds out 0"):
        parts(make_job(tmp_path), "--data.validation=0.01")
