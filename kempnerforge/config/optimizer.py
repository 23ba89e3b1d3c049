"""``[optimizer]``: what moves the weights. One dataclass per optimizer, selected by ``name``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, more_than, one_of
from kempnerforge.util.errors import InputError


@dataclass
class OptimizerGroup:
    """One ``[[optimizer.groups]]`` table: what is different for some parameters; other keys stay.

    Attributes:
        module: alias or fnmatch pattern of parameter names.
        lr: peak learning rate, in place of the section's; with "muon" only of what AdamW takes.
        muon_lr: of the matrices that Muon takes.
        weight_decay, betas: as in the section.
        warmup_steps: in place of the scheduler's, at the start of every stage.
    """

    module: str
    lr: float | None = None
    muon_lr: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, *(key for key in self.given() if key != "betas"))
        if not self.given():
            raise InputError(f"module = {self.module!r}: the group changes nothing; give lr, muon_lr, weight_decay, betas or warmup_steps")
        _check_betas(self.betas or ())

    def given(self) -> dict[str, float | tuple[float, float]]:
        """The keys that are different, by name."""
        return {key: value for key, value in vars(self).items() if key != "module" and value is not None}


@dataclass
class OptimizerConfig:
    """What moves the weights.

    Subclasses register with ``@registry.register_optimizer_config``.

    Attributes:
        name: "adamw", "muon", "lion", "schedule_free_adamw", or a plugin's name.
        lr: peak learning rate, reached at the end of the warm-up.
        weight_decay: of matrices; vectors have none.
        lr_scale: alias or fnmatch pattern -> factor on the learning rate; the last match counts.
        groups: what is different for some parameters; of those that give a key for a parameter the last one
            counts. ``lr_scale`` multiplies.
        moments: what a stage does at its start with the optimizer's state: "keep", or "reset" to none.
        keeps_average: no key, a fact about the class: evaluation uses its own average of the weights.
    """

    keeps_average: ClassVar[bool] = False

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    lr_scale: dict[str, float] = field(default_factory=dict)
    groups: list[OptimizerGroup] = field(default_factory=list)
    moments: str = "keep"

    def __post_init__(self) -> None:
        one_of(self, "moments", ("keep", "reset"))
        at_least(self, 0, "lr", "weight_decay")
        for pattern, scale in self.lr_scale.items():
            if scale < 0:
                raise InputError(f"lr_scale.{pattern} = {scale}: must be >= 0")
        known = {f.name for f in fields(self)} | {"warmup_steps"}
        allowed = ", ".join(f.name for f in fields(OptimizerGroup) if f.name in known)
        for group in self.groups:
            for key in sorted(group.given().keys() - known):
                raise InputError(f"groups: {key} of {group.module!r}: name = {self.name!r} has no such key; a group may set {allowed}")

    def warnings(self, schedule: str, changed: Collection[str]) -> Iterator[str]:
        """What is allowed in a stage but may not be meant.

        Args:
            schedule: ``scheduler.name``.
            changed: the keys of this section that the stage sets.
        """
        return iter(())


@registry.register_optimizer_config
@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019).

    The other optimizers of this package share its keys, so that ``name`` can change alone.

    Attributes:
        betas: of the moments; the first one of "schedule_free_adamw" is between newest weights and average.
        eps: of AdamW, with or without a schedule.
        muon_lr: peak learning rate of the matrices that "muon" takes; ``lr`` does not move them.
        muon_momentum: of the matrices that "muon" takes.
    """

    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_lr: float = 0.02
    muon_momentum: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "muon_lr")
        more_than(self, 0, "eps")
        _check_betas(self.betas)
        if not 0 <= self.muon_momentum < 1:
            raise InputError(f"muon_momentum = {self.muon_momentum}: must lie in [0, 1)")


@registry.register_optimizer_config
@dataclass
class MuonConfig(AdamWConfig):
    """Muon (Jordan et al. 2024) for hidden matrices, with AdamW for the rest."""

    name: str = "muon"

    def warnings(self, schedule: str, changed: Collection[str]) -> Iterator[str]:
        """Where the stage or a group changes ``lr``, which matrices do not use, and leaves ``muon_lr``."""
        places = ["optimizer.lr"] if "lr" in changed and "muon_lr" not in changed else []
        places += [f"lr of group {g.module!r}" for g in self.groups if g.lr is not None and g.muon_lr is None]
        for place in places:
            yield f"{place} is of what AdamW takes; the matrices stay at optimizer.muon_lr = {self.muon_lr:g} unless it is set beside it"


@registry.register_optimizer_config
@dataclass
class LionConfig(AdamWConfig):
    """Lion (Chen et al. 2023): wants a third of AdamW's learning rate or less, and betas 0.9 and 0.99."""

    name: str = "lion"


@registry.register_optimizer_config
@dataclass
class ScheduleFreeAdamWConfig(AdamWConfig):
    """Schedule-free AdamW (Defazio et al. 2024): wants a constant schedule. Evaluation uses its average."""

    keeps_average: ClassVar[bool] = True

    name: str = "schedule_free_adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(g.betas[0] for g in (self, *self.groups) if g.betas is not None):
            raise InputError(f"betas = {list(self.betas)}: the first one must be > 0 for {self.name!r}, here and in groups")

    def warnings(self, schedule: str, changed: Collection[str]) -> Iterator[str]:
        if schedule != "constant":
            yield f"{self.name!r} is made for scheduler.name = 'constant', not {schedule!r}"


def _check_betas(betas: Iterable[float]) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"betas = {list(betas)}: must lie in [0, 1)")
