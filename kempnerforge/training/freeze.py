"""What trains at which step: from freeze specs to sets of parameter names, and how FSDP2 learns it.

If you write your own training loop, you need two functions: at each step where something changes
``apply_freeze_specs(model, effective_freeze(cfg, step), cfg.module_patterns)``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch.nn as nn

from kempnerforge.config import FreezeSpec, JobConfig, VLMConfig
from kempnerforge.config.lora import is_adapter, lora_frozen
from kempnerforge.distributed.fsdp import fsdp_modules
from kempnerforge.util.errors import InputError, show
from kempnerforge.util.name_rules import Aliases, match_names, matches_any, near_names
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.parts import part_of

log = logging.getLogger("kempnerforge")


def effective_freeze(cfg: JobConfig | VLMConfig, step: int) -> list[FreezeSpec]:
    """The freeze specs at optimizer step ``step``. Of those that match a parameter the last one counts.

    They are ``freeze``, then the specs of each entry of ``freeze_schedule`` with ``start_step <= step``; in a
    job whose ``[[stages]]`` freeze, the list of the stage alone.
    """
    return list(cfg.freeze_at(step))


def trainable_names(names: Iterable[str], specs: Iterable[FreezeSpec], patterns: Aliases, places: Sequence[str] = ()) -> frozenset[str]:
    """The names that train under ``specs``: all but the frozen ones. Of the specs that match a name the last
    one counts. The weight and bias under a LoRA adapter are frozen before the first spec.

    Args:
        places: of each spec, for messages.

    Raises:
        ValueError: a spec matches nothing, or nothing is left to train.
    """
    all_names = list(names)
    frozen, last = lora_frozen(all_names), "freeze"
    for number, spec in enumerate(specs):
        place = places[number] if places else "freeze"
        hit = match_names(all_names, spec.module, patterns, f"{place}.module")
        before, frozen = len(frozen), frozen | set(hit) if spec.frozen else frozen - set(hit)
        last = f"{place}.module = {spec.module!r}" if before < len(frozen) else last
    if len(frozen) == len(all_names):
        raise InputError(
            f"{last}: with it everything is frozen, nothing would train; freeze less, or thaw a part after it, as with"
            ' { module = "adapter", frozen = false }'
        )
    return frozenset(all_names) - frozen


def apply_freeze_specs(model: nn.Module, specs: Iterable[FreezeSpec], patterns: Aliases) -> dict[str, int]:
    """Freezes and thaws parameters of ``model``, spec by spec. What no spec matches stays as it is.

    Args:
        model: sharded or not; called by all ranks, between two optimizer steps (see ``apply_freeze``).
        patterns: aliases: ``module_patterns`` of the config, or ``DEFAULT_MODULE_PATTERNS``.

    Returns:
        ``module`` of each spec -> how many numbers changed because of it.

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


