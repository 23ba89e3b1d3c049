"""What tests of several packages share."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from hypothesis import settings

from kempnerforge.contract.fixtures import ranks, world

__all__ = ["ranks", "world"]
pytest.register_assert_rewrite(*(f"kempnerforge.contract.{part}_checks" for part in ("generation", "model", "training", "grid")))

os.environ["OMP_NUM_THREADS"] = "1"
"""Read when torch is imported. Threads of parallel tests would spin against each other, and the last bit of long sums depends on their number."""
if "torch" in sys.modules:  # imported by a plugin that was given with -p
    sys.modules["torch"].set_num_threads(1)

# tests that are started in the background, or by nohup, inherit that these are ignored, and so would all processes that they start
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

settings.register_profile("shared cores", deadline=None)  # a slow machine is no failure
settings.load_profile("shared cores")
