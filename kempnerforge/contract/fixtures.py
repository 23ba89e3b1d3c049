"""What checks take from pytest: a process group of one, and what two processes find. Torch is imported when a
check needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from kempnerforge.distributed.world import World


@pytest.fixture
def world() -> Iterator[World]:
    """The process group of this process alone."""
    from kempnerforge.config import DistributedConfig
    from kempnerforge.distributed.world import start, stop

    yield start(DistributedConfig())
    stop()


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Tensor]]]:
    """What two ranks find in each of two steps of a case: all cases that were selected in one go, as starting
    ranks takes seconds; those that are compiled arch by arch, as the compiler takes minutes.
    """
    import torch

    from kempnerforge.contract.ranks import COMPILED, TRACED, run_two_ranks

    folder = tmp_path_factory.mktemp("ranks")
    stopped: dict[str | None, str] = {}

    def start_of(case: str) -> str | None:
        return case if COMPILED in case or TRACED in case else None

    def found(case: str) -> list[dict[str, Tensor]]:
        if (begin := start_of(case)) not in stopped:
            items = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
            every = [item.callspec.params["ranked"] for item in items if "ranked" in item.fixturenames]
            selected = [one for one in every if isinstance(one, str) and start_of(one) == begin]  # a check without a case has none
            stopped[begin] = run_two_ranks(folder, selected, 500 if begin is None else 1000)
        written: list[Path] = [folder / f"{case}-{step}.pt" for step in range(2)]
        assert all(path.exists() for path in written), stopped[begin]
        return [torch.load(path, weights_only=True) for path in written]

    return found