class FreezePlan:
    """What trains at which step of a job.

    Args:
        names: of all parameters of the model.

    Attributes:
        boundaries: the steps at which what trains may change.
        planned: the same, with those that ``train.max_steps`` cuts off.
    """

    def __init__(self, job: JobConfig, names: Iterable[str]) -> None:
        self.names, self.patterns, self.has_adapters = list(names), job.module_patterns(), bool(job.lora)
        self.own_patterns = job.vlm.own_patterns() if job.vlm is not None else {}
        self.place, self.specs_at = job.place, job.freeze_at
        self.places_at = lambda step: [self.place(key) for key in job.freeze_keys(step)]
        self.starts = {stage.name: stage.start for stage in job.resolved_stages()}
        changes = {change.start_step for change in job.vlm.freeze_schedule} if job.vlm is not None else set()
        self.boundaries = frozenset(changes.union(self.starts.values()))
        whole = replace(job, train=replace(job.train, max_steps=0)) if job.stages else job  # not cut short
        self.planned = self.boundaries.union(stage.start for stage in whole.resolved_stages())

    def check(self) -> None:
        """Resolves all patterns, also of aliases that nothing uses, so that one that matches nothing fails at the start.

        Raises:
            ValueError: as ``trainable_names``.
        """
        for step in sorted(self.boundaries):
            self.trainable(step)
        layers = {name.rpartition(".")[0] for name in self.names} if self.has_adapters else set()  # [[lora]] names layers
        for alias, patterns in self.own_patterns.items():
            if not any(matches_any(name, patterns) for name in layers.union(self.names)):
                raise InputError(
                    f"{self.place(('vlm', 'module_patterns', alias))} = {show(patterns)}: matches no parameter; near names:"
                    f' {near_names(self.names, patterns)} (a pattern matches full parameter names, for example "transformer.layers.0.*")'
                )

    def trainable(self, step: int) -> frozenset[str]:
        """Names of the parameters that train at ``step``."""
        return trainable_names(self.names, self.specs_at(step), self.patterns, self.places_at(step))

    def refuse_random(self, model: VLM) -> None:
        """Refuses a run in which random weights would never train; says which train later. Vectors are no
        random weights: biases, norms and gates begin with a constant.

        Args:
            model: of a fresh run; ``model.loaded`` are the names with loaded weights. Shapes are enough.

        Raises:
            ValueError: with the names, and what to do.
        """
        random = {name for name, parameter in model.named_parameters() if parameter.ndim > 1} - model.loaded
        frozen = {step: random - self.trainable(step) for step in self.planned}
        if never := set.intersection(random, *frozen.values()):
            below = " (what lies under an adapter of [[lora]] is frozen)" if never & lora_frozen(self.names) else ""
            raise InputError(
                f"freeze: random weights would stay frozen for the whole run: {_by_part(never)}{below}. Train them, with [vlm] freeze = [] or"
                " a spec with frozen = false; or begin with trained ones (run.init_from, or an encoder with pretrained = true)"
            )
        if first := frozen.get(0):
            log.info("frozen with random weights at first: %s", _by_part(first))

    def lora_remarks(self) -> list[str]:
        """A line for each set of parts that trains beside LoRA adapters and is in no freeze spec."""
        stages: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for stage, start in self.starts.items() if self.has_adapters else ():
            specs = self.specs_at(start)
            named = {name for spec in specs for name in match_names(self.names, spec.module, self.patterns, "freeze.module")}
            unnamed = self.trainable(start) - named
            parts = dict.fromkeys(part_of(name) for name in self.names if name in unnamed and not is_adapter(name))
            if parts:
                stages[tuple(parts)].append(repr(stage))
        return [
            f"stage {', '.join(found)}: beside the LoRA adapters there train {', '.join(parts)}, as no freeze spec names them; freeze them"
            f' (freeze = [{{ module = "{parts[0]}.*" }}, ..., {{ module = "lora", frozen = false }}]), or name them with frozen = false'
            for parts, found in stages.items()
        ]


def _by_part(names: Iterable[str]) -> str:
    """``names`` by the part of the model that they are in, with counts and one example each."""
    by_part: dict[str, list[str]] = {}
    for name in sorted(names):
        by_part.setdefault(name.partition(".")[0], []).append(name)
    return ", ".join(f"{part} ({len(found)} tensors, as {found[0]})" for part, found in by_part.items())


def apply_freeze(model: nn.Module, trainable: frozenset[str]) -> list[str]:
    """Makes exactly ``trainable`` require gradients, on all ranks, between steps. Returns the changed names.

    Modules whose parameters are all frozen are put into evaluation mode: they compute without dropout.

    NOTE: three traps of FSDP2. While a module is unsharded (for instance after an evaluation),
    ``requires_grad`` is set on a temporary tensor and lost, so everything is resharded first. A gradient that
    a frozen parameter still has would be applied, so it is dropped. The dtype of reductions is fixed at a
    group's first forward, so a change runs that set-up again (unshard, reshard).
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
