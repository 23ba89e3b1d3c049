"""Images are encoded by all ranks alike, and nothing else is different."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge.config import JobConfig
from kempnerforge.config.loader import load_config
from kempnerforge.contract.cases import tiny
from kempnerforge.contract.ranks import shares
from kempnerforge.distributed.balance import common
from tests.dist import ranks_pass

ARCHS = ("joint_decoder", "cross_attention")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_every_image_is_sent_once_and_comes_back(own: list[int]) -> None:
    size = len(own)
    share = [sum(own) // size + (r < sum(own) % size) for r in range(size)]
    sent = [common(own, share, rank) for rank in range(size)]
    received = [common(share, own, rank) for rank in range(size)]
    assert [sum(row) for row in sent] == own and [sum(row) for row in received] == share
    assert all(sent[a][b] == received[b][a] for a in range(size) for b in range(size))


@pytest.mark.dist
def test_two_ranks_equal_one_process_and_encode_alike(tmp_path: Path) -> None:
    ranks_pass("tests.distributed.workers:balanced_images", 2, tmp_path, *ARCHS, timeout=120)
    for arch in ARCHS:
        it = tiny(arch)
        parts = shares(it)
        targets, images = sum(batch.num_targets for batch in parts), [len(batch.images) for batch in parts if batch.images is not None]
        for batch in parts:
            it.model(batch).mean(targets, 1).backward()
        want = {name: p.grad for name, p in it.model.named_parameters() if p.grad is not None}
        for when in ("trains", "frozen"):
            got = torch.load(tmp_path / f"{arch}-{when}.pt", weights_only=True)
            encoded, freed = json.loads((tmp_path / f"{arch}-{when}.json").read_text()), set(want) - got.keys()
            assert sorted(images) == [0, 5] and encoded == [3, 3], "a rank without images has a blank one"
            assert {name.partition(".")[0] for name in freed} == ({"vision_encoder"} if when == "frozen" else set())
            torch.testing.assert_close(got, {name: want[name] for name in got}, rtol=1e-4, atol=1e-6)


def test_where_images_cannot_be_balanced(tmp_path: Path) -> None:
    on = ("[distributed]", "balance_images = true")
    with pytest.raises(ValueError, match=r"there are no images without \[vlm\]"):
        load(tmp_path / "job.toml", *on)
    with pytest.raises(ValueError, match=r"arch = 'hf': encodes its images itself"):
        load(tmp_path / "job.toml", *on, "[vlm]", 'arch = "hf"', 'path = "x"')
    with pytest.raises(ValueError, match=r"balance_images = true: not with tensor_parallel = 2"):
        load(tmp_path / "job.toml", *on, "tensor_parallel = 2", "[vlm]", 'arch = "joint_decoder"')


def load(path: Path, *lines: str) -> JobConfig:
    path.write_text("\n".join(lines))
    return load_config(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("[data]", 'source = "jsonl"', 'path = "x.jsonl"', 'images.fit = "native"'),
            r"\[data\] images.fit = 'native': not with distributed.bal",
        ),
        (
            ("[[stages]]", 'name = "a"', "steps = 2", 'data.images.fit = "native"'),
            r"images.fit = 'native': not with distributed.balance_images",
        ),
    ],
)
def test_images_of_several_shapes_are_refused(lines: tuple[str, ...], message: str, tmp_path: Path) -> None:
    head = ("[distributed]", "balance_images = true", "[vlm]", 'arch = "joint_decoder"')
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "job.toml", *head, *lines)
