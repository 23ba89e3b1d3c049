"""What trains at which step: from freeze specs to the exact set of parameter names, and the change of it under FSDP2.

Training loops of one's own need two functions: at each step where something changes
``apply_freeze_specs(model, effective_freeze(cfg, step), cfg.module_patterns)``.
"""

from __future__ import annotations

import difflib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch.nn as nn

from kempnerforge.config import FreezeSpec, JobConfig, Stage, VLMConfig
from kempnerforge.config.lora import is_adapter, lora_frozen
from kempnerforge.distributed.fsdp import fsdp_modules
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.parts import part_of

log = logging.getLogger("kempnerforge")


def effective_freeze(cfg: JobConfig | VLMConfig, step: int) -> list[FreezeSpec]:
    """The freeze specs in force at optimizer step ``step``: ``freeze``, then those of every stage of ``freeze_schedule`` with ``start_step <=
    step``. Of those that match a parameter the last one counts. Of a job whose ``[[stages]]`` freeze: the list of the stage, which replaces.
    """
    return list(cfg.freeze_at(step))


def match_names(names: Sequence[str], module: str, patterns: Mapping[str, Sequence[str]], key: str) -> list[str]:
    """The names that ``module`` means: an alias of ``patterns``, or a raw fnmatch pattern over full parameter names.

    Raises:
        ValueError: nothing matches; the message lists near names.
    """
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns.get(module, [module]))]
    if not found:
        prefixes = sorted({".".join(name.split(".")[: depth + 1]) for name in names for depth in range(name.count(".") + 1)})
        near = difflib.get_close_matches(module, [*patterns, *prefixes], n=4, cutoff=0.4)
        raise InputError(
            f"{key} = {module!r}: matches no parameter; aliases: {', '.join(patterns) or 'none'}; near names: {', '.join(near) or 'none'}"
            ' (a raw pattern matches full parameter names, for example "transformer.layers.0.*")'
        )
    return found


