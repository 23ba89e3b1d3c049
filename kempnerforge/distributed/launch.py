"""``--nproc``: several processes of this command on one machine, as ``torchrun`` starts them, and the exit code of the first to fail."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(argv: Sequence[str], processes: int) -> int:
    """Runs ``python -m kempnerforge ARGV`` in ``processes`` processes; returns the first failure's exit code, or 0.

    Args:
        argv: the command line of this process, ``--nproc`` included: where ``RANK`` is set it is not read again.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the processes say themselves what is wrong
    config = LaunchConfig(
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "kempnerforge", *argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 3  # below 0: killed by a signal, and a restart continues
    except SignalException:
        return 130
    return 0
