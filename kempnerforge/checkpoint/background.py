"""Writes a checkpoint while training goes on: a copy in memory first, then the files (CheckFreq, Mohan et al.
2021).
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from kempnerforge.checkpoint.manifest import CheckpointError
from kempnerforge.checkpoint.ranks import in_group, talking_in
from kempnerforge.checkpoint.store import save


class BackgroundSave:
    """``save`` in a thread, one at a time: the tensors are copied to CPU memory first, and may change then.

    All ranks construct one and call its methods in the same order. Its threads have a separate process group
    (gloo), because training uses the other one meanwhile.

    Args:
        timeout_s: seconds that the ranks wait for each other in the thread.
    """

    def __init__(self, timeout_s: int) -> None:
        timeout = timedelta(seconds=timeout_s)
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if in_group() else None
        cuda = torch.cuda.is_available()
        options = StagingOptions(use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda)
        self._stager = DefaultStager(options)  # keeps its copies and fills them again
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, root: Path, step: int, tensors: dict[str, Tensor], *others: Any) -> None:
        """As ``store.save``, which takes the ``others``, after waiting for the one before.

        Raises:
            CheckpointError: on all ranks: the one before has failed.
        """
        self.wait()
        copies = self._stager.stage({name: tensor.detach() for name, tensor in tensors.items()})
        self._writing = self._thread.submit(self._write, root, step, copies, *others)

    def _write(self, *args: Any) -> None:
        try:
            with talking_in(self._group):
                save(*args)
        except CheckpointError:  # on all ranks
            raise
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        """Closes the connections of this rank's threads: others may wait for it in a collective that it has
        left by ``error``, and it for them in training.
        """
        link: BaseException | None = error
        while link is not None:  # frames refer to the group, which is closed when nothing refers to it
            clear_frames(link.__traceback__)
            link = link.__context__
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: on all ranks: what was being written has failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
