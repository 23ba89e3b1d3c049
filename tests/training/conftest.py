"""What runs of the tests of training may do that a user's may not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kempnerforge.config import registry


@pytest.fixture(scope="module")
def random_may_stay_frozen() -> Iterator[None]:
    """Runs of random weights that never train, for tests of which weights move. A run of a user's is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kempnerforge.training.freeze.FreezePlan.refuse_random", lambda plan, model: None)
        yield


@pytest.fixture
def plugins_are_forgotten(tmp_path: Path) -> Iterator[None]:
    """What the plugins in ``tmp_path`` have registered is taken out after the test."""
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            registry.forget(name)
            del sys.modules[name]
