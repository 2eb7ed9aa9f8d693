"""The estimated cost of a recipe: parameters, memory, FLOPs, bytes moved, hours on specific GPUs.

The estimates are computed by counting, without running anything:

- memory: float32 weights, gradients and Adam's two moments; CLIP's weights; the tensors that a step holds at once;
  the mixing buffer. Allocator overhead and workspaces are not counted.
- work: each part of a step has FLOPs and bytes, and takes max(FLOPs / peak, bytes / bandwidth) with the GPU's
  data-sheet peaks (the roofline model), both scaled by an assumed, not measured, `share`. CLIP and the product that
  finds the active features are dense; all else in a dictionary gathers and sums rows and is bandwidth-bound. A row
  counts as read each time it is used; caches make that cheaper.
- not counted: image decoding, disk reads, the final evaluation, start-up, the loss of SAEs' dead features.

N tokens per step, L layers, F features of a layer, d width, K places of a code (`models.dictionary.sparsify`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from vitrine.models.dictionary.architecture import Architecture, SaeArchitecture
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.folder import walk
from vitrine.models.inputs.skipped import Skipped
from vitrine.training.recipes.clip_shape import ClipShape, clip_shape
from vitrine.training.recipes.image_sources import FolderSource, HuggingFaceSource, Source, TorchvisionSource
from vitrine.training.recipes.recipe import CascadeSection, CltRecipe, ResidualSaeRecipe

AnyArchitecture = Architecture | SaeArchitecture
Matmul = Literal["bf16", "tf32", "fp32"]
GIB = 1024**3
FLOAT = 4  # bytes of a float32

# Number of images by split of the data sets that recipes use; from their papers and data-set cards.
KNOWN_IMAGES = {
    "CIFAR10": {"train": 50_000, "val": 10_000},
    "CIFAR100": {"train": 50_000, "val": 10_000},
    "uoft-cs/cifar10": {"train": 50_000, "test": 10_000},
    "clane9/imagenet-100": {"train": 126_689, "validation": 5_000},
    "detection-datasets/coco": {"train": 118_287, "val": 5_000},  # COCO 2017's; this copy may have slightly fewer
}

# Bytes per place of a code in a step: feature 8, pre-activation 4, activation 4, the gradients of both 8, the token 8,
# and place, token and activation sorted by feature 20.
BYTES_PER_PLACE = 52
# Number of [L, N, d] tensors that a step holds at its peak: CLIP's two, the same normalised, outputs, a layer's
# products before they are summed (at most one such tensor in total), the error and its gradient, the outputs' gradient.
STEP_TENSORS = 9
# The same of SAEs: streams, standardised, outputs twice (by layer, and stacked), what they miss, two gradients.
SAE_STEP_TENSORS = 7
# Vectors of size d that one block of the tower reads and writes per token: norms, projections, GELU, residuals.
BLOCK_TRAFFIC = 34
# Reads and writes of each parameter in an optimiser step: gradient norm 1, clipping 2, fused Adam 7.
OPTIMISER_TRAFFIC = 10


@dataclass(frozen=True)
class Gpu:
    """Data-sheet peaks of one GPU, without sparsity."""

    name: str
    bf16: float  # TFLOP/s, tensor cores
    tf32: float  # TFLOP/s, tensor cores
    fp32: float  # TFLOP/s, outside the tensor cores
    bandwidth: float  # TB/s
    memory: float  # GiB


GPUS = (
    Gpu("H200", 989, 494, 67, 4.8, 141),  # NVIDIA H200 data sheet, SXM
    Gpu("H100", 989, 494, 67, 3.35, 80),  # NVIDIA H100 data sheet, SXM
    Gpu("A100", 312, 156, 19.5, 2.039, 80),  # NVIDIA A100 data sheet, 80 GB SXM
    Gpu("L4", 121, 60, 30.3, 0.3, 24),  # NVIDIA L4 data sheet
    Gpu("RTX 4090", 165.2, 82.6, 82.6, 1.008, 24),  # NVIDIA Ada GPU architecture, appendix A; FP32 accumulation
)


class Work(NamedTuple):
    """One part of a step."""

    name: str
    flops: float
    bytes: float
    dense: bool  # matrix products on tensor cores; otherwise float32

    def seconds(self, gpu: Gpu, matmul: Matmul, share: float) -> float:
        """Duration by the roofline model."""
        peak = getattr(gpu, matmul) if self.dense else gpu.fp32
        return max(self.flops / (peak * 1e12), self.bytes / (gpu.bandwidth * 1e12)) / share


class Phase(NamedTuple):
    """A number of identical steps."""

    name: str
    steps: int
    work: tuple[Work, ...]  # of one step

    @property
    def flops(self) -> float:
        return self.steps * sum(part.flops for part in self.work)

    @property
    def bytes(self) -> float:
        return self.steps * sum(part.bytes for part in self.work)

    def seconds(self, gpu: Gpu, matmul: Matmul, share: float) -> float:
        return self.steps * sum(part.seconds(gpu, matmul, share) for part in self.work)


@dataclass(frozen=True)
class Costs:
    """The estimate. Values that depend on the number of images are None if that is unknown."""

    architecture: AnyArchitecture
    clip: ClipShape
    matmul: Matmul  # precision of matrix products under the recipe's `precision`
    images: int | None  # number of training images
    memory: dict[str, int]  # bytes, by purpose
    step: tuple[Work, ...]  # one reconstruction step
    phases: tuple[Phase, ...] | None  # phases of the run
    cache: int | None  # bytes on disk of the recipe's activation cache; 0 for none

    @property
    def total_memory(self) -> int:
        """Total memory in bytes."""
        return sum(self.memory.values())

    @property
    def flops(self) -> float | None:
        """FLOPs of the run."""
        return None if self.phases is None else sum(phase.flops for phase in self.phases)

    @property
    def bytes(self) -> float | None:
        """Bytes that the run moves to and from memory."""
        return None if self.phases is None else sum(phase.bytes for phase in self.phases)

    def fits(self, gpu: Gpu) -> bool:
        return self.total_memory <= gpu.memory * GIB

    def hours(self, gpu: Gpu, share: float, matmul: Matmul | None = None) -> float | None:
        """Duration of the run on one such GPU, at that share of its peaks, whether or not it fits into memory."""
        if self.phases is None:
            return None
        return sum(phase.seconds(gpu, matmul or self.matmul, share) for phase in self.phases) / 3600


def estimate(recipe: CltRecipe | ResidualSaeRecipe, data_root: Path) -> Costs:
    """The costs of training `recipe`. Raises `UnknownShape` if its CLIP's configuration cannot be read, and
    `RecipeError` if its k is given for another number of layers."""
    settings = recipe.training
    clip = clip_shape(recipe.clip, data_root)
    architecture = recipe.dictionary.architecture(clip.layers, clip.width)
    images = count_images(recipe.data.train, data_root)
    step = (
        _tower(clip, settings.images_per_step),
        *dictionary_work(architecture, settings.images_per_step * clip.tokens, settings.images_per_step),
        _optimiser(architecture),
    )
    return Costs(
        architecture=architecture,
        clip=clip,
        matmul="bf16" if settings.precision == "bf16-mixed" else "fp32",
        images=images,
        memory=_memory(recipe, architecture, clip),
        step=step,
        phases=None if images is None else tuple(_phases(recipe, images, clip, architecture, step)),
        cache=None if images is None else cache_bytes(images, architecture, clip, settings.cache),
    )


def _phases(
    recipe: CltRecipe | ResidualSaeRecipe,
    images: int,
    clip: ClipShape,
    architecture: AnyArchitecture,
    step: tuple[Work, ...],
) -> Iterator[Phase]:
    settings = recipe.training
    steps = images // settings.images_per_step
    sampled = min(images, settings.normalisation_images) // settings.images_per_step
    yield Phase("normalisation", max(1, sampled), step[:1])
    if settings.cache == "none":
        yield Phase("reconstruction", steps * settings.epochs, step)
    else:
        yield Phase("reconstruction, first epoch", steps, step)
        yield Phase("reconstruction from the cache", steps * (settings.epochs - 1), step[1:])
    if isinstance(recipe, CltRecipe) and isinstance(architecture, Architecture) and recipe.cascade is not None:
        yield Phase("cascade", recipe.cascade.steps, _cascade_step(recipe.cascade, architecture, clip))


def features(architecture: AnyArchitecture) -> tuple[int, ...]:
    """F of each layer."""
    if isinstance(architecture, SaeArchitecture):
        return architecture.features
    return (architecture.features,) * architecture.layers


def writers(architecture: AnyArchitecture) -> list[int]:
    """The source layer of every decoder."""
    if isinstance(architecture, SaeArchitecture):
        return list(range(architecture.layers))
    return [source for target in range(architecture.layers) for source in architecture.sources(target)]


def places(architecture: AnyArchitecture) -> tuple[int, ...]:
    """K of each layer, as in `models.dictionary.sparsify`: twice the budget where k is an average."""
    spare = 2 if architecture.sparsifier in ("jumprelu", "batch_topk") else 1
    layers = zip(features(architecture), architecture.k, architecture.k_cls, strict=True)
    return tuple(min(count, spare * max(k, k_cls)) for count, k, k_cls in layers)


def used_places(architecture: AnyArchitecture, tokens: int, cls: int) -> tuple[int, ...]:
    """Places that the codes of `tokens` tokens, `cls` of them [CLS], use in a step, by layer: what products gather."""
    if architecture.sparsifier == "jumprelu":
        return tuple(tokens * count for count in places(architecture))
    return tuple((tokens - cls) * k + cls * k_cls for k, k_cls in zip(architecture.k, architecture.k_cls, strict=True))


def cache_bytes(
    images: int, architecture: AnyArchitecture, clip: ClipShape, kind: Literal["none", "float32", "bfloat16"]
) -> int:
    """Bytes on disk of what is read and written of every token: a CLT's MLP inputs and outputs, SAEs' streams."""
    size = {"none": 0, "float32": FLOAT, "bfloat16": 2}[kind]
    tables = architecture.layers * (1 if isinstance(architecture, SaeArchitecture) else 2)
    return images * clip.tokens * tables * clip.width * size


def count_images(source: Source, data_root: Path) -> int | None:
    """Number of images of a source: from `KNOWN_IMAGES`, or counted in the folder; None if neither is possible."""
    if isinstance(source, FolderSource):
        try:
            return len(walk(data_root / source.path, Skipped()).images) or None
        except InputError:
            return None
    if isinstance(source, TorchvisionSource):
        return KNOWN_IMAGES.get(source.name, {}).get(source.split)
    if isinstance(source, HuggingFaceSource) and (split := re.fullmatch(r"(\w+)(?:\[:(\d+)\])?", source.split)):
        count = KNOWN_IMAGES.get(source.id, {}).get(split[1])
        return count if count is None or split[2] is None else min(count, int(split[2]))
    return None


def _tower(clip: ClipShape, images: int) -> Work:
    """Forward pass of CLIP's vision tower."""
    traffic = clip.layers * clip.tokens * BLOCK_TRAFFIC * clip.width
    return Work("CLIP", images * clip.forward, FLOAT * (images * traffic + clip.vision_parameters), dense=True)


