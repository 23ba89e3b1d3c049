"""Losses that parts of a model have beside the one of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class HasAuxLoss(Protocol):
    """A module, anywhere in a model, that adds an auxiliary loss.

    The attribute is there from ``__init__`` on (``self.aux_loss: Tensor | None = None``). In training
    ``forward`` sets it to a scalar, its weight applied and its graph attached: a mean over tokens, as it is
    multiplied by the number of targets and added to the loss. In evaluation ``forward`` sets it to None.
    Collecting the losses sets it to None, too, so that none is counted in a later pass in which its module is
    not called. It may be made of anything in the module: inputs, weights, what it returns.
    """

    aux_loss: Tensor | None


def with_aux_loss(model: nn.Module) -> list[HasAuxLoss]:
    """The modules of ``model`` that may add an auxiliary loss."""
    return [module for module in model.modules() if isinstance(module, HasAuxLoss)]


def take_losses(modules: Sequence[HasAuxLoss]) -> list[Tensor | None]:
    """The losses of ``modules``, which have none afterwards."""
    losses = [module.aux_loss for module in modules]
    for module in modules:
        module.aux_loss = None
    return losses


def return_losses(unit: nn.Module, modules: Sequence[HasAuxLoss]) -> None:
    """Changes ``unit.forward`` to return (value, losses): its value, and the losses of ``modules``, which are
    children of ``unit``.

    FSDP2 gathers the weights of a unit for its backward pass when a gradient arrives at an output that the
    unit has *returned*. A loss that leaves the unit as an attribute would be differentiated before that, when
    the weights are not gathered. Recomputation would not keep a graph in an attribute, either.
    """
    forward = unit.forward

    def returning(*args: Any, **kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        try:
            return forward(*args, **kwargs), [module.aux_loss for module in modules]
        finally:  # recomputation leaves by an exception as soon as it has what it needs
            take_losses(modules)

    unit.forward = returning  # an attribute of the instance: no name moves


def restore_losses(unit: nn.Module, modules: Sequence[HasAuxLoss]) -> None:
    """After ``return_losses`` and all hooks that want to see the losses: they are attributes again, and the
    unit returns its value alone.
    """

    def restoring(_: nn.Module, args: Any, output: tuple[Any, list[Tensor | None]]) -> Any:
        value, losses = output
        for module, loss in zip(modules, losses, strict=True):
            module.aux_loss = loss
        return value

    unit.register_forward_hook(restoring)
