"""What tests of several packages share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from kempnerforge.distributed.world import World

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: threads of parallel tests would spin against each other

settings.register_profile("shared cores", deadline=None)  # a slow machine is no failure
settings.load_profile("shared cores")


@pytest.fixture
def world() -> Iterator[World]:
    """The process group of this process alone."""
    from kempnerforge.config import DistributedConfig
    from kempnerforge.distributed.world import start, stop

    yield start(DistributedConfig())
    stop()
