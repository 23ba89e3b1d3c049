"""Layers that several ranks compute together, by the plans of their modules (Shoeybi et al. 2019, section 3).

Outside of the shared linear layers activations are plain tensors, the same on all of these ranks.

Shapes: I input, O output features of a layer, R ranks that share it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from kempnerforge.model.aux_loss import with_aux_loss
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
        weight = self.weight
        assert isinstance(weight, DTensor)
        x = input if isinstance(input, DTensor) else DTensor.from_local(input, weight.device_mesh, [Replicate()], run_check=False)
        return F.linear(mine(x), mine(weight), None if self.bias is None else mine(self.bias))


class Rows(nn.Linear):
    """A linear layer with a share of its inputs: ``weight`` (O, I / R), ``bias`` (O,)."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I / R) -> (..., O), the sum over the ranks."""
        weight = self.weight
        assert isinstance(weight, DTensor)
        y = DTensor.from_local(F.linear(input, mine(weight)), weight.device_mesh, [Partial()], run_check=False).full_tensor()
        return y if self.bias is None else y + self.bias


def share_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gives each rank of ``mesh`` its share of the modules with a plan; names stay.

    Args:
        model: on the meta device.

    Raises:
        InputError: no module has a plan, one has a parameter that is not in its plan, or a size cannot be
            divided.
    """
    planned = [(path, module) for path, module in model.named_modules() if isinstance(module, HasTensorPlan)]
    if not planned:
        raise InputError(f"{KEY} = {mesh.size()}: {type(model).__name__} has no layers that several processes can share")
    for path, module in planned:
        assert isinstance(module, nn.Module)
        if with_aux_loss(module):
            raise InputError(f"{KEY} = {mesh.size()}: {path} has an auxiliary loss, which would be of a share of its values")
        plan = module.tensor_plan
        for name, _ in module.named_parameters():
            if sum(name == part or name.startswith(f"{part}.") for part in plan) != 1:
                raise InputError(f"{KEY} = {mesh.size()}: {path} has a parameter {name!r} of which its tensor_plan says nothing")
        for name, share in plan.items():
            part = dict(module.named_modules()).get(name)
            if part is not None and share is not Share.WHOLE:
                _share(f"{path}.{name}", part, share, mesh)
        if "enter" in dict(module.named_children()):
            module.add_module("enter", Enter(mesh))


def _share(name: str, part: nn.Module, share: Share, mesh: DeviceMesh) -> None:
    if share is Share.INSIDE:
        for key, parameter in part.named_parameters():
            owner, _, last = key.rpartition(".")
            part.get_submodule(owner).register_parameter(last, _divided(name, parameter, mesh, Replicate()))
        return
    if type(part) is not nn.Linear:
        raise InputError(f"{KEY} = {mesh.size()}: {name} is a {type(part).__name__}; only plain linear layers can be shared")
    of_weight = Shard(0) if share is Share.COLUMNS else Shard(1)
    part.weight = _divided(name, part.weight, mesh, of_weight)
    if part.bias is not None and share is Share.COLUMNS:
        part.bias = _divided(name, part.bias, mesh, Shard(0))
    part.__class__ = Columns if share is Share.COLUMNS else Rows


def _divided(name: str, parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """``parameter`` as ``placement`` says."""
    shape = list(parameter.shape)
    if isinstance(placement, Shard):
        if shape[placement.dim] % mesh.size():
            raise InputError(f"{KEY} = {mesh.size()}: does not divide {name} of shape {tuple(parameter.shape)}")
        shape[placement.dim] //= mesh.size()
    local = torch.empty(shape, dtype=parameter.dtype, device="meta")
    whole = DTensor.from_local(local, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
