"""What tests of several packages share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kempnerforge.distributed.world import World

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: threads of parallel tests would spin against each other


@pytest.fixture
def world() -> Iterator[World]:
    """The process group of this process alone."""
    from kempnerforge.config import DistributedConfig
    from kempnerforge.distributed.world import start, stop

    yield start(DistributedConfig())
    stop()
