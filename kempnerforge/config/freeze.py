"""What says which parameters train: freeze specs, their stages, and the aliases that they may name."""

from __future__ import annotations

from dataclasses import dataclass

from kempnerforge.config.checks import at_least
from kempnerforge.util.errors import InputError


def named(*modules: str) -> list[str]:
    """The patterns of an alias for ``modules``: a parameter that has the module's own name, and all that lie
    in it.
    """
    return [pattern for module in modules for pattern in (module, f"{module}.*")]


DEFAULT_MODULE_PATTERNS: dict[str, list[str]] = {name: named(name) for name in ("transformer", "vision_encoder", "adapter")}
"""Aliases of freeze specs and learning-rate scales: name -> fnmatch patterns over parameter names."""


def aliases(**own: list[str]) -> dict[str, list[str]]:
    """``DEFAULT_MODULE_PATTERNS`` and an arch's ``own``, as new lists."""
    return {name: list(patterns) for name, patterns in (DEFAULT_MODULE_PATTERNS | own).items()}


@dataclass(frozen=True)
class FreezeSpec:
    """One freeze directive.

    Attributes:
        module: an alias of ``module_patterns``, or a raw fnmatch pattern over full parameter names.
        frozen: False thaws what an earlier spec froze; of all specs that match a parameter the last one
            counts.
    """

    module: str
    frozen: bool = True

    def __post_init__(self) -> None:
        if not self.module:
            raise InputError("module = '': a freeze spec needs an alias or a pattern")


@dataclass(frozen=True)
class FreezeStage:
    """Freeze specs that are added to those before them.

    Attributes:
        start_step: the optimizer step from which on they apply.
        specs: come after ``freeze`` and after the specs of earlier entries.
    """

    start_step: int
    specs: tuple[FreezeSpec, ...]

    def __post_init__(self) -> None:
        at_least(self, 0, "start_step")
