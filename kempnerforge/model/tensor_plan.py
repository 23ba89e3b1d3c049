"""How several ranks share the weights of a module, said by the module (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


class Share(Enum):
    """What each rank has of a part of a module, and what the part sees.

    Attributes:
        COLUMNS: a linear layer with a share of its outputs; it reads whole vectors.
        ROWS: a linear layer with a share of its inputs, which are outputs of ``COLUMNS``. The ranks' results
            are summed, and the bias is added once.
        INSIDE: all of a part that is between the two, so that it sees the rank's heads or channels alone. Its
            gradients are summed over the ranks. It reads its parameters through ``mine``.
        WHOLE: all of a part that sees whole vectors, the same on all ranks, or that has a plan of its own.
    """

    COLUMNS = "columns"
    ROWS = "rows"
    INSIDE = "inside"
    WHOLE = "whole"


@runtime_checkable
class HasTensorPlan(Protocol):
    """A module that several ranks can compute together: each has some of its heads or channels.

    Attributes:
        tensor_plan: name of a child or parameter (``mlp.fc1`` is a child of a child) -> what a rank has of
            it. All parameters are in it.

    A child ``enter``, an ``nn.Identity``, is applied to what several ``COLUMNS`` read: with other ranks it
    makes one sum of their gradients. Without it each layer makes its own.
    """

    @property
    def tensor_plan(self) -> Mapping[str, Share]: ...


def mine(parameter: Tensor) -> Tensor:
    """What this rank has of ``parameter``. The gradient of one that all ranks have whole is summed over them:
    each knows the part of it that comes from its own heads or channels.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial() if isinstance(p, Replicate) else p for p in parameter.placements])
