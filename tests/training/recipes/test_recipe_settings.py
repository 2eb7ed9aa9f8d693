"""`--set KEY=VALUE`, and in what two recipes differ."""

import pytest

from vitrine.training.recipes.reading import load_recipe
from vitrine.training.recipes.recipe import RecipeError
from vitrine.training.recipes.settings import differences, with_settings


def test_values_are_tomls_and_the_last_one_counts(recipe_path):
    settings = ("training.learning_rate=1e-3", "clt.k = [4, 5, 6]", 'clt.sparsifier="jumprelu"', "training.seed=1")
    recipe = load_recipe(recipe_path, (*settings, "cascade.steps=3", "training.seed=2"))
    assert (recipe.training.learning_rate, recipe.training.seed, recipe.clt.k) == (1e-3, 2, (4, 5, 6))
    assert (recipe.clt.sparsifier, recipe.cascade.steps) == ("jumprelu", 3)
    assert recipe.data == load_recipe(recipe_path).data


def test_the_tables_that_were_read_stay_as_they_are():
    tables = {"clt": {"k": 8}}
    assert with_settings(tables, ["clt.k=9"]) == {"clt": {"k": 9}}
    assert tables == {"clt": {"k": 8}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.learning_rat=1", "training.learning_rat: no such key; did you mean `learning_rate`?"),
        ("trainin.seed=1", "trainin: no such key; did you mean `training`?"),
        ("residual_sae.k=1", 'residual_sae: this key requires a recipe of kind = "residual_sae"'),
        ("training.seed=1.5", "training.seed: Input should be a valid integer"),
        ('clt.k="many"', "clt.k: Input should be a valid tuple"),
        ("kind=[1]", "kind: [1] is not one of clt, residual_sae"),
        ("name.of=1", "--set name.of: name is a value and has no keys"),
        ("clt.sparsifier=jumprelu", "the value is not TOML; text needs quotes, as in --set 'clt.sparsifier="),
        ("clt.k", "--set clt.k: give KEY=VALUE, such as training.learning_rate=1e-3"),
        ("clt..k=1", "--set clt..k=1: give KEY=VALUE"),
        ("clt.k=1\nclt.features=2", "give one KEY=VALUE per --set"),
    ],
)
def test_what_cannot_be_set_is_refused(recipe_path, setting, message):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe_path, (setting,))
    assert message in str(refused.value)


def test_recipes_differ_in_keys_with_their_sections(recipe_path):
    old = load_recipe(recipe_path)
    new = load_recipe(recipe_path, ("clt.k=[1, 2, 3]", "clt.cross_layer=false", "cascade.steps=3"))
    assert differences(old.clt, new.clt, "clt") == [
        "clt.k is 8 there and [1, 2, 3] here",
        "clt.cross_layer is true there and false here",
    ]
    assert "cascade.steps is nothing there and 3 here" in differences(old, new)
    assert differences(old, old) == []


def test_long_values_are_compared_whole(recipe_path):
    """Their middle is left out of the message alone."""
    templates = [f"a photo of a {{}}, number {number}" for number in range(20)]
    old = load_recipe(recipe_path).data.model_copy(update={"templates": tuple(templates)})
    templates[10] = "another {}"
    (found,) = differences(old, old.model_copy(update={"templates": tuple(templates)}), "data")
    assert found.startswith('data.templates is ["a photo of a {}, number 0"')
    assert len(found) < 220
