"""What `import dsmim` gives, and what it costs."""

import ast
import sys
from pathlib import Path

import pytest

import dsmim
from tests.conftest import run

HEAVY = ("torch", "torchvision", "timm", "pydantic", "deepspeed", "numpy", "yaml", "PIL")


def test_importing_dsmim_is_light():
    code = f"import sys; import dsmim; print(dir(dsmim)); print([name for name in {HEAVY} if name in sys.modules])"
    names, heavy = run(sys.executable, "-W", "error", "-c", code).stdout.splitlines()
    assert heavy == "[]" and all(repr(name) in names for name in dsmim.__all__)
    assert {name for name in ast.literal_eval(names) if not name.startswith("_")} == {*dsmim.__all__} - {"__version__"}


def test_the_names_of_dsmim():
    import dsmim.models
    import dsmim.recipe.reading
    import dsmim.train

    assert set(dsmim.__all__) <= set(dir(dsmim)) and "train" in dir(dsmim)
    assert dsmim.create_model is dsmim.models.create_model and dsmim.SimMIM is dsmim.models.SimMIM
    assert dsmim.Recipe is dsmim.recipe.Recipe and dsmim.fit is dsmim.train.fit and callable(dsmim.load)
    assert dsmim.load_recipe is dsmim.recipe.reading.load_recipe and dsmim.__version__
    with pytest.raises(AttributeError, match="module 'dsmim' has no attribute 'laod'"):
        _ = dsmim.laod
    star: dict = {}
    exec("from dsmim import *", star)
    assert star["load"] is dsmim.load


def test_type_checkers_see_every_name():
    text = Path(dsmim.__file__).read_text()
    block = text.split("if TYPE_CHECKING:")[1].split("\n\n")[0]
    imported: dict = {}
    exec("\n".join(line.strip() for line in block.splitlines()), imported)
    assert imported.keys() - {"__builtins__"} == set(dsmim.__all__) - {"__version__"}
    assert all(imported[name] is getattr(dsmim, name) for name in imported if name != "__builtins__")
