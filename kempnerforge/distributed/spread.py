"""From the weights of rank 0 to all ranks, each with its part of them, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def take_away(model: nn.Module) -> dict[str, Tensor]:
    """Leaves ``model`` on the meta device. Returns its parameters, buffers and other tensors by name."""
    whole: dict[str, Tensor] = {}

    def take(name: str, tensor: Tensor) -> Tensor:
        whole[name] = tensor.detach()
        return torch.empty_like(tensor, device="meta")

    _replace(model, take)
    return whole


@torch.no_grad()
def spread(model: nn.Module, whole: dict[str, Tensor], device: torch.device, *, blank: bool = False) -> None:
    """Gives every rank its part of the tensors of rank 0. Call it on all ranks.

    Args:
        model: sharded, on the meta device.
        whole: of ``take_away``; only rank 0's is read, and each tensor is let go once it is sent.
        device: where the model is afterwards.
        blank: parameters get memory and no values.
    """

    def receive(name: str, tensor: Tensor) -> Tensor:
        mine = whole.pop(name, None)
        if blank and isinstance(tensor, nn.Parameter):
            return torch.empty_like(tensor, device=device)
        if dist.get_rank() == 0 and mine is not None:
            value = mine.to(device).contiguous()
        else:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.broadcast(value.reshape(-1).view(torch.uint8), src=0)  # backends do not have all dtypes
        if isinstance(tensor, DTensor):
            return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).clone()  # not a view of the whole
        return value

    _replace(model, receive)


def _replace(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Puts ``make(name, tensor)`` at the place of each parameter, buffer and tensor that is a plain attribute
    of a module. One that several modules share stays one, which the functions of ``nn.Module`` do not
    promise.
    """
    made: dict[int, Tensor] = {}
    old: list[Tensor] = []  # an id is reused when its tensor is gone
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, tensor in table.items():
                if not isinstance(tensor, Tensor):
                    continue
                if id(tensor) not in made:
                    new = make(f"{path}.{name}" if path else name, tensor)
                    old.append(tensor)
                    made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                table[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]
