"""What runs of the tests of training may do that a user's may not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def random_may_stay_frozen() -> Iterator[None]:
    """Runs of random weights that never train, for tests of which weights move. A run of a user's is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kempnerforge.training.freeze.FreezePlan.refuse_random", lambda plan, model: None)
        yield
