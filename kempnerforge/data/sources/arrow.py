"""What the types of Arrow tables say: which keys rows have, which labels have names, whether shards go
together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kempnerforge.util.errors import InputError, cut, show


def example(schema: Any, where: str) -> dict[str, Any]:
    """A row with all keys that rows of ``schema`` may have, on every level. Raises InputError: a column is
    there twice.
    """
    return _table([(field.name, field.type) for field in schema], where)


def _table(fields: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in fields).items():
        if count > 1:
            raise InputError(f"{where}: the column {show(name)} is there twice; rename one of them")
    return {name: _example(kind, where) for name, kind in fields}


def _example(kind: Any, where: str) -> Any:
    import pyarrow.types as is_

    if is_.is_struct(kind):
        return _table([(field.name, field.type) for field in (kind.field(k) for k in range(kind.num_fields))], where)
    if _is_list(kind):
        return [_example(kind.value_type, where)]
    return None if is_.is_null(kind) else ""


def _is_list(kind: Any) -> bool:
    import pyarrow.types as is_

    return any(check(kind) for check in (is_.is_list, is_.is_large_list, is_.is_fixed_size_list, is_.is_list_view, is_.is_large_list_view))


def same_columns(schemas: Sequence[tuple[str, Any]], columns: Sequence[str]) -> None:
    """Whether the shards (name, schema) go together: each of ``columns`` is in all of them or in none, and
    holds the same kind of values.

    Widths, 32- and 64-bit offsets, dictionaries and the order of a struct's fields are ways to store the same
    values.

    Raises:
        InputError: two shards do not, by name, with the types.
    """
    for column in columns:
        typed = [(name, schema.field(column).type) for name, schema in schemas if column in schema.names]
        if typed and len(typed) < len(schemas):
            lacking = next(name for name, schema in schemas if column not in schema.names)
            raise InputError(f"{lacking} has no column {show(column)}, which {typed[0][0]} has")
        (first, kind), *others = typed or [("", None)]
        for name, other in others:
            if not _alike(kind, other):
                raise InputError(f"column {show(column)} is {cut(str(kind))} in {first} and {cut(str(other))} in {name}")
            kind = other if str(kind) == "null" else kind


def _alike(one: Any, other: Any) -> bool:
    """Whether values of both types are of one kind; what is null everywhere goes with all."""
    import pyarrow.types as is_

    one, other = (kind.value_type if is_.is_dictionary(kind) else kind for kind in (one, other))
    if is_.is_null(one) or is_.is_null(other):
        return True
    if _is_list(one) and _is_list(other):
        return _alike(one.value_type, other.value_type)
    if is_.is_struct(one) and is_.is_struct(other):
        fields = [{kind.field(k).name: kind.field(k).type for k in range(kind.num_fields)} for kind in (one, other)]
        return all(_alike(kind, fields[1][name]) for name, kind in fields[0].items() if name in fields[1])
    return one == other or any(check(one) and check(other) for check in _kinds())


def _kinds() -> list[Any]:
    import pyarrow.types as is_

    texts = lambda kind: is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind)
    data = lambda kind: is_.is_binary(kind) or is_.is_large_binary(kind) or is_.is_binary_view(kind) or is_.is_fixed_size_binary(kind)
    return [texts, data, is_.is_integer, is_.is_floating]


class Labels:
    """The names of class labels in columns, as ``datasets`` keeps them.

    Args:
        features: of the table, by column.
    """

    def __init__(self, features: Mapping[str, Any]) -> None:
        self._features = {column: feature for column, feature in features.items() if _has_labels(feature)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self._features == other._features

    def __call__(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """``row`` with names in place of numbers."""
        if not self._features:
            return row
        return {column: _named(value, self._features.get(column)) for column, value in row.items()}


def labels_of(schema: Any) -> Labels:
    """Those that an Arrow ``schema`` says there are."""
    if b"huggingface" not in (schema.metadata or {}):
        return Labels({})
    import datasets

    return Labels(datasets.Features.from_arrow_schema(schema))


def _inner(feature: Any) -> Any:
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _has_labels(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_has_labels, feature.values()))
    inner = _inner(feature)
    return _has_labels(inner) if inner is not None else hasattr(feature, "int2str")


def _named(value: Any, feature: Any) -> Any:
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _named(entry, feature.get(key)) for key, entry in value.items()}
    if isinstance(value, list):
        inner = _inner(feature)
        return [_named(entry, feature if inner is None else inner) for entry in value]
    names = getattr(feature, "names", None) if hasattr(feature, "int2str") else None
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value
