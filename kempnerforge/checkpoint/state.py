"""A model and its optimizers as one flat dict of named tensors, and back.

Optimizer state is taken as it lies in ``optimizer.state``: saving runs no hidden step, parameters that never moved have no entry, and
frozen ones keep theirs. It is restored from the checkpoint's own list of entries, for the same reasons. Hyper-parameters are never stored:
they belong to the config and to the step.

Where a run keeps an average of its weights, training goes on from ``model.<fqn>``, and who wants to use the model takes
``averaged.<fqn>`` where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint.manifest import CheckpointError, Manifest, verify
from kempnerforge.checkpoint.ranks import agreed, from_rank0
from kempnerforge.checkpoint.reader import TensorInfo, load, tensor_info
from kempnerforge.checkpoint.store import save

MODEL = "model."
OPTIM = "optim."
AVERAGED = "averaged."


def _reshard(model: nn.Module) -> None:
    """After a forward without backward some FSDP units still show gathered parameters, which are neither stored nor the optimizer's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """``model.<fqn>`` -> parameter or persistent buffer, sharded ones as they are. Tied ones appear once, under their first name."""
    _reshard(model)
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the model's state {name!r} is a {type(value).__name__}; only tensors can be stored")
        if id(value) not in seen:
            seen.add(id(value))
            tensors[MODEL + name] = value
    return tensors


def _owned(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer, dict]]:
    """(fqn, parameter, its optimizer, its group) of every parameter that an optimizer has."""
    _reshard(model)
    owner = {id(p): (optimizer, group) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert len(owner) == sum(len(g["params"]) for o in optimizers for g in o.param_groups), "a parameter is in two optimizers or groups"
    named = [(name, p) for name, p in model.named_parameters() if id(p) in owner]
    assert len(named) == len(owner), "an optimizer holds parameters that are not the model's"
    for name, parameter in named:
        yield name, parameter, *owner[id(parameter)]


def optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """``optim.<fqn>|<key>`` -> the tensor at ``optimizer.state[parameter][key]``, for all that exist."""
    tensors: dict[str, Tensor] = {}
    for name, parameter, optimizer, _ in _owned(model, optimizers):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"optimizer state {key!r} of {name} is a {type(value).__name__}; only tensors can be stored")
            tensors[f"{OPTIM}{name}|{key}"] = value
    return tensors


def optimizer_template(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], info: dict[str, TensorInfo]) -> dict[str, Tensor]:
    """Empty tensors to load the optimizer entries of a checkpoint into, placed and sharded as their parameters are here.

    Args:
        info: of the checkpoint, from ``tensor_info``.

    Raises:
        CheckpointError: an entry belongs to no parameter of these optimizers, or cannot be laid out like its parameter.
    """
    owned = {name: (parameter, group) for name, parameter, _, group in _owned(model, optimizers)}
    template: dict[str, Tensor] = {}
    for entry, (shape, dtype) in info.items():
        if not entry.startswith(OPTIM):
            continue
        name, _, key = entry[len(OPTIM) :].rpartition("|")
        if name not in owned:
            raise CheckpointError(f"the checkpoint has optimizer state {key!r} of {name!r}, which no optimizer here has")
        template[entry] = _empty_like(*owned[name], name, key, shape, dtype)
    return template


def _empty_like(parameter: nn.Parameter, group: dict[str, Any], name: str, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if key == "step" and shape == ():  # torch.optim keeps the counter on the CPU unless a kernel reads it
        on_device = group.get("fused") or group.get("capturable")
        return torch.empty((), dtype=dtype, device=parameter.device if on_device else "cpu")
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if isinstance(parameter, DTensor) and shape:
        raise CheckpointError(f"optimizer state {key!r} of {name} has shape {shape}, its sharded parameter {tuple(parameter.shape)}")
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def _averaged_names(parameters: Mapping[str, Tensor], info: dict[str, TensorInfo]) -> list[str]:
    """The parameters that a checkpoint has averages of.

    Raises:
        CheckpointError: one is not among ``parameters``.
    """
    names = [entry.removeprefix(AVERAGED) for entry in info if entry.startswith(AVERAGED)]
    if unknown := sorted(set(names) - parameters.keys()):
        raise CheckpointError(
            f"the checkpoint has averages of {len(unknown)} parameters that the model does not have, such as {unknown[0]!r}"
        )
    return names


def load_optimizer(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], loaded: dict[str, Tensor]) -> None:
    """Makes ``loaded`` (a filled template) the whole state of ``optimizers``; a parameter without entry has none afterwards."""
    for optimizer in optimizers:
        optimizer.state.clear()
    owned = {name: (parameter, optimizer) for name, parameter, optimizer, _ in _owned(model, optimizers)}
    for entry, value in loaded.items():
        name, _, key = entry[len(OPTIM) :].rpartition("|")
        parameter, optimizer = owned[name]
        optimizer.state[parameter][key] = value