def dictionary_work(architecture: AnyArchitecture, tokens: int, cls: int) -> tuple[Work, ...]:
    """The dictionary's part of a step over `tokens` tokens, `cls` of them [CLS]: encode and decode, forward and
    backward."""
    width, counts, decoders = architecture.width, features(architecture), writers(architecture)
    output, tables = tokens * width, [count * width for count in counts]
    rows = [used * width for used in used_places(architecture, tokens, cls)]  # gathered from a decoder, by source layer
    writes, written = sum(rows[source] for source in decoders), sum(tables[source] for source in decoders)
    # pre-activations: written once, read twice to select
    encoder = sum(table + output + 3 * tokens * count for table, count in zip(tables, counts, strict=True))
    product = 2 * tokens * sum(tables)
    return (
        Work("find active features", product, FLOAT * encoder, dense=True),
        Work("decode", 2 * writes, FLOAT * (writes + len(decoders) * output), dense=False),
        Work(
            "decode, backward",  # of the activations and of the decoders
            4 * writes,
            FLOAT * (2 * writes + len(decoders) * output + written),
            dense=False,
        ),
        Work("encode, backward", 2 * sum(rows), FLOAT * (sum(rows) + sum(tables)), dense=False),
    )


def _optimiser(architecture: AnyArchitecture) -> Work:
    """Clipping and Adam: about a dozen operations per parameter; memory traffic dominates."""
    parameters = architecture.parameters
    return Work("clip and Adam", 12 * parameters, FLOAT * OPTIMISER_TRAFFIC * parameters, dense=False)


