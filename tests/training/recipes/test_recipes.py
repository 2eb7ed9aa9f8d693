"""A wrong recipe is refused, naming each wrong key and the nearest right one; shipped recipes stay consistent."""

import itertools
import re

import pytest
import tomli_w
from pydantic import TypeAdapter, ValidationError

from vitrine.training.recipes.catalogue import find_recipe, shipped
from vitrine.training.recipes.costs import estimate
from vitrine.training.recipes.image_sources import WebDatasetSource
from vitrine.training.recipes.reading import load_recipe, skip_broken_shards
from vitrine.training.recipes.recipe import AnyRecipe, CltRecipe, RecipeError

TRAIN = 'kind = "folder", path = "train"'  # in the tiny recipe


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
    assert (recipe.clt.features, recipe.clt.k, recipe.clt.k_cls) == (64, (8,), None)
    assert (recipe.data.train.kind, recipe.data.train.path) == ("folder", "train")
    assert recipe.data.labels == ("red circle", "green square", "blue triangle")
    assert (recipe.training.epochs, recipe.training.learning_rate) == (4, 0.01)
    assert (recipe.training.seed, recipe.training.gradient_clip) == (0, 1.0)  # not in the file


def test_recipe_survives_json(recipe):
    """Checkpoints store it so; resuming compares the two."""
    assert CltRecipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_recipe_cannot_be_changed(recipe):
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.seed = 1


