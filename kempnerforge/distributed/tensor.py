"""Layers that several ranks compute together, by the plans of their modules (Shoeybi et al. 2019, section 3).

Outside of the shared linear layers activations are plain tensors, the same on all of these ranks.

Shapes: I input, O output features of a layer, R ranks that share it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from kempnerforge.model.aux_loss import with_aux_loss
from kempnerforge.model.lora import LoRALinear
from kempnerforge.model.tensor_plan import HasTensorPlan, Share, mine
from kempnerforge.util.errors import InputError

KEY = "distributed.tensor_parallel"


class Enter(nn.Module):
    """What all ranks have alike, for layers of which each has a share: what is sent back is summed over the
    ranks, once for all these layers.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        return DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)


class Columns(nn.Linear):
    """A linear layer with a share of its outputs: ``weight`` (O / R, I), ``bias`` (O / R,)."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O / R)."""
        return F.linear(entered(input, self.weight), mine(self.weight), None if self.bias is None else mine(self.bias))


class Rows(nn.Linear):
    """A linear layer with a share of its inputs: ``weight`` (O, I / R), ``bias`` (O,)."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I / R) -> (..., O)."""
        y = summed(F.linear(input, mine(self.weight)), self.weight)
        return y if self.bias is None else y + self.bias


class LoRAColumns(LoRALinear):
    """``Columns`` with an adapter: of ``lora_b`` and ``magnitude`` a rank has what belongs to its outputs."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(entered(input, self.weight))


class LoRARows(LoRALinear):
    """``Rows`` with an adapter: of ``lora_a`` a rank has what belongs to its inputs."""

    def forward(self, input: Tensor) -> Tensor:
        y = summed(self.with_bias(input, None), self.weight)
        return y if self.bias is None else y + self.bias

    def lengths(self, weight: Tensor) -> Tensor:
        return summed(super().lengths(weight).square(), self.weight).sqrt()


def entered(x: Tensor, like: Tensor) -> Tensor:
    """``x``, which all ranks that share ``like`` have alike. What is sent back is summed over them."""
    assert isinstance(like, DTensor)
    return mine(x if isinstance(x, DTensor) else DTensor.from_local(x, like.device_mesh, [Replicate()], run_check=False))


def summed(x: Tensor, like: Tensor) -> Tensor:
    """The sum over the ranks that share ``like``."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(x, like.device_mesh, [Partial()], run_check=False).full_tensor()


KINDS: dict[type[nn.Module], dict[Share, type[nn.Module]]] = {
    nn.Linear: {Share.COLUMNS: Columns, Share.ROWS: Rows},
    LoRALinear: {Share.COLUMNS: LoRAColumns, Share.ROWS: LoRARows},
}
PLACEMENTS: dict[Share, dict[str, Placement]] = {
    Share.COLUMNS: {"weight": Shard(0), "bias": Shard(0), "lora_a": Replicate(), "lora_b": Shard(0), "magnitude": Shard(0)},
    Share.ROWS: {"weight": Shard(1), "lora_a": Shard(1), "lora_b": Replicate(), "magnitude": Replicate()},
}
"""Of parameters of a linear layer; of those that are not here each rank has all, and its gradient is whole."""


class SharedPart(NamedTuple):
    """A part of a module with a plan.

    Attributes:
        whole: the module.
        name: of the part in the model.
    """

    whole: nn.Module
    name: str
    part: nn.Module
    share: Share

    def axis(self, parameter: str) -> int | None:
        """Along which ``parameter`` of the part is divided; None: each rank has all of it."""
        placement = self.placement(parameter)
        return placement.dim if isinstance(placement, Shard) else None

    def placement(self, parameter: str) -> Placement | None:
        """Of ``parameter`` over the ranks; None: it is no concern of theirs, as its gradient is whole."""
        return Replicate() if self.share is Share.INSIDE else PLACEMENTS[self.share].get(parameter)


def shared_parts(model: nn.Module, count: int) -> list[SharedPart]:
    """The parts of ``model`` of which ``count`` ranks each have a share.

    Raises:
        InputError: there are none, a module with a plan has a parameter or a layer that the plan does not
            fit, or ``count`` does not divide a size.
    """
    planned = [(path, module) for path, module in model.named_modules() if isinstance(module, HasTensorPlan)]
    found = list[SharedPart]()
    for path, module in planned:
        assert isinstance(module, nn.Module)
        if with_aux_loss(module):
            raise InputError(f"{KEY} = {count}: {path} has an auxiliary loss, which would be of a share of its values")
        plan = module.tensor_plan
        for name, _ in module.named_parameters():
            if sum(name == part or name.startswith(f"{part}.") for part in plan) != 1:
                raise InputError(f"{KEY} = {count}: {path} has a parameter {name!r} of which its tensor_plan says nothing")
        parts = dict(module.named_modules())
        for name in plan.keys() & parts.keys():
            if plan[name] is not Share.WHOLE:
                found.append(SharedPart(module, f"{path}.{name}", parts[name], plan[name]))
    if not found:
        raise InputError(f"{KEY} = {count}: {type(model).__name__} has no layers that several processes can share")
    for one in found:
        if one.share is not Share.INSIDE and type(one.part) not in KINDS:
            raise InputError(f"{KEY} = {count}: {one.name} is a {type(one.part).__name__}; only plain linear layers can be shared")
        for key, parameter in one.part.named_parameters():
            axis = one.axis(key)
            if axis is not None and parameter.shape[axis] % count:
                raise InputError(f"{KEY} = {count}: does not divide {one.name}.{key} of shape {tuple(parameter.shape)}")
    return found


def share_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gives each rank of ``mesh`` its share of the modules with a plan; names stay.

    Args:
        model: on the meta device.

    Raises:
        InputError: as of ``shared_parts``.
    """
    for one in shared_parts(model, mesh.size()):
        for key, parameter in [*one.part.named_parameters()]:
            placement = one.placement(key)
            if placement is not None:
                owner, _, last = key.rpartition(".")
                one.part.get_submodule(owner).register_parameter(last, _divided(parameter, mesh, placement))
        if one.share is not Share.INSIDE:
            one.part.__class__ = KINDS[type(one.part)][one.share]
        if "enter" in dict(one.whole.named_children()):
            one.whole.add_module("enter", Enter(mesh))


def _divided(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    shape = share_of(parameter, placement.dim if isinstance(placement, Shard) else None, mesh.size())
    local = torch.empty(shape, dtype=parameter.dtype, device="meta")
    whole = DTensor.from_local(local, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def share_of(parameter: Tensor, axis: int | None, count: int) -> list[int]:
    """The shape of what each of ``count`` ranks has of ``parameter``, divided along ``axis``; None: all."""
    return [size // count if number == axis else size for number, size in enumerate(parameter.shape)]
