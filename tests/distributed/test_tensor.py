"""Layers that several ranks compute together: losses, gradients and their norm are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import run_ranks
from tests.distributed.tensor_workers import CASES, batches_of, made, steps

pytestmark = pytest.mark.dist


def same_as_one_process(folder: Path, ranks: int, layout: str, *names: str) -> None:
    for ended in run_ranks("tests.distributed.tensor_workers:share", ranks, folder, layout, *names, timeout=400):
        assert ended.returncode == 0, ended.stderr[-4000:]
    for name in names:
        it = made(CASES[name])
        for got, want in zip(torch.load(folder / f"{name}.pt"), steps(it, CASES[name], batches_of(it, CASES[name])), strict=True):
            torch.testing.assert_close(
                got.pop("loss"), want.pop("loss"), rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_two_ranks_share_layers(tmp_path: Path) -> None:
    same_as_one_process(tmp_path, 2, "2,0", *CASES)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["4,0", "2,0", "2,2"], ids=["four", "two-of-two", "copies"])
def test_four_ranks(layout: str, tmp_path: Path) -> None:
    ranks = int(layout[0])
    same_as_one_process(tmp_path, 4, layout, *(name for name, case in CASES.items() if not case.model.ffn_width % ranks))
