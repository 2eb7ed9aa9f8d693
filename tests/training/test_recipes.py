"""A wrong recipe is refused with every wrong key named, and the nearest right one."""

from pathlib import Path

import pytest
from pydantic import ValidationError

import training
from training.recipes import Recipe, RecipeError, load_recipe


@pytest.fixture
def changed(recipe_path, tmp_path):
    """changed(old, new) -> path of the tiny recipe with `old` replaced by `new`."""

    def change(old, new):
        text = recipe_path.read_text()
        assert text.count(old) == 1
        path = tmp_path / "changed.toml"
        path.write_text(text.replace(old, new))
        return path

    return change


def test_recipe_is_what_its_file_says(recipe):
    assert (recipe.name, recipe.clip.name, recipe.clip.config) == ("tiny", None, "clip/tiny.json")
    assert (recipe.clt.features, recipe.clt.k) == (64, 8)
    assert recipe.data.labels == ("red circle", "green square", "blue triangle")
    assert (recipe.training.epochs, recipe.training.learning_rate) == (4, 0.01)
    assert (recipe.training.seed, recipe.training.gradient_clip) == (0, 1.0)  # not in the file


def test_recipe_survives_json(recipe):
    """As checkpoints keep it; resuming compares the two."""
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_recipe_cannot_be_changed(recipe):
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.seed = 1


@pytest.mark.parametrize(
    "path", sorted((Path(training.__file__).parent / "recipes").glob("*.toml")), ids=lambda p: p.stem
)
def test_shipped_recipes_are_valid(path):
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate", "learning_rat", "training.learning_rat: no such key; did you mean `learning_rate`?"),
        ("[training]", "[trainin]", "trainin: no such key; did you mean `training`?"),
        ("k = 8", "k = 8\nzzz = 1", "clt.zzz: no such key (keys: features, k)"),
        ("k = 8", "", "clt.k: Field required"),
        ("k = 8", "k = 65", "clt: Value error, k = 65 is larger than features = 64"),
        ("k = 8", "k = 0", "clt.k: Input should be greater than 0"),
        ("decay_share = 0.5", "decay_share = 0", "training.decay_share: Input should be greater than 0"),
        ("epochs = 4", "epochs = 1.5", "training.epochs: Input should be a valid integer"),
        ("a photo of a {}", "a photo of a cat", "data.templates.0: String should match pattern"),
        ('config = "clip/tiny.json"', "", "clip: Value error, give either `name`"),
        ('config = "clip/tiny.json"', 'config = "a.json"\nname = "ViT-B-32"', "clip: Value error, give either `name`"),
        ('labels = ["red circle", "green square", "blue triangle"]', "labels = []", "data.labels: Tuple should have"),
    ],
)
def test_wrong_key_is_named(changed, old, new, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(changed(old, new))
    assert "changed.toml:\n" in str(caught.value)
    assert message in str(caught.value)


def test_every_wrong_key_is_named(changed):
    with pytest.raises(RecipeError) as caught:
        load_recipe(changed("k = 8", "k = 0\nfeature = 3"))
    assert "clt.k: " in str(caught.value)
    assert "clt.feature: no such key; did you mean `features`?" in str(caught.value)


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe .*nothing.toml does not exist"):
        load_recipe(tmp_path / "nothing.toml")


def test_recipe_that_is_not_toml_is_named(changed):
    with pytest.raises(RecipeError, match=r"recipe .*changed.toml is not TOML: .*line"):
        load_recipe(changed("[clt]", "[clt"))
