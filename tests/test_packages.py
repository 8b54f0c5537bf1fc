"""The packages, their order, and what is imported from them."""

import ast
import importlib
import re
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import dsmim as package
from tests.conftest import ROOT

HOME = Path(package.__file__).parent
FILES = [file for file in sorted(HOME.rglob("*.py")) if file.relative_to(HOME).parts[0] not in ("slurm", "ds_configs")]


def layers() -> list[str]:
    """docs/architecture.md's packages and root modules, from top to bottom. That page alone states them."""
    text = (ROOT / "docs/architecture.md").read_text()
    block = re.search(r"<!-- layers -->\n```\n(.*?)```", text, re.DOTALL)[1]
    return [line.split()[0].removesuffix("/").removesuffix(".py") for line in block.splitlines() if line[:1].strip()]


def module_name(file: Path) -> str:
    return ".".join(("dsmim", *file.relative_to(HOME).with_suffix("").parts)).removesuffix(".__init__")


def imports(tree: ast.AST) -> list[str]:
    """Modules of dsmim that the code imports, `from dsmim.a import b` as dsmim.a.b where b is a module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dsmim":
            found += [f"{node.module}.{name.name}" if is_module(f"{node.module}.{name.name}") else node.module
                      for name in node.names]  # fmt: skip
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "dsmim"]
    return found


def is_module(name: str) -> bool:
    path = HOME.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_every_package_has_its_layer():
    there = {file.relative_to(HOME).with_suffix("").parts[0] for file in FILES} - {"__init__"}
    assert sorted(layers()) == sorted(there)


def test_no_package_imports_from_a_layer_above_its_own():
    level = {name: number for number, name in enumerate(reversed(layers()))}
    for file in FILES:
        own = file.relative_to(HOME).with_suffix("").parts[0]
        for module in imports(ast.parse(file.read_text())):
            other = [*module.split("."), ""][1]
            if own == "__init__" or other in ("", "__version__"):  # dsmim itself exports from all layers
                continue
            assert other == own or level[other] < level[own], f"{file} imports {module}"


def test_no_two_modules_import_each_other():
    graph = {module_name(file): set(imports(ast.parse(file.read_text()))) - {module_name(file)} for file in FILES
             if file != HOME / "__init__.py"}  # fmt: skip
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_what_examples_and_benchmarks_import_is_there(folder):
    """`make demo` takes minutes to come to some of them."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsmim"):
                there = dir(importlib.import_module(node.module))
                wanted = {alias.name for alias in node.names} - set(there)
                assert all(find_spec(f"{node.module}.{name}") for name in wanted), (file, wanted)