def _cascade_step(cascade: CascadeSection, architecture: Architecture, clip: ClipShape) -> tuple[Work, ...]:
    """CLIP as the teacher; the tower with its MLPs replaced, forward and backward; the CLT on one or both."""
    images = cascade.images_per_step
    teacher, transcoder = _tower(clip, images), dictionary_work(architecture, images * clip.tokens, images)
    # backward, to the inputs only: a linear map costs its forward pass again, a product of two activations twice that
    attention = images * (2 * clip.attention_projections + 3 * clip.attention_products)
    replaced = Work("replaced tower", attention, 3 * teacher.bytes, dense=True)
    inputs = transcoder[-1]._replace(name="encode, backward to the inputs")
    clean = transcoder if cascade.clean_weight else ()
    return (teacher, replaced, *clean, *transcoder, inputs, _optimiser(architecture))


def _memory(recipe: CltRecipe | ResidualSaeRecipe, architecture: AnyArchitecture, clip: ClipShape) -> dict[str, int]:
    settings, weights = recipe.training, FLOAT * architecture.parameters
    mixed = settings.mixed_images if settings.mixed_images > settings.images_per_step else 0
    return {
        "weights": weights,
        "gradients": weights,
        "Adam's moments": 2 * weights,
        "CLIP": FLOAT * clip.parameters,
        "one step's tensors": step_memory(architecture, settings.images_per_step * clip.tokens),
        "mixing buffer": cache_bytes(mixed, architecture, clip, "float32"),
    }


def step_memory(architecture: AnyArchitecture, tokens: int) -> int:
    """Peak bytes of the tensors of a step over `tokens` tokens, without parameters."""
    tensors = SAE_STEP_TENSORS if isinstance(architecture, SaeArchitecture) else STEP_TENSORS
    streams = tensors * FLOAT * architecture.layers * tokens * architecture.width
    codes = BYTES_PER_PLACE * tokens * sum(places(architecture))
    preactivations = 2 * FLOAT * tokens * max(features(architecture))  # one layer's, and the copy used for selection
    return streams + codes + preactivations
