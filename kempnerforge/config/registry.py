"""Names in a TOML file -> classes. Everything that a plugin may add is registered here.

There are two kinds of registry. A *config* registry maps the discriminator of a section (``[vlm].arch``,
``[optimizer].name``) to the dataclass of the section. A *builder* registry maps the same name to the class
that is built from it. They are apart because this layer imports no torch: a config can be read, checked and
printed without the model code. ``docs/extend/`` has examples.

Registering is a decorator; the bare form takes the name from the discriminator's default::

    @registry.register_vlm_config
    @dataclass
    class MyArchConfig(VLMConfig):
        arch: str = "my_arch"

    @registry.register_arch("my_arch")
    class MyArch(VLM): ...

An entry in this repository may be one file as well, such as ``kempnerforge/vlm/my_arch.py``: it is imported
when a config first names ``my_arch``. ``docs/architecture.md`` says where the config classes of built-in
entries are.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

from kempnerforge.util.errors import InputError


class Registry:
    """One kind of thing, by name.

    Args:
        kind: what an entry is, for messages ("vlm arch").
        key: the config key that selects an entry ("vlm.arch"), for messages and for the bare decorator.
        packages: where an entry that is not there yet may be found, in the module of its name.
        base: full name of the class that every entry is a subclass of. It is given by name, as config imports
            no torch.
    """

    def __init__(self, kind: str, key: str, *packages: str, base: str) -> None:
        self.kind, self.key, self.packages, self.base = kind, key, packages, base
        self._entries: dict[str, type] = {}

    def register(self, name: str | type) -> Any:
        """Decorator: ``@register("name")``, or bare ``@register``, which reads the name off the class.

        Raises:
            ValueError: the name is taken by another class, or the class is not one of this kind.
        """
        if isinstance(name, str):
            return lambda cls: self._add(name, cls)
        return self._add(getattr(name, self.key.split(".")[-1]), name)

    def _add(self, name: str, cls: type) -> type:
        known = self._entries.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"{self.kind} {name!r} is already registered by {_full_name(known)}")
        if self.base not in map(_full_name, cls.__mro__):
            raise InputError(f"{self.kind} {name!r}: the class {_full_name(cls)} must be a subclass of {self.base}")
        if lost := _lost_fields(cls):
            raise InputError(f"{self.kind} {name!r}: the class {_full_name(cls)} must be a @dataclass, or its key {lost[0]!r} is none")
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            raise InputError(f"{self.kind} {name!r}: the class {_full_name(cls)} must have the method {' and '.join(missing)}")
        self._entries[name] = cls
        return cls

    def forget(self, module: str) -> None:
        """Takes the classes of ``module`` out."""
        self._entries = {name: cls for name, cls in self._entries.items() if cls.__module__ != module}

    def get(self, name: str) -> type:
        """The class called ``name``.

        Raises:
            ValueError: there is none; the message lists what is there.
        """
        if name not in self:
            raise InputError(f"{self.key} = {name!r}: Unknown {self.key}; {self.known(name)}")
        return self._entries[name]

    def import_all(self) -> None:
        """Imports every module of the packages, so that all entries are there."""
        for package in self.packages:
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{module.name}")

    def names(self) -> list[str]:
        """All names, sorted."""
        self.import_all()
        return list(self)

    def known(self, near: str = "") -> str:
        """What is registered, for messages, with the name nearest to ``near``."""
        self.import_all()
        close = difflib.get_close_matches(str(near), self._entries, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"registered: {', '.join(sorted(self._entries)) or 'none'}{hint}"

    def name_of(self, cls: type) -> str | None:
        """The name that ``cls`` is registered under, or None."""
        return next((n for n, c in self._entries.items() if c is cls), None)

    def __contains__(self, name: object) -> bool:
        if name not in self._entries and isinstance(name, str) and name.isidentifier():
            for module in (f"{package}.{name}" for package in self.packages):
                if importlib.util.find_spec(module) is not None:
                    importlib.import_module(module)
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _lost_fields(cls: type) -> list[str]:
    """Fields that ``cls`` adds to those of a dataclass without being one itself."""
    if not is_dataclass(cls) or "__dataclass_fields__" in vars(cls):
        return []
    return [name for name, wanted in vars(cls).get("__annotations__", {}).items() if "ClassVar" not in str(wanted)]


_SOURCES = ("kempnerforge.data.sources", "kempnerforge.data.collections")

vlm_configs = Registry("vlm arch", "vlm.arch", "kempnerforge.vlm", base="kempnerforge.config.vlm.VLMConfig")
vision_configs = Registry(
    "vision encoder", "vision_encoder.type", "kempnerforge.model", base="kempnerforge.config.vision.VisionEncoderConfig"
)
adapter_configs = Registry("adapter", "adapter.type", "kempnerforge.model", base="kempnerforge.config.adapter.AdapterConfig")
data_configs = Registry("data source", "data.source", *_SOURCES, base="kempnerforge.config.data.DataConfig")

optimizer_configs = Registry("optimizer", "optimizer.name", base="kempnerforge.config.optimizer.OptimizerConfig")

archs = Registry("vlm arch", "vlm.arch", "kempnerforge.vlm", base="kempnerforge.vlm.base.VLM")
vision_encoders = Registry("vision encoder", "vision_encoder.type", "kempnerforge.model", base="kempnerforge.model.vision.VisionEncoder")
adapters = Registry("adapter", "adapter.type", "kempnerforge.model", base="kempnerforge.model.adapters.Adapter")
sources = Registry("data source", "data.source", *_SOURCES, base="kempnerforge.data.source.Source")
optimizers = Registry(
    "optimizer", "optimizer.name", "kempnerforge.training.optimizers", base="kempnerforge.training.optimizers.rule.UpdateRule"
)

templates = Registry("template", "data.template", "kempnerforge.data.text", base="kempnerforge.data.text.template.Template")
tasks = Registry("task", "eval.tasks", "kempnerforge.eval.tasks", base="kempnerforge.eval.task.Task")

schedules = Registry("schedule", "scheduler.name", "kempnerforge.training.schedules", base="kempnerforge.config.schedule.SchedulerConfig")
"""Both at once: a schedule is a config that computes."""

tracker_configs = Registry(
    "tracker", "metrics.trackers.type", "kempnerforge.training.trackers", base="kempnerforge.config.training.TrackerConfig"
)
trackers = Registry(
    "tracker", "metrics.trackers.type", "kempnerforge.training.trackers", base="kempnerforge.training.trackers.tracker.Tracker"
)
hook_configs = Registry("hook", "hooks.type", "kempnerforge.training.hooks", base="kempnerforge.config.training.HookConfig")
hooks = Registry("hook", "hooks.type", "kempnerforge.training.hooks", base="kempnerforge.training.trainer.Hook")

ALL = tuple(each for each in list(globals().values()) if isinstance(each, Registry))


def forget(module: str) -> None:
    """Takes out of all registries what the module of that name has registered."""
    for each in ALL:
        each.forget(module)


Decorator = Callable[[str | type], Any]
register_vlm_config: Decorator = vlm_configs.register
register_vision_config: Decorator = vision_configs.register
register_adapter_config: Decorator = adapter_configs.register
register_data_config: Decorator = data_configs.register
register_optimizer_config: Decorator = optimizer_configs.register
register_arch: Decorator = archs.register
register_vision_encoder: Decorator = vision_encoders.register
register_adapter: Decorator = adapters.register
register_source: Decorator = sources.register
register_optimizer: Decorator = optimizers.register
register_template: Decorator = templates.register
register_task: Decorator = tasks.register
register_schedule: Decorator = schedules.register
register_tracker_config: Decorator = tracker_configs.register
register_tracker: Decorator = trackers.register
register_hook_config: Decorator = hook_configs.register
register_hook: Decorator = hooks.register


def list_vlm_configs() -> list[str]:
    """The names that ``VLMConfig.for_arch`` takes, sorted."""
    return vlm_configs.names()


registry = sys.modules[__name__]
"""This module, for ``from kempnerforge.config.registry import registry``."""