def _is_finite(value: Tensor) -> bool:
    value = value.detach()
    return bool((value.to_local() if isinstance(value, DTensor) else value).isfinite().all())


def save_training(
    root: Path,
    step: int,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    files: dict[str, bytes],
    keep: int,
    averages: Mapping[str, Tensor] | None = None,
) -> Path:
    """``save`` of a model and its optimizers. Call it on all ranks, between steps; nothing about the training changes.

    Args:
        averages: parameter name -> what is to be used in its place, sharded like it.

    Raises:
        CheckpointError: as ``save``, or a weight, an average or a moment is not finite. Nothing is written then.
    """
    tensors: dict[str, Tensor] = {}
    with agreed(f"cannot save step {step} in {root}"):
        averaged = {AVERAGED + name: value for name, value in (averages or {}).items()}
        tensors = {**model_tensors(model), **optimizer_tensors(model, optimizers), **averaged}
        buffers = {MODEL + name for name, _ in model.named_buffers()}
        if spoilt := [name for name, value in tensors.items() if name not in buffers and not _is_finite(value)]:
            raise CheckpointError(
                f"{len(spoilt)} of {len(tensors)} tensors hold values that are not finite, such as {spoilt[0]!r}: an update was too large."
                " Earlier checkpoints are kept; go on from the last one with a lower optimizer.lr"
            )
    return save(root, step, tensors, state, files, keep)


def load_training(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    manifest: Manifest | None = None,
    averages: dict[str, Tensor] | None = None,
) -> Manifest:
    """Restores what ``save_training`` wrote, on any number of ranks. Call it on all.

    Args:
        path: a checkpoint directory.
        manifest: of ``path`` when it was just verified (by ``find``); otherwise it is verified here, before anything changes.
        averages: takes the averages that the checkpoint has, by parameter name.

    Raises:
        CheckpointError: on all ranks, when the checkpoint is broken or does not fit the model and optimizers.
    """
    manifest = manifest or from_rank0(lambda: verify(path))
    template: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    info = tensor_info(path)
    with agreed(f"cannot load {path}"):
        tensors = model_tensors(model)
        template = optimizer_template(model, optimizers, info)
        parameters = dict(model.named_parameters())
        found = {name: torch.empty_like(parameters[name], requires_grad=False) for name in _averaged_names(parameters, info)}
    load(path, {**tensors, **template, **{AVERAGED + name: value for name, value in found.items()}})
    load_optimizer(model, optimizers, template)
    if averages is not None:
        averages.update(found)
    return manifest


def load_weights(path: Path, model: nn.Module) -> Manifest:
    """Restores the model alone, to be used: averages where the checkpoint has them, else what was trained. Call it on all ranks.

    It is strict: every tensor of the model and no other, same shapes and dtypes.

    Raises:
        CheckpointError: on all ranks, when the checkpoint is broken or does not fit the model.
    """
    manifest = from_rank0(lambda: verify(path))
    tensors: dict[str, Tensor] = {}
    averaged: dict[str, Tensor] = {}
    info = tensor_info(path)
    with agreed(f"cannot load {path}"):
        tensors = model_tensors(model)
        averaged = {AVERAGED + name: tensors[MODEL + name] for name in _averaged_names(dict(model.named_parameters()), info)}
    load(path, tensors, prefix=MODEL)
    if averaged:
        load(path, averaged, prefix=AVERAGED)
    return manifest
