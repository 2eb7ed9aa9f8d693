"""A CLIP of three layers, a CLT for it, a bundle and some drawn images: all created here in seconds, from seeds only.

open_clip initialises LayerNorms with gamma 1 and beta 0, and biases with 0, which hides many mistakes. So every
parameter is moved away from its initial value.
"""

import gc
import io
import json
import signal
from dataclasses import replace
from functools import cache

import vitrine  # noqa: F401  # first: it stops the libraries' telemetry

# isort: split
import numpy as np
import open_clip
import pillow_heif
import pytest
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from safetensors.torch import save_file

from common import LABELS, RECIPE, TINY_CLIP
from exports import Bundles, Conversions, shared_folder
from printed import check
from vitrine.models import tables
from vitrine.models.bundle.manifest import Data, Metrics
from vitrine.models.clip.loading import load_clip
from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.dictionary.residual_sae import ResidualSaes, SaeArchitecture
from vitrine.models.export.export import Provenance, export_bundle
from vitrine.models.export.residual import ResidualExport, add_residual
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.training.cards import labels
from vitrine.training.cards.build import Options, build_cards
from vitrine.training.checkpoint import CheckpointMeta, save_checkpoint
from vitrine.training.recipes.reading import load_recipe
from vitrine.training.recipes.recipe import ResidualSaeRecipe

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell runs in the background, and its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # these matrices are too small to parallelise
gc.set_threshold(100_000, 20, 100)  # exports create millions of objects: scanning them took a sixth of the time