def differences(one, other):
    """Dotted keys in which two recipes differ."""

    def flat(value, name=""):
        if not isinstance(value, dict):
            return {name: value}
        return {key: leaf for part in value for key, leaf in flat(value[part], f"{name}.{part}").items()}

    one, other = flat(one.model_dump()), flat(other.model_dump())
    return {key.removeprefix(".") for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def test_recipe_survives_a_dump_as_toml(recipe, tmp_path):
    """Bundles store it so."""
    path = tmp_path / "dumped.toml"
    path.write_text(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    assert load_recipe(path) == recipe


# Shipped recipes

CLIPS, DATA, SPARSIFIERS = (
    ("b32", "b16"),
    ("cifar100", "coco", "imagenet100"),
    ("relu_topk", "abs_topk", "jumprelu"),
)
CELLS = list(itertools.product(CLIPS, DATA, SPARSIFIERS))
FOLLOWS_FROM = {  # what may differ between two cells, besides their names
    "clip": {  # the same number of tokens per step and run, with a fourth as many [CLS] tokens
        "clip.name",
        "training.images_per_step",
        "training.mixed_images",
        "training.epochs",
        "training.cls_weight",
    },
    "data": {"data", "training.epochs"},
    "sparsifier": {"clt.sparsifier"},
}


def cell(*names):
    return load_recipe(find_recipe("-".join(names)))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run_them(path):
    assert load_recipe(path).name == path.stem
    comment = path.read_text().partition("name =")[0]
    assert re.search(rf"^#   vitrine train +--recipe (training/recipes/)?{path.stem}(\.toml)? ", comment, re.MULTILINE)


def test_the_papers_cells_are_all_there():
    assert {"-".join(names) for names in CELLS} <= {path.stem for path in shipped()}


@pytest.mark.parametrize("names", CELLS, ids="-".join)
def test_a_cell_is_what_its_name_says(names):
    clip, data, sparsifier = names
    recipe = cell(*names)
    assert (recipe.clip.name, recipe.clip.weights) == ({"b32": "ViT-B-32", "b16": "ViT-B-16"}[clip], "openai")
    assert recipe.data.name.replace("-", "").lower() == data
    train, val = recipe.data.train, recipe.data.val
    assert (train.split, train.model_copy(update={"split": val.split})) == ("train", val)
    assert val.split in ("val", "validation")
    assert (recipe.clt.sparsifier, recipe.clt.cross_layer) == (sparsifier, True)


@pytest.mark.parametrize("names", CELLS, ids="-".join)
def test_two_cells_differ_only_in_what_they_are_about_and_what_follows(names):
    recipe = cell(*names)
    for axis, (kind, values) in enumerate((("clip", CLIPS), ("data", DATA), ("sparsifier", SPARSIFIERS))):
        for value in values:
            other = cell(*names[:axis], value, *names[axis + 1 :])
            allowed = {"name"} | FOLLOWS_FROM[kind]
            assert {key for key in differences(recipe, other) if not {key, key.split(".")[0]} & allowed} == set()


@pytest.mark.parametrize("data", DATA)
def test_both_clips_see_as_many_tokens(data, tmp_path):
    steps, tokens = [], []
    for clip in CLIPS:
        recipe = cell(clip, data, "relu_topk")
        costs = estimate(recipe, tmp_path)
        steps.append(costs.phases[-1].steps)
        tokens.append(recipe.training.images_per_step * costs.clip.tokens)
    assert steps[0] == pytest.approx(steps[1], rel=0.01)
    assert tokens[0] == pytest.approx(tokens[1], rel=0.02)


def test_the_baseline_differs_from_its_cell_in_cross_layer_alone():
    baseline, full = cell("b32", "cifar100", "per_layer"), cell("b32", "cifar100", "relu_topk")
    assert differences(baseline, full) == {"name", "clt.cross_layer"}
    assert baseline.clt.cross_layer is False


def test_the_cascade_differs_from_its_cell_in_that_phase_alone():
    cascade, full = cell("b32", "cifar100", "cascade"), cell("b32", "cifar100", "relu_topk")
    assert {key.partition(".")[0] for key in differences(cascade, full)} == {"name", "cascade"}
    assert full.cascade is None
    assert cascade.cascade.learning_rate < cascade.training.learning_rate


# Wrong keys


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate", "learning_rat", "training.learning_rat: no such key; did you mean `learning_rate`?"),
        ("[training]", "[trainin]", "trainin: no such key; did you mean `training`?"),
        ("k = 8", "k = 8\nzzz = 1", "clt.zzz: no such key (keys: features, k, k_cls, sparsifier, cross_layer)"),
        ("k = 8", "", "clt.k: Field required"),
        ("k = 8", "k = 65", "clt: Value error, k = 65 is larger than features = 64"),
        ("k = 8", "k = [8, 65, 8]", "clt: Value error, k = 65 is larger than features = 64"),
        ("k = 8", "k = 8\nk_cls = 65", "clt: Value error, k_cls = 65 is larger than features = 64"),
        ("k = 8", "k = 0", "clt.k.0: Input should be greater than 0"),
        ("k = 8", "k = [8, 8, 0]", "clt.k.2: Input should be greater than 0"),
        ("k = 8", "k = []", "clt.k: Tuple should have at least 1 item"),
        ("k = 8", "k = 8.5", "clt.k: "),
        ("k = 8", "k = 'eight'", "clt.k: "),
        ("k = 8", "k = 8\nkcls = 4", "clt.kcls: no such key; did you mean `k_cls`?"),
        ("k = 8", "k = 8\nsparsifer = 'jumprelu'", "clt.sparsifer: no such key; did you mean `sparsifier`?"),
        ("k = 8", "k = 8\nsparsifier = 'jump'", "clt.sparsifier: Input should be 'relu_topk', 'abs_topk'"),
        ("k = 8", "k = 8\n[cascade]\nsteps = 0", "cascade.steps: Input should be greater than 0"),
        ("k = 8", "k = 8\n[cascade]\nstep = 5", "cascade.step: no such key; did you mean `steps`?"),
        ("k = 8", "k = 8\n[cascade]", "cascade.steps: Field required"),
        ("k = 8", "k = 8\n[bundle]\nlicense = 'MIT'", "bundle.license: no such key; did you mean `licence`?"),
        ("mixed_images = 16", "mixed_images = 12", "mixed_images = 12 is not a multiple of images_per_step = 8"),
        ("mixed_images = 16", "precision = 'bf16'", "training.precision: Input should be '32-true' or 'bf16-mixed'"),
        (TRAIN, 'kind = "folder", pth = "train"', "data.train.pth: no such key; did you mean `path`?"),
        (TRAIN, 'kind = "folder", pth = "train"', "data.train.path: Field required"),
        (TRAIN, 'kind = "folder", path = 1', "data.train.path: Input should be a valid string"),
        (TRAIN, 'path = "train"', "data.train: Unable to extract tag using discriminator 'kind'"),
        (TRAIN, 'kind = "foldr", path = "train"', "data.train: Input tag 'foldr' found using 'kind' does not match"),
        (
            TRAIN,
            'kind = "torchvision", nam = "CIFAR10", split = "val"',
            "data.train.nam: no such key; did you mean `name`",
        ),
        (
            TRAIN,
            'kind = "torchvision", name = "CIFAR10", split = "test"',
            "data.train.split: Input should be 'train' or",
        ),
        (TRAIN, 'kind = "huggingface", id = "a/b", splt = "x"', "data.train.splt: no such key; did you mean `split`?"),
        (
            TRAIN,
            'kind = "huggingface", id = "a/b", split = "x", lable = "y"',
            "data.train.lable: no such key; did you mean",
        ),
        (
            TRAIN,
            'kind = "huggingface", path = "a/b"',
            "data.train.path: no such key (keys: kind, id, split, image, label)",
        ),
        (TRAIN, 'kind = "webdataset", shard = "a.tar"', "data.train.shard: no such key; did you mean `shards`?"),
        ("licence =", "license =", "data.license: no such key; did you mean `licence`?"),
        ("val =", "validation =", "data.val: Field required"),
        ("weights =", "weigths =", "clip.weigths: no such key; did you mean `weights`?"),
        ("weights =", "zzz =", "clip.zzz: no such key (keys: name, weights, config, quick_gelu)"),
        ("decay_share = 0.5", "decay_share = 0", "training.decay_share: Input should be greater than 0"),
        ("epochs = 4", "epochs = 1.5", "training.epochs: Input should be a valid integer"),
        ("a photo of a {}", "a photo of a cat", "data.templates.0: String should match pattern"),
        ('config = "clip/tiny.json"', "", "clip: Value error, give either `name`"),
        ('config = "clip/tiny.json"', 'config = "a.json"\nname = "ViT-B-32"', "clip: Value error, give either `name`"),
        ('labels = ["red circle", "green square", "blue triangle"]', "labels = []", "data.labels: Tuple should have"),
        ("labels = [", 'labels_file = "x.txt"\nlabels = [', "data: Value error, give either `labels` or `labels_file`"),
        (
            '"green square"',
            '"red circle "',
            "data: Value error, labels: labels must differ from one another, but 'red c",
        ),
        ("[clt]", "[data.classes]\nn999 = 3\n\n[clt]", "data.classes.n999: Input should be a valid string"),
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
    assert "clt.k.0: " in str(caught.value)
    assert "clt.feature: no such key; did you mean `features`?" in str(caught.value)


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe .*nothing.toml does not exist"):
        load_recipe(tmp_path / "nothing.toml")


def test_recipe_that_is_not_toml_is_named(changed):
    with pytest.raises(RecipeError, match=r"recipe .*changed.toml is not TOML: .*line"):
        load_recipe(changed("[clt]", "[clt"))


def test_every_wrong_key_of_both_sources_is_named(changed):
    train = 'kind = "torchvision", name = "CIFAR10", splt = "train" }\nval = { kind = "webdataset", shard = "a.tar'
    with pytest.raises(RecipeError) as caught:
        load_recipe(changed(TRAIN + ' }\nval = { kind = "folder", path = "val', train))
    named = {line.partition(": ")[0].strip() for line in str(caught.value).splitlines()[1:]}
    assert named == {"data.train.splt", "data.train.split", "data.val.shard", "data.val.shards"}


def test_broken_shards_are_skipped_where_there_are_shards(recipe):
    with pytest.raises(RecipeError, match="reads no shards"):
        skip_broken_shards(recipe)
    shards = WebDatasetSource(kind="webdataset", shards="x.tar")
    mixed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": shards})})
    changed = skip_broken_shards(mixed)
    assert (changed.data.train.skip_broken, shards.skip_broken) == (True, False)
    assert changed.data.val == recipe.data.val
    assert CltRecipe.model_validate_json(changed.model_dump_json()) == changed


def test_k_is_one_number_or_one_a_layer(changed):
    assert load_recipe(changed("k = 8", "k = [4, 8, 8]\nk_cls = 2")).clt.architecture(3, 32).k == (4, 8, 8)
    architecture = load_recipe(changed("k = 8", "k = 8\nk_cls = [2, 3, 4]")).clt.architecture(3, 32)
    assert (architecture.k, architecture.k_cls) == ((8, 8, 8), (2, 3, 4))
    assert load_recipe(changed("k = 8", "k = 5")).clt.architecture(3, 32).k_cls == (5, 5, 5)
    with pytest.raises(RecipeError, match=r"clt.k_cls has 2 numbers, but the CLIP has 3 layers"):
        load_recipe(changed("k = 8", "k = 8\nk_cls = [2, 3]")).clt.architecture(3, 32)


# Residual SAEs


@pytest.fixture
def saes(recipe_path, tmp_path):
    """saes(old, new) -> path of the tiny recipe, of residual SAEs, with `old` replaced by `new`."""

    def write(old="k = 8", new="k = 8"):
        text = recipe_path.read_text().replace("[clt]", "[residual_sae]").replace("cls_weight = 4\n", "")
        text = 'kind = "residual_sae"\n' + text
        assert old in text
        path = tmp_path / "saes.toml"
        path.write_text(text.replace(old, new))
        return path

    return write


def test_a_recipe_of_residual_saes_has_sections_of_its_own(saes):
    recipe = load_recipe(saes("features = 64\nk = 8", "features = [16, 32]\nk = 8\nk_cls = [2, 4]"))
    assert (recipe.kind, recipe.residual_sae.dead_weight, recipe.residual_sae.dead_features) == (
        "residual_sae",
        1 / 32,
        256,
    )
    architecture = recipe.residual_sae.architecture(3, 32)
    assert (architecture.features, architecture.k, architecture.k_cls) == ((16, 32), (8, 8), (2, 4))
    with pytest.raises(RecipeError, match=r"features has 2 numbers, but the CLIP has 3 blocks before its last"):
        recipe.residual_sae.architecture(4, 32)
    with pytest.raises(RecipeError, match="a CLIP of one layer has no residual SAEs"):
        load_recipe(saes()).residual_sae.architecture(1, 32)
    assert TypeAdapter(AnyRecipe).validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "epochs = 4",
            "epochs = 4\nstart = 'neurons'",
            'training.start: a key for recipes of kind = "clt", but',
        ),
        ("epochs = 4", "epochs = 4\ncls_weight = 1", 'training.cls_weight: a key for recipes of kind = "clt"'),
        ("[training]", "[bundle]\nsources = true\n[training]", 'bundle: a key for recipes of kind = "clt"'),
        ("[training]", "[cascade]\nsteps = 3\n[training]", 'cascade: a key for recipes of kind = "clt"'),
        ("k = 8", "k = 8\ncross_layer = true", "residual_sae.cross_layer: no such key"),
        ("k = 8", "k = [8, 65]", "k = 65 is larger than features = 64"),
        ("features = 64", "features = [64, 4]", "k = 8 is larger than features = 4"),
        ("epochs = 4", "epoch = 4", "training.epoch: no such key; did you mean `epochs`?"),
        ('"residual_sae"', '"sae"', "kind: 'sae' is not one of clt, residual_sae"),
        ('kind = "residual_sae"\n', "", 'residual_sae: a key for recipes of kind = "residual_sae", but'),
    ],
)
def test_keys_of_another_kind_are_refused_by_name(saes, old, new, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(saes(old, new))
    assert message in str(caught.value)


# find_recipe


def test_a_recipe_is_found_by_name_or_by_path(recipe_path):
    assert find_recipe("quick").name == "quick.toml"
    assert find_recipe(recipe_path) == recipe_path
    assert find_recipe(str(recipe_path)) == recipe_path
    assert all(find_recipe(path) == path for path in shipped())


@pytest.mark.parametrize(
    "wrong", ["b32-cifar-relu_topk", "b32-cifar100-relu_topk.tml", "runs/b32-cifar100-relu_top.toml"]
)
def test_an_unknown_recipe_is_refused_with_the_nearest(wrong):
    with pytest.raises(RecipeError, match=r"neither a file nor .* did you mean b32-cifar100-relu_topk\?"):
        find_recipe(wrong)


def test_an_unknown_recipe_like_no_other_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="`vitrine recipes` lists them"):
        find_recipe("zzz")
    with pytest.raises(RecipeError, match="neither a file"):
        find_recipe(tmp_path)
