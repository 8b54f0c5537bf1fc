"""Problems of a recipe in plain words: one line each, with the key and the fix."""

from __future__ import annotations

import difflib
import typing

from pydantic import BaseModel, ValidationError

from dsmim.recipe.aliases import alias, shown_number
from dsmim.recipe.schema import Recipe
from dsmim.recipe.section import Duration


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
        return f"{key}: unknown key{_meant(str(item['loc'][-1]), item['input'], section, model)}"
    if item["type"] in ("model_type", "model_attributes_type"):
        kind = item.get("ctx", {}).get("class_name")
        length = next((one for one in (Duration, *Duration.__subclasses__()) if one.__name__ == kind), None)
        if length is not None:
            return _without_unit(key, item["input"], list(length.model_fields))
        return _not_a_section(key, item["input"], model)
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
    if f"{key}.{message.partition(':')[0].partition('.')[0]}" in keys_of(Recipe):  # a section's message about its key
        return f"{key}.{message}{shown}"
    return f"{key}: {message[0].lower() + message[1:]}{shown}"


def _meant(word: str, given: object, section: type[BaseModel] | None, model: type[BaseModel]) -> str:
    """Return the end of a message about an unknown key: in a recipe its name there, if other programs call it so or if
    it is in another section; else the most similar key of its section, or all of them."""
    fields = section.model_fields if section else {}
    lengths = [
        name for name, field in fields.items() if any(issubclass(o, Duration) for o in sections_of(field.annotation))
    ]
    if lengths and word in Duration.model_fields:
        return f"; did you mean {lengths[0]}={{{word}: {shown_number(given)}}}?"
    if model is not Recipe:
        return nearest(word, list(fields))
    if name := alias(word, given):
        return f"; did you mean {name}?"
    others = [key for key in keys_of(Recipe) if key.rsplit(".", 1)[-1] == word]
    tasks = [_tag(one) for one in sections_of(Recipe.model_fields["task"].annotation) if word in one.model_fields]
    if others == [f"task.{word}"] and section is not None and _tag(section) is not None:
        return f"; it is a key of task.name={tasks[0]}"
    if len(others) == 1:
        return f"; did you mean {others[0]}?"
    return nearest(word, list(fields))


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted keys of all values below a section, each once."""
    found = {}
    for name, field in section.model_fields.items():
        inner = sections_of(field.annotation)
        keys = [key for one in inner for key in keys_of(one, f"{prefix}{name}.")] or [f"{prefix}{name}"]
        found |= dict.fromkeys(keys)
    return list(found)


def _without_unit(key: str, given: object, units: list[str]) -> str:
    choices = " or ".join(f"{{{unit}: {shown_number(given)}}}" for unit in units)
    return f"{key}: give a length with its unit: {choices} (given: {given!r})"


def _not_a_section(key: str, given: object, model: type[BaseModel]) -> str:
    """Return the message about a value where keys are expected."""
    inner = [name.removeprefix(f"{key}.").split(".")[0] for name in keys_of(model) if name.startswith(f"{key}.")]
    meant = f"did you mean {key}.name={given}?" if "name" in inner and isinstance(given, str) else ""
    known = ", ".join(dict.fromkeys(inner))
    return f"{key}: is a section, not a value (given: {given!r}); {meant or f'its keys: {known}'}"


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
            candidates = sections_of(fields[part].annotation)
            if index < len(loc) - 1:
                section = candidates[0] if len(candidates) == 1 else None
        elif section is None:  # the tag of a union selects the section
            section = next((c for c in candidates if _tag(c) == part), None)
        elif index == len(loc) - 1:
            parts.append(str(part))
    return ".".join(parts) or "recipe", section


def sections_of(annotation: object) -> list[type[BaseModel]]:
    """Return the sections, durations among them, that a key of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for arg in typing.get_args(annotation) for section in sections_of(arg)]


def _tag(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("name")
    choices = typing.get_args(field.annotation) if field else ()
    return choices[0] if choices else None
