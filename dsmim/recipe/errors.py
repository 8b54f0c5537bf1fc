"""Problems of a recipe in plain words: one line each, with the key and the fix."""

from __future__ import annotations

import difflib
import typing

from pydantic import BaseModel, ValidationError


class RecipeError(ValueError):
    """All problems of a recipe, one line each."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"recipe {source}: {len(problems)} problem{'s' * (len(problems) > 1)}:{lines}")


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one line per pydantic error, with the key as in an override: optim.lr."""
    return [_line(item, model) for item in error.errors()]


def nearest(word: str, known: list[str]) -> str:
    """Return the end of a message about an unknown word: the most similar known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if known else ""


def _line(item: dict, model: type[BaseModel]) -> str:
    key, section = _walk(item["loc"], model)
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(str(item['loc'][-1]), list(section.model_fields) if section else [])}"
    if item["type"] == "missing":
        return f"{key}: missing; give it a value"
    if item["type"] == "union_tag_not_found":
        return f"{key}.name: missing; give it a value"
    if item["type"] == "union_tag_invalid":
        known = [tag.strip("'") for tag in item["ctx"]["expected_tags"].split(", ")]
        return f"{key}.name: {item['ctx']['tag']!r} is unknown{nearest(item['ctx']['tag'], known)}"
    message = item["msg"].removeprefix("Value error, ")
    given = item["input"]
    shown = "" if isinstance(given, (dict, list, BaseModel)) else f" (given: {given!r})"
    return f"{key}: {message[0].lower() + message[1:]}{shown}"


def _walk(loc: tuple, model: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """Return the dotted key, and the section that its last part, a field or an unknown key, belongs to.

    pydantic puts the tag of a union, or the type that it tried, into the location; they are not keys and are left out.
    """
    parts, section, candidates = [], model, [model]
    for index, part in enumerate(loc):
        fields = {} if section is None else section.model_fields
        if isinstance(part, int):
            parts[-1] += f"[{part}]"
        elif part in fields:
            parts.append(part)
            candidates = _sections(fields[part].annotation)
            if index < len(loc) - 1:
                section = candidates[0] if len(candidates) == 1 else None
        elif section is None:  # the tag of a union selects the section
            section = next((c for c in candidates if _tag(c) == part), None)
        elif index == len(loc) - 1:
            parts.append(str(part))
    return ".".join(parts) or "recipe", section


def _sections(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for arg in typing.get_args(annotation) for section in _sections(arg)]


def _tag(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("name")
    choices = typing.get_args(field.annotation) if field else ()
    return choices[0] if choices else None
