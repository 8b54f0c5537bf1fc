"""What the keys of a recipe mean, for people: type, default and the text below each field of the sections."""

from __future__ import annotations

import json
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dsmim.recipe.errors import nearest, sections_of
from dsmim.recipe.schema import Recipe
from dsmim.recipe.section import Duration

_PLAIN = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "any value",
}
_LIMITS = {Ge: ("ge", "≥ {}"), Gt: ("gt", "> {}"), Le: ("le", "≤ {}"), Lt: ("lt", "< {}"),
           MultipleOf: ("multiple_of", "a multiple of {}")}  # fmt: skip


def explained(wanted: str = "", width: int = 120) -> str:
    """Return the explanation of a key or a section (dotted), or of all keys.

    Raises ValueError for a key that recipes do not have, with the nearest ones.
    """
    lines = list(_lines(Recipe, "", width))
    chosen = [line for key, line in lines if not wanted or key == wanted or key.startswith(f"{wanted}.")]
    if not chosen:
        keys = list(dict.fromkeys(part for key, _ in lines for part in (key, key.rpartition(".")[0]) if part))
        raise ValueError(f"--explain {wanted}: no such key{nearest(wanted, keys)}")
    return "\n".join(chosen)


def _lines(section: type[BaseModel], prefix: str, width: int) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, its explanation) of a section: first the section itself, then its keys."""
    fields = [(f"{prefix}{name}", field, _sections(field)) for name, field in section.model_fields.items()]
    for key, field, inner in sorted(fields, key=lambda one: bool(one[2])):  # values before sections
        if not inner:
            yield key, _entry(key, f"{type_words(field.annotation, field)}{_default(field)}", field.description, width)
        elif type(None) in typing.get_args(field.annotation):  # it may be left out, such as checkpoint.keep_best
            yield key, _entry(key, f"section or null{_default(field)}", field.description, width)
        for one in inner:
            yield key, _heading(key, one, width)
            yield from _lines(one, f"{key}.", width)


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    return [one for one in sections_of(field.annotation) if not issubclass(one, Duration)]


def _heading(key: str, section: type[BaseModel], width: int) -> str:
    tag = section.model_fields.get("name")
    named = f" (name: {type_words(tag.annotation)})" if tag and typing.get_origin(tag.annotation) is Literal else ""
    title = f"{key}{named if key == 'task' else ''}: {' '.join((section.__doc__ or '').split())}"
    return "\n" + textwrap.fill(title, width)


def _entry(key: str, kind: str, text: str | None, width: int) -> str:
    about = textwrap.fill(" ".join((text or "").split()), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {key}: {kind}" + (f"\n{about}" if text else "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    return f", default {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(one) for one in value) + "]"
    if isinstance(value, float):
        return f"{value:.15g}"
    return str(value) if not (value is None or isinstance(value, bool)) else json.dumps(value)  # null, true, false


def type_words(annotation: Any, field: FieldInfo | None = None) -> str:
    """Return what a value of this type may be, in words: `whole number ≥ 1 or null`."""
    limits = list(field.metadata) if field is not None else []
    while typing.get_origin(annotation) is typing.Annotated:
        annotation, *more = typing.get_args(annotation)
        limits += [limit for one in more for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
    found = [words.format(f"{getattr(one, name):g}") for one in limits for kind, (name, words) in _LIMITS.items()
             if isinstance(one, kind)]  # fmt: skip
    words = _words(annotation)
    return f"{words} {' and '.join(found)}" if found else words


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(one) for one in arguments)
    if origin is list:
        return f"list of {type_words(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(type_words(one) for one in arguments)}]"
    if origin is dict or annotation is dict:
        return "{key: value, …}"
    if isinstance(annotation, type) and issubclass(annotation, Duration):
        return " or ".join(f"{{{unit}: N}}" for unit in annotation.model_fields)
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))
