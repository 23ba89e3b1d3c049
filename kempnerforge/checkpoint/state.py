"""A model and its optimizers as one flat dict of named tensors, and back.

The entries are ``model.<name>``, ``optim.<name>|<key>`` and, in a run that averages its weights,
``averaged.<name>``. Training continues from the first two; to use a model, take the averages.

Optimizer state is saved as it is in ``optimizer.state``: no step is run for it, and a parameter that never
moved has no entry. It is restored from the entries of the checkpoint, for the same reason. Hyper-parameters
are not stored: the config and the step decide them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Owned(NamedTuple):
    """A parameter with the optimizer and the group that move it."""

    name: str
    parameter: nn.Parameter
    optimizer: torch.optim.Optimizer
    group: dict[str, Any]


def _reshard(model: nn.Module) -> None:
    """After a forward without backward some FSDP units still show gathered parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """``model.<name>`` -> parameter or persistent buffer, sharded as it is. Tied ones appear once."""
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


def _owned(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[Owned]:
    """Every parameter of the model that an optimizer has."""
    _reshard(model)
    owners = {id(p): (optimizer, group) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert len(owners) == sum(len(g["params"]) for o in optimizers for g in o.param_groups), "a parameter is in two optimizers or groups"
    owned = [Owned(name, p, *owners[id(p)]) for name, p in model.named_parameters() if id(p) in owners]
    assert len(owned) == len(owners), "an optimizer holds parameters that are not the model's"
    return owned


def optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """``optim.<fqn>|<key>`` -> the tensor at ``optimizer.state[parameter][key]``, for all that exist."""
    tensors: dict[str, Tensor] = {}
    for owned in _owned(model, optimizers):
        for key, value in owned.optimizer.state.get(owned.parameter, {}).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"optimizer state {key!r} of {owned.name} is a {type(value).__name__}; only tensors can be stored")
            tensors[f"{OPTIM}{owned.name}|{key}"] = value
    return tensors


def optimizer_template(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], info: dict[str, TensorInfo]) -> dict[str, Tensor]:
    """Empty tensors for the optimizer entries of a checkpoint, placed and sharded like their parameters.

    Args:
        info: of the checkpoint, from ``tensor_info``.

    Raises:
        CheckpointError: an entry has no parameter in these optimizers, or cannot be sharded like it.
    """
    known = {owned.name: owned for owned in _owned(model, optimizers)}
    template: dict[str, Tensor] = {}
    for entry, (shape, dtype) in info.items():
        if not entry.startswith(OPTIM):
            continue
        name, _, key = entry[len(OPTIM) :].rpartition("|")
        if name not in known:
            raise CheckpointError(f"the checkpoint has optimizer state {key!r} of {name!r}, which no optimizer here has")
        template[entry] = _empty_state(known[name], key, shape, dtype)
    return template


def _empty_state(owned: Owned, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    parameter = owned.parameter
    if key == "step" and shape == ():  # torch.optim keeps the counter on the CPU unless a kernel reads it
        on_device = owned.group.get("fused") or owned.group.get("capturable")
        return torch.empty((), dtype=dtype, device=parameter.device if on_device else "cpu")
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if isinstance(parameter, DTensor) and shape:
        raise CheckpointError(f"optimizer state {key!r} of {owned.name} has shape {shape}, its sharded parameter {tuple(parameter.shape)}")
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def _averaged_names(parameters: Mapping[str, Tensor], info: dict[str, TensorInfo]) -> list[str]:
    """The names of the averages in a checkpoint.

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
    """Makes ``loaded``, a filled template, the whole state of ``optimizers``."""
    for optimizer in optimizers:
        optimizer.state.clear()
    known = {owned.name: owned for owned in _owned(model, optimizers)}
    for entry, value in loaded.items():
        name, _, key = entry[len(OPTIM) :].rpartition("|")
        known[name].optimizer.state[known[name].parameter][key] = value


def _is_finite(value: Tensor) -> bool:
    value = value.detach()
    return bool((value.to_local() if isinstance(value, DTensor) else value).isfinite().all())


def training_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], averages: Mapping[str, Tensor] | None, what: str
) -> dict[str, Tensor]:
    """Everything that a checkpoint has of a model and its optimizers. Call it on all ranks, between steps.

    Args:
        averages: parameter name -> average, sharded like the parameter.
        what: cannot be done, for messages.

    Raises:
        CheckpointError: on all ranks: a weight, average or moment is not finite.
    """
    tensors: dict[str, Tensor] = {}
    with agreed(what):
        averaged = {AVERAGED + name: value for name, value in (averages or {}).items()}
        tensors = {**model_tensors(model), **optimizer_tensors(model, optimizers), **averaged}
        buffers = {MODEL + name for name, _ in model.named_buffers()}
        if spoilt := [name for name, value in tensors.items() if name not in buffers and not _is_finite(value)]:
            raise CheckpointError(
                f"{len(spoilt)} of {len(tensors)} tensors hold values that are not finite, such as {spoilt[0]!r}: an update was too large."
                " Earlier checkpoints are kept; go on from the last one with a lower optimizer.lr"
            )
    return tensors


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
    """``save`` of ``training_tensors``; the model and its optimizers stay as they are. Call it on all ranks.

    Raises:
        CheckpointError: as ``save`` and ``training_tensors``; then nothing is written.
    """
    return save(root, step, training_tensors(model, optimizers, averages, f"cannot save step {step} in {root}"), state, files, keep)


def load_training(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    manifest: Manifest | None = None,
) -> dict[str, Tensor]:
    """Restores what ``save_training`` wrote, on any number of ranks. Call it on all.

    Args:
        path: a checkpoint directory.
        manifest: of ``path`` if it was just verified (by ``find``); None verifies it first.

    Returns:
        The averages of weights in the checkpoint, by parameter name.

    Raises:
        CheckpointError: on all ranks, when the checkpoint is broken or does not fit the model and optimizers.
    """
    if manifest is None:
        from_rank0(lambda: verify(path))
    tensors, template, averages = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    info = tensor_info(path)
    with agreed(f"cannot load {path}"):
        tensors = model_tensors(model)
        template = optimizer_template(model, optimizers, info)
        parameters = dict(model.named_parameters())
        averages = {name: torch.empty_like(parameters[name], requires_grad=False) for name in _averaged_names(parameters, info)}
    load(path, {**tensors, **template, **{AVERAGED + name: value for name, value in averages.items()}})
    load_optimizer(model, optimizers, template)
    return averages


def load_weights(path: Path, model: nn.Module) -> Manifest:
    """Restores the model alone, to use it: the averages in the checkpoint, and the trained weights of all
    other parameters. Call it on all ranks.

    The checkpoint must have every tensor of the model and no other, with the same shapes and dtypes.

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
