"""From a nested mapping to typed dataclasses, with all complaints gathered instead of the first one raised.

This file knows no component: every component owns a dataclass and checks it; `config.py` sums them.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Union

COMPONENT = "component"
"""Metadata key of a field whose dataclass is chosen by the `name` in its own mapping."""


class Complaint(NamedTuple):
    """One thing wrong with a setting: its key, relative to who complains, and what is wrong and how to mend it."""

    key: str
    text: str

    def under(self, prefix: str) -> Complaint:
        """The same complaint seen from one level further out."""
        return Complaint(".".join(part for part in (prefix, self.key) if part), self.text)


def complain(problems: Mapping[str, str | None]) -> Iterator[Complaint]:
    """A complaint for every key that has a problem."""
    return (Complaint(key, text) for key, text in problems.items() if text is not None)


class ConfigError(ValueError):
    """Every complaint about a config, in one message."""

    def __init__(self, complaints: Iterable[Complaint]) -> None:
        self.complaints = list(complaints)
        lines = [f"  {c.key}: {c.text}" for c in self.complaints]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        super().__init__("\n".join([f"the config has {count}:", *lines]))


class Choice(NamedTuple):
    """How the dataclass of a component field is found."""

    names: Callable[[], list[str]]
    load: Callable[[str], type]


_INVALID = object()


def parse(cls: type, value: Mapping[str, Any], complaints: list[Complaint]) -> Any:
    """`cls` built from `value`, with everything wrong appended to `complaints`.

    A field of `cls` in which something was wrong is None, so that the others can still be checked: users see the
    complaints of all sections at once.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kwargs = _fields(cls, value, "", complaints)
    kwargs = {name: None if v is _INVALID else v for name, v in kwargs.items()}
    required = {n: None for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    return cls(**{**required, **kwargs})


def _dataclass(cls: type, value: Any, key: str, complaints: list[Complaint]) -> Any:
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        complaints.append(Complaint(key, f"is {value!r}; expected a mapping with the keys {_names(cls)}"))
        return _INVALID
    before = len(complaints)
    kwargs = _fields(cls, value, key, complaints)
    return cls(**kwargs) if len(complaints) == before else _INVALID


def _fields(cls: type, value: Mapping[str, Any], key: str, complaints: list[Complaint]) -> dict[str, Any]:
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for name in value:
        if name not in fields:
            complaints.append(Complaint(_join(key, name), f"is not a known key{_suggest(str(name), fields)}"))
    kwargs = {}
    for name, field in fields.items():
        if name in value:
            kwargs[name] = _field(field, hints[name], value[name], _join(key, name), complaints)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            complaints.append(Complaint(_join(key, name), f"is missing; expected {describe(hints[name])}"))
    return kwargs


def _field(field: dataclasses.Field, hint: Any, value: Any, key: str, complaints: list[Complaint]) -> Any:
    choice = field.metadata.get(COMPONENT)
    if choice is None:
        return _convert(hint, value, key, complaints)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            complaints.append(Complaint(key, f"is {value!r}; expected a mapping from component name to its settings"))
            return _INVALID
        before = len(complaints)
        parts = {n: _component(choice, n, v or {}, _join(key, n), complaints) for n, v in value.items()}
        return parts if len(complaints) == before else _INVALID
    if not isinstance(value, Mapping) or "name" not in value:
        complaints.append(Complaint(f"{key}.name", f"is missing; choose one of {', '.join(choice.names())}"))
        return _INVALID
    rest = {n: v for n, v in value.items() if n != "name"}
    return _component(choice, value["name"], rest, key, complaints, key_of_name=f"{key}.name")


def _component(
    choice: Choice, name: Any, value: Any, key: str, complaints: list[Complaint], key_of_name: str = ""
) -> Any:
    if name not in choice.names():
        text = f"is {name!r}{_suggest(str(name), choice.names())}"
        complaints.append(Complaint(key_of_name or key, text))
        return _INVALID
    return _dataclass(choice.load(name), value, key, complaints)


def _convert(hint: Any, value: Any, key: str, complaints: list[Complaint]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), value, key, complaints)
    if origin is dict and isinstance(value, Mapping):
        for name in (n for n in value if not isinstance(n, str)):
            text = f"is the {type(name).__name__} {name!r} and not text; write it in quotes: '{name}'"
            complaints.append(Complaint(_join(key, name), text))
        if not all(isinstance(n, str) for n in value):
            return _INVALID
        return {n: _convert(args[1], v, _join(key, n), complaints) for n, v in value.items()}
    if origin is list and isinstance(value, list):
        return [_convert(args[0], v, f"{key}[{i}]", complaints) for i, v in enumerate(value)]
    if origin in (Union, types.UnionType):
        return _union(args, hint, value, key, complaints)
    if origin is Literal and any(value == a and type(value) is type(a) for a in args):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e3, which YAML reads as a float
        return int(value)
    complaints.append(Complaint(key, f"is {value!r}; expected {describe(hint)}{_hint_for(hint, value)}"))
    return _INVALID


def _union(args: tuple, hint: Any, value: Any, key: str, complaints: list[Complaint]) -> Any:
    if value is None and type(None) in args:
        return None
    options = [a for a in args if a is not type(None)]
    if len(options) == 1:
        return _convert(options[0], value, key, complaints)
    for option in options:
        attempt: list[Complaint] = []
        result = _convert(option, value, key, attempt)
        if not attempt:
            return result
    complaints.append(Complaint(key, f"is {value!r}; expected {describe(hint)}"))
    return _INVALID


def _hint_for(hint: Any, value: Any) -> str:
    if hint is float and isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return ""
        return f" (YAML reads {value} as text; write {number!r})"
    if typing.get_origin(hint) is Literal and isinstance(value, str):
        return _suggest(value, [str(a) for a in typing.get_args(hint)], known="")
    if hint is str and value is not None:
        return f" (put it in quotes: '{value}')"
    return ""


def describe(hint: Any) -> str:
    """A type hint in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join("nothing" if a is type(None) else describe(a) for a in args)
    if origin is list:
        return f"a list ({describe(args[0])} each)"
    if origin is dict:
        return f"a mapping to {describe(args[1])}"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with the keys {_names(typing.cast(type, hint))}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", Any: "a mapping with a name"}
    return words.get(hint, str(hint))


def _suggest(name: str, names: Iterable[str], known: str = "; known: ") -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"{known}{', '.join(names)}" if known else ""


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def gather(prefix: str, complaints: Iterable[Complaint]) -> Iterator[Complaint]:
    """`complaints` seen from outside: each key under `prefix`."""
    return (c.under(prefix) for c in complaints)
