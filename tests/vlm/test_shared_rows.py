"""Ranks that share rows compute what one process computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kempnerforge.config import DistributedConfig
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.build import arch_class, build_model
from tests.dist import ranks_pass
from tests.vlm.sharing import ARCHS, cases
from tests.vlm.tiny import tiny_job, tokenizer

FEW = ("documents", "weighted", "three positions", "losses", "windows", "learned", "answers", "grids", "latest")
WORKERS = "tests.vlm.sharing"


def passes(worker: str, ranks: int, *argv: str, timeout: float = 200) -> None:
    ranks_pass(f"{WORKERS}:{worker}", ranks, *argv, timeout=timeout)


@pytest.mark.dist
@pytest.mark.parametrize("arch", ARCHS)
def test_two_ranks_are_one_process(arch: str) -> None:
    """Loss to 1e-5, gradients of two steps to 1e-4."""
    passes("same_as_one_process", 2, *[f"{arch}:{case}" for case in cases(arch) if case in FEW])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_case_on_so_many_ranks(arch: str, ranks: int) -> None:
    passes("same_as_one_process", ranks, *[f"{arch}:{case}" for case in cases(arch) if (arch, case) != ("mot", "losses")], timeout=280)


@pytest.mark.dist
def test_documents_do_not_see_each_other() -> None:
    passes("leak", 2, *ARCHS)


@pytest.mark.dist
def test_a_rank_keeps_its_part_of_the_activations() -> None:
    passes("memory", 2, "1024")


@pytest.mark.parametrize("arch", ["moma", "dual_encoder", "hf"])
def test_an_arch_that_needs_whole_rows_says_so(arch: str) -> None:
    job = tiny_job(arch)
    job = replace(job, model=replace(job.model, vocab_size=tokenizer().vocab_size), distributed=DistributedConfig(context_parallel=2))
    assert not arch_class(job).shares_rows
    with pytest.raises(
        InputError, match=rf"distributed.context_parallel = 2: vlm.arch = '{arch}' needs whole rows; .*joint_decoder, .*mot"
    ):
        build_model(job, "meta")
