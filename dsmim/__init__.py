"""dsmim: billion-parameter vision models on DeepSpeed, from WebDataset tars.

The names below are imported when they are first used: `import dsmim` itself loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmim.library import load
    from dsmim.models import SimMIM, create_model
    from dsmim.recipe import Recipe
    from dsmim.recipe.reading import load_recipe
    from dsmim.train import fit

__version__ = "0.1.0"
__all__ = ["Recipe", "SimMIM", "__version__", "create_model", "fit", "load", "load_recipe"]

_MODULES = {
    "Recipe": "dsmim.recipe",
    "SimMIM": "dsmim.models",
    "create_model": "dsmim.models",
    "fit": "dsmim.train",
    "load": "dsmim.library",
    "load_recipe": "dsmim.recipe.reading",
}
_HIDDEN = {"Any", "TYPE_CHECKING", "annotations", "import_module"}
"""What this file itself uses; not names of dsmim."""


def __getattr__(name: str) -> Any:
    """Import a name of __all__ on its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - _HIDDEN)
