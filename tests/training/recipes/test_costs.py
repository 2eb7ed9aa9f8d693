"""The estimates against what torch counts, allocates and loads."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.dictionary.residual_sae import SaeArchitecture
from vitrine.training.recipes.catalogue import shipped
from vitrine.training.recipes.clip_shape import UnknownShape, clip_shape
from vitrine.training.recipes.costs import (
    BYTES_PER_PLACE,
    GPUS,
    Gpu,
    Work,
    cache_bytes,
    count_images,
    dictionary_work,
    estimate,
    places,
    step_memory,
)
from vitrine.training.recipes.reading import load_recipe
from vitrine.training.recipes.recipe import ClipSection, CltRecipe, RecipeError

NAMED = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-B-16-plus-240")


def architecture(layers=3, width=16, features=40, k=4, **changes):
    return Architecture(layers, width, features, (k,) * layers, (k,) * layers, **changes)


@pytest.fixture
def make_recipe(recipe):
    """make_recipe(clt={"k": 4}, ...) -> the tiny recipe with those keys of those sections changed."""

    def make(**sections):
        fields = recipe.model_dump()
        for section, keys in sections.items():
            fields[section] = keys if fields[section] is None else fields[section] | keys
        return CltRecipe.model_validate(fields)

    return make


@pytest.fixture
def costs(make_recipe, data_root):
    """costs(**sections) -> the estimate for the tiny recipe, changed."""
    return lambda **sections: estimate(make_recipe(**sections), data_root)


# CLIP


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_shape_of_a_configuration_file_is_the_loaded_clips(clip, data_root):
    shape = clip_shape(ClipSection(config="clip/tiny.json"), data_root)
    tower = clip.tower
    assert (shape.layers, shape.width, shape.tokens, shape.embedding) == (3, 32, 17, 24)
    assert (tower.layers, tower.width, tower.tokens, tower.embedding) == (3, 32, 17, 24)
    assert shape.parameters == count(clip.model)
    assert shape.vision_parameters == count(tower.visual)


@pytest.mark.parametrize("name", NAMED)
def test_the_shapes_of_known_names_are_open_clips(name, tmp_path):
    shape = clip_shape(ClipSection(name=name, weights="openai"), tmp_path)
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(name))
    tower = Tower(model.visual)
    assert (shape.layers, shape.width, shape.tokens) == (tower.layers, tower.width, tower.tokens)
    assert (shape.parameters, shape.vision_parameters) == (count(model), count(model.visual))


@pytest.mark.parametrize("vision_cfg", [{}, {"image_size": [32, 48]}, {"mlp_ratio": 3.0}])
def test_the_towers_flops_are_what_torch_counts(write_clip, make_clip, data_root, vision_cfg):
    config, _ = write_clip(vision_cfg=vision_cfg)
    tower = make_clip(vision_cfg=vision_cfg).tower
    pixels = torch.zeros(3, 3, *tower.image_size, requires_grad=True)  # or attention takes a path that is not counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tower.visual(pixels)
    shape = clip_shape(ClipSection(config=str(config.relative_to(data_root))), data_root)
    assert 3 * shape.forward == counter.get_total_flops()


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"name": "ViT-B-33", "weights": "openai"}, "did you mean ViT-B-32"),
        ({"name": "hf-hub:org/model"}, "has its own configuration"),
        ({"config": "nowhere.json"}, "nowhere.json does not exist"),
        ({"config": "broken.json"}, "broken.json cannot be read"),
        ({"config": "folder.json"}, "folder.json cannot be read"),
        ({"name": "RN50", "weights": "openai"}, "RN50 is not a plain Vision Transformer"),
        ({"name": "ViT-B-16-SigLIP", "weights": "webli"}, "is not a plain Vision Transformer"),
        ({"config": "list.json"}, "list.json is not a plain Vision Transformer"),
    ],
)
def test_a_clip_without_a_readable_shape_is_reported(tmp_path, clip, message):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UnknownShape, match=message):
        clip_shape(ClipSection(**clip), tmp_path)


# The CLT


@pytest.mark.parametrize("cross_layer", [True, False])
@pytest.mark.parametrize("sparsifier", ["relu_topk", "abs_topk", "jumprelu", "batch_topk"])
def test_parameters_and_places_are_the_modules(sparsifier, cross_layer):
    shape = architecture(sparsifier=sparsifier, cross_layer=cross_layer)
    shape = replace(shape, k=(4, 30, 40), k_cls=(9, 2, 40))  # twice 30 is more than there are features
    clt = CrossLayerTranscoder(shape)
    assert shape.parameters == count(clt)
    assert places(shape) == tuple(encoder.sparsifier.places for encoder in clt.encoders)


@pytest.mark.parametrize("cross_layer", [True, False])
def test_dense_flops_are_what_torch_counts(cross_layer):
    """The product that finds active features, and that of a decoder if every feature were active."""
    shape, tokens = architecture(cross_layer=cross_layer), 7
    clt = CrossLayerTranscoder(shape)
    clt.initialise(torch.Generator().manual_seed(0))
    is_cls = torch.zeros(tokens, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        codes = clt.encode(torch.randn(3, tokens, 16), is_cls)
    find, *_ = dictionary_work(shape, tokens, 1)
    assert find.flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        outputs = torch.stack([decoder.decode_dense(codes) for decoder in clt.decoders])
        forward = counter.get_total_flops()
        outputs.sum().backward()
    everything = replace(shape, k=(40,) * 3, k_cls=(40,) * 3)
    _, decode, backward, _ = dictionary_work(everything, tokens, 1)
    assert decode.flops == forward
    assert backward.flops == counter.get_total_flops() - forward


def test_sparse_work_follows_the_places_in_use():
    """By hand: layer 0 has 2 places and writes to 2 targets, layer 1 has 3 and writes to 1; both have 1 at [CLS].
    5 tokens, d = 4, F = 8."""
    shape = Architecture(layers=2, width=4, features=8, k=(2, 3), k_cls=(1, 1))
    find, decode, decode_back, encode_back = dictionary_work(shape, 5, cls=0)
    gathered = 5 * 4 * (2 + 2 + 3)
    assert find.bytes == 4 * 2 * (8 * 4 + 5 * 4 + 3 * 5 * 8)
    assert (decode.flops, decode.bytes) == (2 * gathered, 4 * (gathered + 3 * 5 * 4))
    assert (decode_back.flops, decode_back.bytes) == (4 * gathered, 4 * (2 * gathered + 3 * (5 * 4 + 8 * 4)))
    assert (encode_back.flops, encode_back.bytes) == (2 * 5 * 4 * 5, 4 * (5 * 4 * 5 + 2 * 8 * 4))
    assert [work.dense for work in (find, decode, decode_back, encode_back)] == [True, False, False, False]
    find_too, decode, *_ = dictionary_work(shape, 5, cls=2)
    assert find_too == find
    assert decode.flops == 2 * 4 * (3 * (2 + 2 + 3) + 2 * (1 + 1 + 1))


def test_work_and_cache_of_saes_by_hand(tmp_path):
    """Two SAEs of F = 8 and 16, k = 2 and 3, 1 at [CLS], each with a decoder of its own; 5 tokens, d = 4."""
    shape = SaeArchitecture(4, (8, 16), (2, 3), (1, 1))
    find, decode, decode_back, encode_back = dictionary_work(shape, 5, cls=0)
    gathered, tables = 5 * 4 * (2 + 3), 4 * (8 + 16)
    assert (find.flops, find.bytes) == (2 * 5 * tables, 4 * (tables + 2 * 5 * 4 + 3 * 5 * (8 + 16)))
    assert (decode.flops, decode.bytes) == (2 * gathered, 4 * (gathered + 2 * 5 * 4))
    assert (decode_back.flops, decode_back.bytes) == (4 * gathered, 4 * (2 * gathered + 2 * 5 * 4 + tables))
    assert (encode_back.flops, encode_back.bytes) == (2 * gathered, 4 * (gathered + tables))
    assert step_memory(shape, 5) == 4 * 7 * 2 * 5 * 4 + 52 * 5 * (2 + 3) + 2 * 4 * 5 * 16
    clip = clip_shape(ClipSection(name="ViT-B-32"), tmp_path)
    saes = SaeArchitecture(768, (8,) * 11, (1,) * 11, (1,) * 11)
    assert cache_bytes(3, saes, clip, "bfloat16") == 3 * 50 * 11 * 768 * 2


# Memory


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("sparsifier", ["relu_topk", "jumprelu"])
def test_memory_of_weights_gradients_and_moments_is_torchs(clip, costs, sparsifier):
    """After a real step of a real Adam."""
    estimated = costs(clt={"sparsifier": sparsifier})
    clt = CrossLayerTranscoder(estimated.architecture)
    clt.initialise(torch.Generator().manual_seed(0))
    adam = torch.optim.Adam(clt.parameters())
    _, outputs = clt(torch.randn(3, 17, 32), torch.arange(17) == 0)
    outputs.square().sum().backward()
    adam.step()
    memory = estimated.memory
    assert memory["weights"] == size(clt.parameters())
    assert memory["gradients"] == size(parameter.grad for parameter in clt.parameters())
    moments = [state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert memory["Adam's moments"] == size(moments)
    assert memory["CLIP"] == size(clip.model.parameters())
    assert estimated.total_memory == sum(memory.values())


def test_memory_of_a_place_is_that_of_the_tensors_that_training_keeps():
    clt = CrossLayerTranscoder(architecture())
    clt.initialise(torch.Generator().manual_seed(0))
    (code, *_), outputs = clt(torch.randn(3, 7, 16), torch.arange(7) == 0)
    outputs.sum().backward()
    assert code.order._places is None, "all places used: places, features and activations are those of the code"
    preactivations = code.values  # as many, of the same type
    sorted_by_feature = [*code.order._by_feature[:2], code.order._sorted[1]]
    kept = [code.indices, code.values, preactivations, code.order._by_token[2], *sorted_by_feature]
    gradients = [code.values, preactivations]
    assert BYTES_PER_PLACE * code.indices.numel() == size(kept) + size(gradients)


def test_memory_of_a_step_by_hand():
    """L = 2, d = 4, F = 8, K = 2 and 3; 5 tokens."""
    shape = Architecture(layers=2, width=4, features=8, k=(2, 3), k_cls=(1, 1))
    assert step_memory(shape, 5) == 4 * 9 * 2 * 5 * 4 + 52 * 5 * (2 + 3) + 2 * 4 * 5 * 8


def test_mixing_buffer_and_cache_hold_both_sides_of_every_mlp(clip, costs):
    taps = clip.tower(torch.zeros(16, 3, 32, 32))
    estimated = costs()
    assert estimated.memory["mixing buffer"] == size([taps.mlp_in, taps.mlp_out])  # of mixed_images = 16
    assert costs(training={"mixed_images": 8}).memory["mixing buffer"] == 0  # no more than a step's
    assert (estimated.images, estimated.cache) == (48, 0)
    assert costs(training={"cache": "float32"}).cache == 3 * size([taps.mlp_in, taps.mlp_out])
    assert costs(training={"cache": "bfloat16"}).cache * 2 == costs(training={"cache": "float32"}).cache


def test_an_epoch_of_imagenet_100_is_as_large_as_others_found(tmp_path):
    """234 GB for B/32 and 920 GB for B/16 in bfloat16."""
    for name, gigabytes in (("ViT-B-32", 234), ("ViT-B-16", 920)):
        shape = clip_shape(ClipSection(name=name), tmp_path)
        clt = Architecture(12, 768, 8, (1,) * 12, (1,) * 12)
        assert cache_bytes(126_689, clt, shape, "bfloat16") / 1e9 == pytest.approx(gigabytes, rel=0.01)


# The run


def test_a_part_takes_the_longer_of_computing_and_moving():
    gpu = Gpu("one", bf16=100, tf32=50, fp32=10, bandwidth=1, memory=1)
    product = Work("product", flops=1e15, bytes=1e12, dense=True)
    assert [product.seconds(gpu, matmul, 1.0) for matmul in ("bf16", "tf32", "fp32")] == [10, 20, 100]
    assert product.seconds(gpu, "bf16", 0.5) == 20
    assert product._replace(dense=False).seconds(gpu, "bf16", 1.0) == 100
    assert product._replace(bytes=3e13).seconds(gpu, "bf16", 1.0) == 30


def test_the_run_is_its_steps(costs):
    """48 images: 6 steps of 8 an epoch, 4 epochs; 32 images of normalisation."""
    estimated = costs()
    step = sum(part.flops for part in estimated.step)
    tower = estimated.step[0].flops
    assert [(phase.name, phase.steps) for phase in estimated.phases] == [("normalisation", 4), ("reconstruction", 24)]
    assert estimated.flops == 24 * step + 4 * tower
    assert tower == 8 * estimated.clip.forward
    gpu = GPUS[0]
    assert estimated.hours(gpu, 0.5) == pytest.approx(2 * estimated.hours(gpu, 1.0))


def test_a_cache_saves_clips_forward_passes_after_the_first_epoch(costs):
    estimated, cached = costs(), costs(training={"cache": "float32"})
    assert estimated.flops - cached.flops == 18 * estimated.step[0].flops
    assert cached.bytes < estimated.bytes


def test_a_cascade_comes_on_top(costs):
    estimated, cascade = costs(), costs(cascade={"steps": 10, "images_per_step": 8})
    assert cascade.phases[-1].name == "cascade"
    assert cascade.flops > estimated.flops + 10 * sum(part.flops for part in estimated.step)
    assert costs(cascade={"steps": 10, "images_per_step": 8, "clean_weight": 0.0}).flops < cascade.flops


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"clt": {"features": 64}}, {"clt": {"features": 128}}),
        ({"clt": {"k": 4}}, {"clt": {"k": 5}}),
        ({"clt": {"k": 4}}, {"clt": {"k": [4, 5, 4]}}),
        ({"clt": {"k": 4}}, {"clt": {"k": 4, "k_cls": 5}}),
        ({"clt": {"cross_layer": False}}, {"clt": {"cross_layer": True}}),
        ({"clt": {"sparsifier": "relu_topk"}}, {"clt": {"sparsifier": "jumprelu"}}),
    ],
)
def test_more_of_anything_costs_more(costs, less, more):
    small, large = costs(**less), costs(**more)
    assert small.flops < large.flops
    assert small.bytes < large.bytes
    assert small.total_memory < large.total_memory
    assert all(small.hours(gpu, 0.4) < large.hours(gpu, 0.4) for gpu in GPUS)


def test_more_epochs_take_longer_in_the_same_memory(costs):
    small, large = costs(training={"epochs": 2}), costs(training={"epochs": 3})
    assert small.total_memory == large.total_memory
    assert small.flops < large.flops


def test_half_precision_is_for_products_alone(costs):
    full, mixed = costs(), costs(training={"precision": "bf16-mixed"})
    assert (full.matmul, mixed.matmul) == ("fp32", "bf16")
    assert full.memory == mixed.memory
    assert mixed.hours(GPUS[2], 0.4) <= full.hours(GPUS[2], 0.4)
    assert full.hours(GPUS[2], 0.4, "bf16") == mixed.hours(GPUS[2], 0.4)


def test_a_wrong_number_of_layers_in_k_is_refused(make_recipe, data_root):
    with pytest.raises(RecipeError, match=r"clt.k has 2 numbers, but the CLIP has 3 layers"):
        estimate(make_recipe(clt={"k": [4, 4]}), data_root)


# Images


def source(**fields):
    recipe = load_recipe(shipped()[0]).model_dump()
    return CltRecipe.model_validate(recipe | {"data": recipe["data"] | {"train": fields}}).data.train


@pytest.mark.parametrize(
    ("fields", "images"),
    [
        ({"kind": "folder", "path": "train"}, 48),
        ({"kind": "folder", "path": "clip"}, None),
        ({"kind": "folder", "path": "nowhere"}, None),
        ({"kind": "torchvision", "name": "CIFAR100", "split": "train"}, 50_000),
        ({"kind": "torchvision", "name": "CIFAR100", "split": "val"}, 10_000),
        ({"kind": "torchvision", "name": "Places365", "split": "train"}, None),
        ({"kind": "huggingface", "id": "clane9/imagenet-100", "split": "train"}, 126_689),
        ({"kind": "huggingface", "id": "clane9/imagenet-100", "split": "train[:500]"}, 500),
        ({"kind": "huggingface", "id": "clane9/imagenet-100", "split": "train[:900000]"}, 126_689),
        ({"kind": "huggingface", "id": "clane9/imagenet-100", "split": "train[:5%]"}, None),
        ({"kind": "huggingface", "id": "clane9/imagenet-100", "split": "train[10:20]"}, None),
        ({"kind": "huggingface", "id": "clane9/imagenet-100", "split": "nonsense"}, None),
        ({"kind": "huggingface", "id": "org/unheard-of", "split": "train[:500]"}, None),
        ({"kind": "webdataset", "shards": "train-{000..009}.tar"}, None),
    ],
)
def test_images_are_known_counted_or_unknown(data_root, fields, images):
    assert count_images(source(**fields), data_root) == images


def test_without_a_number_of_images_the_step_is_known_and_the_run_is_not(make_recipe, data_root):
    train = {"kind": "webdataset", "shards": "train.tar"}
    estimated = estimate(make_recipe(data={"train": train}), data_root)
    assert estimated.total_memory > 0
    assert estimated.step
    assert (estimated.images, estimated.phases, estimated.flops, estimated.bytes) == (None, None, None, None)
    assert estimated.hours(GPUS[0], 0.4) is None


# Shipped recipes


def write_clip_config(tmp_path: Path, recipe: CltRecipe) -> None:
    """Write a small configuration file where the recipe expects its own."""
    if recipe.clip.config:
        vision = {"image_size": 32, "layers": 12, "width": 128, "patch_size": 4}
        text = {"context_length": 16, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
        path = tmp_path / recipe.clip.config
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_costed_and_fits_a_gpu(path, tmp_path):
    recipe = load_recipe(path)
    write_clip_config(tmp_path, recipe)
    costs = estimate(recipe, tmp_path)
    assert all(costs.fits(gpu) for gpu in GPUS)
    if recipe.data.train.kind != "folder":
        assert all(costs.hours(gpu, 0.4) > 0 for gpu in GPUS)


def test_a_run_at_the_papers_size_is_of_the_size_that_others_report(tmp_path):
    """0.42 G parameters, 7 GB with Adam, a dense decode of 2.2 GFLOP a token, CLIP about 0.2."""
    path = next(path for path in shipped() if path.stem == "b32-cifar100-relu_topk")
    costs = estimate(load_recipe(path), tmp_path)
    assert costs.architecture.parameters / 1e9 == pytest.approx(0.42, abs=0.01)
    assert sum(costs.memory[name] for name in ("weights", "gradients", "Adam's moments")) / 1e9 == pytest.approx(
        7, abs=0.3
    )
    everything = replace(costs.architecture, k=(6144,) * 12, k_cls=(6144,) * 12)
    _, decode, backward, _ = dictionary_work(everything, 1, 0)
    assert (decode.flops + backward.flops) / 1e9 == pytest.approx(2.2, abs=0.05)
    assert costs.clip.forward / costs.clip.tokens / 1e9 == pytest.approx(0.2, abs=0.05)
