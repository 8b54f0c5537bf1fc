"""optim.name and the arguments of optimizers; the table of what was measured, in the code and in docs/optimizers.md."""

import pytest
from timm.optim import get_optimizer_info, list_optimizers

from benchmarks.optimizers import own_arguments
from dsmim.recipe.optimizers import BEGIN, END, TIMM, markdown
from dsmim.recipe.reading import load_recipe, parse_recipe, stored_recipe
from tests.conftest import ROOT, tiny_recipe


def read(**optim):
    return parse_recipe(tiny_recipe("s", optim={"lr": 1e-3} | optim), "t").optim


def test_the_docs_show_the_table():
    text = (ROOT / "docs/optimizers.md").read_text()
    assert text.split(BEGIN)[1].split(END)[0] == f"\n{markdown()}", "run python benchmarks/optimizers.py --docs"


def test_the_table_has_timm_s_optimizers_and_their_own_arguments():
    built = [name for name in list_optimizers() if not isinstance(get_optimizer_info(name).opt_class, str)]
    assert set(built) <= TIMM.keys()
    for name in built:
        assert (TIMM[name].betas, TIMM[name].eps) == own_arguments(name), name
    for name, known in TIMM.items():
        assert len(known.errors) == 4 and bool(known.failure) == (None in known.errors[1:]), name


def test_arguments_that_are_left_out_are_the_optimizer_s_own():
    assert (read().betas, read().eps) == ((0.9, 0.999), 1e-8)
    assert (read(name="lamb").betas, read(name="lamb").eps) == ((0.9, 0.999), 1e-8)
    assert (read(name="timm:lion").betas, read(name="timm:lion").eps) == ((0.9, 0.99), None)
    assert read(name="timm:lion", betas=[0.8, 0.9], options={"foreach": False}).betas == (0.8, 0.9)
    # Written out and read again it is the same recipe.
    recipe = load_recipe("demo_pretrain", ["optim.name=timm:sgd", "optim.options={momentum: 0.8}"])
    assert recipe.optim.options == {"momentum": 0.8} and recipe.optim.eps is None
    assert stored_recipe(recipe.model_dump(mode="json"), "checkpoint") == recipe


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"name": "timm:lio"}, r"optim\.name: is unknown; did you mean timm:lion\? \(given: 'timm:lio'\)"),
        ({"name": "lamp"}, r"did you mean lamb\?"),
        ({"name": "lion"}, r"write timm:lion"),
        ({"name": "zzz"}, r"docs/optimizers\.md"),
        ({"name": "timm:fusedlamb"}, "apex and a GPU"),
        ({"name": "timm:lookahead_lion"}, "take timm:lion"),
        ({"name": "timm:sgd", "betas": [0.9, 0.999]}, r"betas: timm:sgd has no such argument; .* optim\.betas=null"),
        ({"name": "timm:lion", "eps": 1e-8}, r"eps: timm:lion has no such argument"),
        ({"name": "lamb", "betas": [0.9]}, r"betas: lamb takes 2 of them"),
        ({"options": {"momentum": 0.9}}, r"options: adamw takes none"),
        ({"name": "timm:sgd", "options": {"lr": 1}}, r"options\.lr: give it as optim\.lr"),
        ({"name": "timm:lion", "options": {"betas": [0.9, 0.9]}}, r"options\.betas: give it as optim\.betas"),
    ],
)
def test_wrong_names_and_arguments(optim, message):
    with pytest.raises(ValueError, match=message):
        read(**optim)
