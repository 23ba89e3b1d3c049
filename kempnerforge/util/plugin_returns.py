"""What a plugin's methods return, checked where it is returned: a ``None`` in a batch names no class.

A base class says it once, in ``__init_subclass__``::

    check_returns(cls, decay_start=instance(float | int, "a number"), pieces=_pieces)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from numbers import Integral
from types import UnionType
from typing import Any

from kempnerforge.util.errors import PluginError, cut, visible

Rule = Callable[..., str]
"""(what was returned, the object, the arguments of the call) -> what is wrong with it, as ``gives`` says it;
empty: nothing."""


def check_returns(cls: type, **rules: Rule) -> None:
    """Makes the methods and properties that ``cls`` itself defines raise ``PluginError`` when they return what
    a rule refuses. ``super()`` is not checked twice, and the classes of this package not at all: an error there
    is a defect, and nothing is slower.

    Args:
        rules: by the name of the method.
    """
    if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return
    for name, rule in rules.items():
        own, where = vars(cls).get(name), f"{cls.__name__}.{name}"
        if isinstance(own, property) and own.fget is not None:
            setattr(cls, name, property(_checked(where, own.fget, rule, called=False), own.fset, own.fdel))
        elif isinstance(own, classmethod):
            setattr(cls, name, classmethod(_checked(where, own.__func__, rule)))
        elif callable(own):
            setattr(cls, name, _checked(where, own, rule))


def _checked(where: str, method: Callable[..., Any], rule: Rule, called: bool = True) -> Callable[..., Any]:
    @wraps(method)
    def checked(*given: Any, **named: Any) -> Any:
        value = method(*given, **named)
        if wrong := rule(value, *given, **named):
            raise PluginError(f"{where}{f'({_listed(given[1:])})' if called else ''}: {wrong}")
        return value

    return checked


def _listed(arguments: tuple[Any, ...]) -> str:
    return ", ".join(repr(each) if isinstance(each, int | float | None) else "..." for each in arguments)


# ---- rules ---------------------------------------------------------------------------------------


def gives(value: Any, allowed: str, what: str = "") -> str:
    """The words for a ``value`` that is not allowed.

    Args:
        what: the part of the result that it is: "texts[0].answer".
    """
    kind = "" if value is None else f" ({type(value).__name__})"
    return f"gives {what and f'{what} = '}{visible(cut(' '.join(repr(value).split())))}{kind}; must be {allowed}"


def instance(kinds: type | UnionType | tuple[Any, ...], allowed: str) -> Rule:
    """The result is an instance of one of ``kinds``."""
    return lambda value, *_, **__: "" if isinstance(value, kinds) else gives(value, allowed)


def sequence_of(kinds: type | UnionType, allowed: str) -> Rule:
    """The result is a list or tuple of instances of ``kinds``."""

    def rule(value: Any, *_: Any, **__: Any) -> str:
        right = isinstance(value, list | tuple) and all(isinstance(each, kinds) for each in value)
        return "" if right else gives(value, allowed)

    return rule


def not_numbers(value: Any, *_: Any, what: str = "", **__: Any) -> str:
    """What is wrong with ``value`` as numbers by name, those that are recorded; they may be NaN."""
    if not isinstance(value, Mapping):
        return gives(value, "a mapping of names to numbers", what)
    wrong = next(((name, each) for name, each in value.items() if not (isinstance(name, str) and isinstance(each, float | int))), None)
    return "" if wrong is None else gives(wrong[1], "a number, int or float, by a name", f"{what}[{wrong[0]!r}]")


whole_number = instance(Integral, "a whole number")  # type: ignore[type-abstract]


def finite_number(value: Any, *_: Any, **__: Any) -> str:
    """The result is a finite number."""
    return "" if isinstance(value, float | int) and math.isfinite(value) else gives(value, "a finite number, int or float")
