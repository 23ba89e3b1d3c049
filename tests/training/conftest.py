"""One thread, as in the processes that some tests start: sums over many numbers depend on it in the last bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def random_may_stay_frozen() -> Iterator[None]:
    """Runs of random weights that never train, for tests of which weights move. A run of a user's is refused."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("training.setup", "inspection.plan"):
            patch.setattr(f"kempnerforge.{module}.refuse_random", lambda job, model: None)
        yield