def trainable_names(names: Iterable[str], specs: Iterable[FreezeSpec], patterns: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """The names that train under ``specs``: all, less what is frozen; of the specs that match a name the last one counts. What lies under an
    adapter is frozen before the first of them.

    Raises:
        ValueError: a spec matches nothing, or nothing is left to train.
    """
    all_names = list(names)
    frozen = lora_frozen(all_names)
    for spec in specs:
        hit = match_names(all_names, spec.module, patterns, "freeze.module")
        frozen = frozen | set(hit) if spec.frozen else frozen - set(hit)
    if len(frozen) == len(all_names):
        raise InputError("freeze: everything is frozen, nothing would train")
    return frozenset(all_names) - frozen


def remarks_on_lora(stages: Iterable[Stage], job: JobConfig, names: Sequence[str]) -> list[str]:
    """A line for each set of parts that trains beside LoRA adapters without a freeze spec that says so."""
    patterns, found = job.module_patterns(), defaultdict(list)
    for stage in stages if job.lora else ():
        specs = job.freeze_at(stage.start)
        told = {name for spec in specs for name in match_names(names, spec.module, patterns, "freeze.module")}
        beside = trainable_names(names, specs, patterns) - told
        found[tuple(dict.fromkeys(part_of(name) for name in names if name in beside and not is_adapter(name)))].append(repr(stage.name))
    return [
        f"stage {', '.join(stages)}: beside the LoRA adapters there train {', '.join(parts)}, as no freeze spec names them; freeze them"
        f' (freeze = [{{ module = "{parts[0]}.*" }}, ..., {{ module = "lora", frozen = false }}]), or name them with frozen = false'
        for parts, stages in found.items()
        if parts
    ]


def apply_freeze_specs(model: nn.Module, specs: Iterable[FreezeSpec], patterns: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Freezes and thaws parameters of ``model`` as ``specs`` say, one after the other; what none of them matches stays as it is.

    Args:
        model: sharded or not; called by all ranks, between two optimizer steps (see ``apply_freeze``).
        patterns: aliases: ``module_patterns`` of the config, or ``DEFAULT_MODULE_PATTERNS``.

    Returns:
        Module of the spec -> how many numbers it froze or thawed that were not so before.

    Raises:
        ValueError: a spec matches nothing; nothing has been changed then.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    counts: dict[str, int] = {}
    for spec in specs:
        hit = set(match_names(list(sizes), spec.module, patterns, "freeze.module"))
        flipped = hit & trainable if spec.frozen else hit - trainable
        trainable ^= flipped
        counts[spec.module] = counts.get(spec.module, 0) + sum(sizes[name] for name in flipped)
    apply_freeze(model, frozenset(trainable))
    return counts


def refuse_random(job: JobConfig, model: VLM) -> None:
    """Refuses a run in which random weights would never train; says which train later. Vectors are no random weights: biases, norms
    and gates begin with a constant.

    Args:
        model: as a fresh run begins with it, ``model.loaded`` are the names with weights from elsewhere. Shapes are enough.

    Raises:
        ValueError: with the names, and what to do.
    """
    random = {name for name, parameter in model.named_parameters() if parameter.ndim > 1} - model.loaded
    names, patterns = [name for name, _ in model.named_parameters()], job.module_patterns()
    planned = replace(job, train=replace(job.train, max_steps=0)) if job.stages else job
    frozen = {step: random - trainable_names(names, job.freeze_at(step), patterns) for step in freeze_boundaries(planned, names, patterns)}
    if never := set.intersection(random, *frozen.values()):
        below = " (what lies under an adapter of [[lora]] is frozen)" if never & lora_frozen(names) else ""
        raise InputError(
            f"freeze: random weights would stay frozen for the whole run: {_parts(never)}{below}. Train them, with [vlm] freeze = [] or a spec with"
            " frozen = false; or begin with trained ones (run.init_from, or an encoder with pretrained = true)"
        )
    if first := frozen.get(0):
        log.info("frozen with random weights at first: %s", _parts(first))


def _parts(names: Iterable[str]) -> str:
    """``names`` by the part of the model that they are in, with counts and one example each."""
    by_part: dict[str, list[str]] = {}
    for name in sorted(names):
        by_part.setdefault(name.partition(".")[0], []).append(name)
    return ", ".join(f"{part} ({len(found)} tensors, as {found[0]})" for part, found in by_part.items())


def freeze_boundaries(job: JobConfig, names: Sequence[str], patterns: Mapping[str, Sequence[str]]) -> frozenset[int]:
    """The steps at which what trains may change. All of them are resolved here, so that a pattern without a hit fails at the start.

    Raises:
        ValueError: as ``trainable_names``.
    """
    starts = {stage.start for stage in job.resolved_stages()}
    if job.vlm is not None:
        starts |= {change.start_step for change in job.vlm.freeze_schedule}
    for start in sorted(starts):
        trainable_names(names, job.freeze_at(start), patterns)
    return frozenset(starts)


def apply_freeze(model: nn.Module, trainable: frozenset[str]) -> list[str]:
    """Makes exactly ``trainable`` require gradients; called between optimizer steps, by all ranks. Returns the names that changed.

    Modules with parameters that are all frozen are put into evaluation mode: they compute as they will be used, without dropout.

    NOTE: three traps of FSDP2 lie here. While a module is unsharded (after an evaluation, say) a flip lands on a temporary tensor and is
    lost, so everything is resharded first. A pending gradient of a frozen parameter would still be stepped, so it is dropped. The dtype of
    reductions is fixed at a group's first forward from what trains then, so a change runs that set-up again (unshard, reshard).
    """
    modules = fsdp_modules(model)
    for module in modules:
        module.reshard()
    changed = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (name in trainable):
            parameter.requires_grad_(name in trainable)
            changed.append(name)
        if name not in trainable:
            parameter.grad = None
    if changed:
        for module in modules:
            module.unshard()
            module.reshard()
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
    return changed
