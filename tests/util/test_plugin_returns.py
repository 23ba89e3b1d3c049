from __future__ import annotations

import pickle

import pytest

from kempnerforge.util.errors import InputError, PluginError
from kempnerforge.util.plugin_returns import check_returns, finite_number, gives, instance, not_numbers, sequence_of, whole_number


class Base:
    def __init_subclass__(cls) -> None:
        check_returns(
            cls, size=whole_number, name=instance(str, "a string"), parts=sequence_of(str, "a list of strings"), none=whole_number
        )

    def size(self, scale: int = 1) -> int:
        return "not looked at"  # type: ignore[return-value]


class Right(Base):
    def size(self, scale: int = 1) -> int:
        """How large."""
        return 2 * scale

    @property
    def name(self) -> str:
        return "a"

    @classmethod
    def parts(cls) -> list[str]:
        return ["a"]


class Wrong(Right):
    def size(self, scale: int = 1) -> int:
        return super().size() / scale  # type: ignore[return-value]

    @property
    def name(self) -> str:
        return 3  # type: ignore[return-value]

    @classmethod
    def parts(cls) -> list[str]:
        return ["a", None]  # type: ignore[list-item]


def test_what_is_right_comes_back() -> None:
    assert (Right().size(), Right().size(scale=3), Right().name, Right.parts()) == (2, 6, "a", ["a"])
    assert Right.size.__doc__ == "How large." and Base().size() == "not looked at"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Wrong().size(4), "Wrong.size(4): gives 0.5 (float); must be a whole number"),
        (lambda: Wrong().size(scale=4), "Wrong.size(): gives 0.5 (float); must be a whole number"),
        (lambda: Wrong().name, "Wrong.name: gives 3 (int); must be a string"),
        (lambda: Wrong.parts(), "Wrong.parts(): gives ['a', None] (list); must be a list of strings"),
    ],
)
def test_the_class_that_defines_a_method_is_named(call: object, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value) == message and not isinstance(caught.value, InputError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == message, "it goes to other processes"


def test_a_subclass_is_named_only_for_its_own_methods() -> None:
    class Below(Wrong): ...

    with pytest.raises(PluginError, match=r"^Wrong\.name"):
        _ = Below().name


def test_classes_of_this_package_are_left_as_they_are() -> None:
    body = {"__module__": "kempnerforge.data.source", "size": lambda self: None}
    assert type("BuiltIn", (Base,), body)().size() is None
    with pytest.raises(PluginError):
        type("Plugin", (Base,), body | {"__module__": "kempnerforge_plugin_1"})().size()


def test_numbers() -> None:
    assert not any(map(finite_number, (1, 0.5, True))) and all(map(finite_number, (None, "1", float("nan"), float("inf"), 1j)))
    assert not not_numbers({"a": float("nan"), "b": 1}) and not_numbers({"a": "1"}) == gives(
        "1", "a number, int or float, by a name", "['a']"
    )
    assert not_numbers({1: 1.0}) and not_numbers([1.0])


def test_a_long_value_is_cut_and_steers_no_terminal() -> None:
    assert gives("\x1b[31m" + "x" * 500, "short").isprintable() and len(gives("x" * 500, "short")) < 120