def pytest_make_parametrize_id(val, argname):
    """Bytes are named by their argument, never by their content: that may hold a time (gzip's header does), and the
    processes that share a run must all collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True, scope="session")
def every_printed_table_is_whole():
    """Whichever test prints one: at 40, 60, 80 and 120 columns."""
    draw = tables._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_draw", lambda table, console: check(table, draw) or draw(table, console))
        yield


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A data root as recipes expect it: `train/<class>/*.png`, `val/<class>/*.png`, and the CLIPs under `clip/`."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 4)):
        for label in LABELS:
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                _draw(label, generator).save(folder / f"{index:02}.png")
    return root


def _draw(label, generator):
    """A 40 x 36 picture of the shape that `label` names, somewhere on a noisy background."""
    colour, shape = label.split()
    noise = torch.randint(0, 120, (36, 40, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    x, y, size = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((0, 20), (0, 16), (10, 20)))
    draw, box = ImageDraw.Draw(image), (x, y, x + size, y + size)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=colour)
    return image


@pytest.fixture(scope="session")
def write_clip(data_root):
    """write_clip(**overrides) -> (configuration file, weights file) of the tiny CLIP, changed by `overrides`.

    write_clip(vision_cfg={"no_ln_pre": True}) changes that one key of vision_cfg. Each variant is written once.
    """
    written = {}

    def write(**overrides):
        key = json.dumps(overrides, sort_keys=True)
        if key not in written:
            name = f"tiny-{len(written)}" if overrides else "tiny"
            config = TINY_CLIP | {
                part: TINY_CLIP[part] | value if isinstance(value, dict) else value for part, value in overrides.items()
            }
            path, weights = data_root / f"clip/{name}.json", data_root / f"clip/{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(config))
            save_file(_random_weights(config), weights)
            written[key] = (path, weights)
        return written[key]

    return write


def _random_weights(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "logit_scale":
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter)).add_(0.1 * torch.randn_like(parameter))
    return {key: tensor.contiguous() for key, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def make_clip(write_clip):
    """make_clip(**overrides) -> the CLIP of `write_clip`, loaded in the usual way. Created once: do not change it."""

    @cache
    def load(config, weights):
        return load_clip(None, str(weights), config)

    return lambda **overrides: load(*write_clip(**overrides))


@pytest.fixture(scope="session")
def clip(make_clip):
    """The tiny CLIP: 3 layers, width 32, 17 tokens, embedding 24."""
    return make_clip()


VARIANTS = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "no_ln_pre": {"vision_cfg": {"no_ln_pre": True}},
    "layer_scale": {"vision_cfg": {"ls_init_value": 0.1}},
    "final_ln_after_pool": {"vision_cfg": {"final_ln_after_pool": True}},
    "wide_image": {"vision_cfg": {"image_size": [32, 48]}},
}


@pytest.fixture(scope="session", params=VARIANTS)
def any_clip(request, make_clip):
    """The tiny CLIP, and each variant of its architecture that Vitrine accounts for."""
    return make_clip(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def make_clt():
    """make_clt(clip, seed=0, k=8, k_cls=k, **architecture) -> a random CLT in evaluation mode, 64 features a layer.

    k and k_cls: one number, or one a layer. Every bias is non-zero, thresholds differ, and some places stay unused.
    """

    def make(clip, seed=0, k=8, k_cls=None, **architecture):
        layers, width = clip.tower.layers, clip.tower.width
        generator = torch.Generator().manual_seed(seed)
        budgets = [(budget,) * layers if isinstance(budget, int) else budget for budget in (k, k_cls or k)]
        clt = CrossLayerTranscoder(Architecture(layers, width, 64, *budgets, **architecture))
        clt.initialise(generator)
        with torch.no_grad():
            for encoder, decoder in zip(clt.encoders, clt.decoders, strict=True):
                mean = 0.0 if encoder.sparsifier.signed else -1.5
                encoder.bias.normal_(mean=mean, std=0.2, generator=generator)
                decoder.bias.normal_(std=0.2, generator=generator)
                for name, tensor in encoder.sparsifier.state_dict().items():
                    if name == "log_threshold":  # thresholds between 0.05 and 0.5
                        tensor.uniform_(-3, -0.7, generator=generator)
                    else:  # BatchTopK's, for patches and [CLS]
                        tensor.uniform_(0.05, 0.5, generator=generator)
        return clt.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def clt(make_clt, clip):
    return make_clt(clip)


@pytest.fixture(scope="session")
def make_saes():
    """make_saes(clip, seed=0, k=8, k_cls=k, sparsifier="relu_topk") -> random residual SAEs in evaluation mode.

    F and k grow with depth. Every bias is non-zero, thresholds differ, encoders are not the decoders.
    """

    def make(clip, seed=0, k=8, k_cls=None, sparsifier="relu_topk"):
        layers, width = clip.tower.layers - 1, clip.tower.width
        features = tuple(48 + 16 * layer for layer in range(layers))
        budgets = (tuple(budget + layer for layer in range(layers)) for budget in (k, k_cls or k))
        saes, generator = ResidualSaes(SaeArchitecture(width, features, *budgets, sparsifier)), torch.Generator()
        generator.manual_seed(seed)
        saes.initialise(generator)
        with torch.no_grad():
            for encoder, decoder in zip(saes.encoders, saes.decoders, strict=True):
                encoder.weight.add_(0.1 * torch.randn(encoder.weight.shape, generator=generator))
                encoder.bias.normal_(std=0.2, generator=generator)
                decoder.bias.normal_(std=0.2, generator=generator)
                for name, tensor in encoder.sparsifier.state_dict().items():
                    if name == "log_threshold":  # thresholds between 0.05 and 1
                        tensor.uniform_(-3, 0, generator=generator)
                    else:  # BatchTopK's, for patches and [CLS]
                        tensor.uniform_(0.05, 1, generator=generator)
        return saes.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def make_pixels():
    """make_pixels(count, size=(32, 32), seed=0) -> random normalised pixels [count, 3, *size]."""

    def make(count, size=(32, 32), seed=0):
        return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def cls_mean(clip, make_pixels):
    """Mean [CLS] output of every MLP [L, d]."""
    return clip.tower(make_pixels(16, seed=99)).mlp_out[:, :, 0].mean(1)


@pytest.fixture(scope="session")
def graph(clip, clt, cls_mean):
    """The fused vision graph, in torch."""
    return AttributionGraph(clip.tower, clt, cls_mean, torch.float32).eval()


@pytest.fixture(scope="session")
def provenance(recipe):
    return Provenance(
        name="tiny",
        description="A CLIP with random weights, for tests.",
        labels=recipe.data.labels,
        templates=recipe.data.templates,
        data=Data(name="drawn shapes", licence="CC0-1.0", train_images=48, val_images=12),
        recipe=RECIPE,
        metrics=Metrics(r2=0.75, cosine=0.875),
        licence="Apache-2.0",
    )


@pytest.fixture(scope="session")
def draw():
    """draw(mode="RGB", size=(50, 40), seed=0) -> a picture with structure: noise over a gradient."""

    def make(mode="RGB", size=(50, 40), seed=0):
        width, height = size
        noise = np.random.default_rng(seed).integers(0, 100, (height, width, 3))
        noise += np.linspace(0, 155, width).astype(int)[None, :, None]
        return Image.fromarray(noise.astype(np.uint8)).convert(mode)

    return make


@pytest.fixture(scope="session")
def encode():
    """encode(image, "PNG", **options of Pillow's writer) -> the bytes of an image file."""

    def write(image, format="PNG", **options):
        buffer = io.BytesIO()
        if format == "HEIF":  # the product reads it, with a package that cannot write it
            pillow_heif.from_pillow(image).save(buffer, **options)
        else:
            image.save(buffer, format, **options)
        return buffer.getvalue()

    return write


@pytest.fixture(scope="session")
def picture(draw, encode):
    """picture(format="PNG", mode="RGB", size=(50, 40), seed=0, **options of the writer) -> bytes of an image file."""

    def make(format="PNG", mode="RGB", size=(50, 40), seed=0, **options):
        return encode(draw(mode, size, seed), format, **options)

    return make


@pytest.fixture(scope="session")
def conversions(tmp_path_factory):
    """`with conversions.remembered():` nothing is converted to ONNX that was converted so before in this run."""
    return Conversions(shared_folder(tmp_path_factory))


@pytest.fixture
def remembered_conversions(conversions):
    """A test's exports convert nothing that was converted so before in this run."""
    with conversions.remembered():
        yield


@pytest.fixture(scope="session")
def bundles(conversions, clip, clt, make_clt, cls_mean, provenance, make_pixels, residual_export):
    """bundles[name] -> an exported and opened bundle, made once a run: see `Bundles`."""

    def of_clt(clt, *tables, **more):
        return lambda out: export_bundle(clip, clt, cls_mean, provenance, out, *tables, **more)

    of_none = replace(provenance, name="plain", data=None, recipe="", metrics=Metrics())
    makers = {
        "tiny": of_clt(clt, calibration=[make_pixels(4, seed=11)], replacement=True, sources=True, rerun=True),
        "plain": lambda out: export_bundle(clip, None, None, of_none, out, sources=True, rerun=True),
    }
    for variant in EXPORTED:
        tables = "float16" if variant == "jumprelu" else "float32"
        makers[variant] = of_clt(make_clt(clip, seed=1, **CLT_VARIANTS[variant]), tables)
    made = Bundles(conversions, makers)
    makers["residual"] = lambda out: add_residual(made["tiny"], clip, residual_export, out)
    return made


@pytest.fixture(scope="session")
def bundle(bundles):
    """The exported and opened bundle of `clip` and `clt`, with the replacement graph, source accounts, interventions
    and the average of four images."""
    return bundles["tiny"]


@pytest.fixture(scope="session")
def plain_bundle(bundles):
    """The exported and opened bundle of `clip` without a CLT, with source accounts and interventions."""
    return bundles["plain"]


@pytest.fixture(scope="session")
def residual_export(clip, make_saes):
    """Random residual SAEs of `clip`, as they are to be exported."""
    data = Data(name="drawn shapes", licence="CC0-1.0", train_images=48, val_images=12)
    return ResidualExport(make_saes(clip, k_cls=5), data, 'kind = "residual_sae"', Metrics(r2=0.875))


@pytest.fixture(scope="session")
def with_residual(bundles):
    """`bundle` with residual SAEs."""
    return bundles["residual"]


@pytest.fixture(scope="session")
def checkpoint(recipe, clip, clt, cls_mean, tmp_path_factory):
    """A finished run's checkpoint of `clt`, from which `bundle` was exported."""
    meta = CheckpointMeta(
        step=24, steps=24, recipe=recipe, clip_sha256=clip.sha256, layers=3, width=32, labels=recipe.data.labels
    )
    out = tmp_path_factory.mktemp("run")
    return save_checkpoint(out, meta, clt, {"out_mean_cls": cls_mean}, {"step": torch.zeros(1)})


@pytest.fixture(scope="session")
def carded(checkpoint, bundle, clip, data_root, tmp_path_factory):
    """`bundle` with cards and thumbnails. Label thresholds are off, so that features of random weights get labels."""
    return _with_cards(clip, checkpoint, bundle, data_root, tmp_path_factory.mktemp("carded") / "tiny")


def _with_cards(clip, checkpoint, bundle, data_root, out):
    options = Options(exemplars=4, shown=3, references=40, workers=0)
    with pytest.MonkeyPatch.context() as patch:
        for name, threshold in (("PRECISION", 0.0), ("MIN_LABELS", 0), ("RANDOM_QUANTILE", 0.0)):
            patch.setattr(labels, name, threshold)
        patch.setattr(labels, "chance", lambda fires, words: np.zeros(fires.shape[1]))
        return build_cards(clip, checkpoint, bundle, data_root, out, options, Console(quiet=True))


@pytest.fixture(scope="session")
def sae_checkpoint(recipe, clip, residual_export, tmp_path_factory):
    """A finished run's checkpoint of the residual SAEs that `with_residual` has."""
    sizes = {"features": (48, 64), "k": (8, 9), "k_cls": (5, 6)}
    of_saes = ResidualSaeRecipe(
        kind="residual_sae", name="tiny-sae", clip=recipe.clip, data=recipe.data, residual_sae=sizes
    )
    meta = CheckpointMeta(
        step=1, steps=1, recipe=of_saes, clip_sha256=clip.sha256, layers=3, width=32, train_images=48, val_images=12
    )
    return save_checkpoint(tmp_path_factory.mktemp("run"), meta, residual_export.saes, {}, {"step": torch.zeros(1)})


@pytest.fixture(scope="session")
def carded_residual(sae_checkpoint, with_residual, clip, data_root, tmp_path_factory):
    """`with_residual` with cards of its SAEs' features, made as those of `carded`; the CLT's features have none."""
    return _with_cards(clip, sae_checkpoint, with_residual, data_root, tmp_path_factory.mktemp("carded") / "tiny")


# A CLT of every sparsifier, cross-layer and per-layer, with budgets that differ by layer and token type.
CLT_VARIANTS = {
    "relu_topk": {"sparsifier": "relu_topk", "k": (8, 6, 4), "k_cls": (2, 5, 9)},
    "abs_topk": {"sparsifier": "abs_topk", "k": 8, "k_cls": (7, 2, 5)},
    "jumprelu": {"sparsifier": "jumprelu", "k": (2, 3, 6), "k_cls": (1, 4, 5)},
    "batch_topk": {"sparsifier": "batch_topk", "k": (2, 3, 6), "k_cls": (4, 1, 5)},
    "per-layer relu_topk": {"sparsifier": "relu_topk", "cross_layer": False},
    "per-layer abs_topk": {"sparsifier": "abs_topk", "k_cls": (3, 6, 1), "cross_layer": False},
    "per-layer jumprelu": {"sparsifier": "jumprelu", "cross_layer": False},
    "per-layer batch_topk": {"sparsifier": "batch_topk", "k_cls": (1, 2, 3), "cross_layer": False},
}


@pytest.fixture(scope="session", params=CLT_VARIANTS)
def any_clt(request, make_clt, clip):
    """A CLT for `clip`, of every variant."""
    return make_clt(clip, seed=1, **CLT_VARIANTS[request.param])


EXPORTED = ("relu_topk", "abs_topk", "jumprelu", "batch_topk", "per-layer relu_topk")  # an export takes seconds


@pytest.fixture(scope="session")
def export_variant(bundles, make_clt, clip):
    """export_variant(one of `EXPORTED`) -> its CLT and bundle."""

    @cache
    def export(variant):
        return make_clt(clip, seed=1, **CLT_VARIANTS[variant]), bundles[variant]

    return export


@pytest.fixture(scope="session", params=EXPORTED)
def exported_variant(request, export_variant):
    return export_variant(request.param)


@pytest.fixture(scope="session")
def exported_clt(exported_variant):
    """The CLT that `any_bundle` was exported from: every sparsifier, and per-layer transcoders."""
    return exported_variant[0]


@pytest.fixture(scope="session")
def any_bundle(exported_variant):
    """The exported and opened bundle of `exported_clt`; jumprelu's has float16 tables. Copy it before changing it."""
    return exported_variant[1]


@pytest.fixture(scope="session")
def bundle_path(bundle):
    """The folder of `bundle`; copy it before changing anything in it."""
    return bundle.path


@pytest.fixture(scope="session")
def recipe_path(clip, data_root):
    """A recipe for `clip` and the drawn shapes, relative to `data_root`: 6 steps an epoch, 24 in all."""
    path = data_root / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def recipe(recipe_path):
    return load_recipe(recipe_path)
