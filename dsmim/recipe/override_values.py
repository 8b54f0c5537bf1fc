"""What the text of an override `key=value` means: YAML, or for paths and patterns mostly the text itself."""

from __future__ import annotations

import re
from typing import Any

import yaml

# Keys that name files. YAML would read their braces as a mapping, what follows ' #' as a comment, and 2024 as a number.
_PATHS = ("data.train", "data.val", "data.index_dir", "data.subset", "data.cache_dir")


def read_value(key: str, text: str) -> Any:
    """Return the value of an override. Raises yaml.YAMLError.

    For paths, only null, a text in quotes and a list [a, b] have a meaning of their own.
    """
    if key not in _PATHS:
        return text if text.startswith("*") else yaml.safe_load(text)  # YAML would read a glob as an alias
    if text in ("", "~", "null") or text[:1] in ("'", '"'):
        return yaml.safe_load(text)
    return _items(text) if text.startswith("[") and text.endswith("]") else text


def _items(text: str) -> list[str]:
    """Return the items of a list of paths, in which commas in braces are a part of a pattern."""
    try:
        items = yaml.safe_load(text)
    except yaml.YAMLError:
        items = [None]
    if all(isinstance(item, (str, int)) for item in items):
        return [str(item) for item in items]
    return [item.strip() for item in re.findall(r"(?:\{[^{}]*\}|[^,{}])+", text[1:-1]) if item.strip()]
