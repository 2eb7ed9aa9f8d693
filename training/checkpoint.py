"""Checkpoints: weights as safetensors beside one JSON file, written atomically.

<out>/step-00001500/clt.safetensors     the CLT on raw activations, read by evaluation and export; of residual SAEs
                                        residual_sae.safetensors
                    state.safetensors   for resuming: normalised weights, Adam's moments, normalisation, silent features
                    checkpoint.json     recipe, step, CLIP, metrics
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitrine.models.bundle.manifest import Metrics
from vitrine.models.clip.loading import Clip, load_clip
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.errors import VitrineError
from vitrine.models.files.names import check_name, printable
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import move_folder, write_text
from vitrine.training.recipes.recipe import AnyRecipe, CltRecipe, ResidualSaeRecipe

FORMAT = 2  # 1: the CLT in four tensors
META = "checkpoint.json"  # written last
CHECKPOINTS_KEPT = 2  # checkpoints kept per run; older ones are removed


class CheckpointError(VitrineError, ValueError):
    """A checkpoint cannot be read or does not belong to this run; the message says why."""


class CheckpointMeta(BaseModel):
    """checkpoint.json."""

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    step: int
    steps: int
    recipe: AnyRecipe
    clip_sha256: str
    layers: int
    width: int
    labels: tuple[str, ...] = ()  # from the recipe, or else from the data set
    train_images: int = 0
    val_images: int = 0
    broken: dict[str, str] = {}  # images that could not be read, and why
    metrics: Metrics = Metrics()  # on val, once the run is done


def save_checkpoint(
    out: Path, meta: CheckpointMeta, dictionary: nn.Module, extras: dict[str, Tensor], state: dict[str, Tensor]
) -> Path:
    """Write a new `out/step-N` and remove old checkpoints.

    It is written under a temporary name and then moved, so that a kill leaves no incomplete checkpoint. Raises
    `FileError` if it cannot be written; the old checkpoints are still there then.
    """
    target = out / f"step-{meta.step:08d}"
    partial = out / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a kill
    if not (target / META).exists():
        shutil.rmtree(target, ignore_errors=True)  # left by a kill where folders are moved file by file
    try:
        with naming(target):
            partial.mkdir(parents=True)
            tensors = {k: v.contiguous() for k, v in dictionary.state_dict().items()}
            save_file({**tensors, **extras}, weights_file(partial, meta))
            save_file({k: v.contiguous() for k, v in state.items()}, partial / "state.safetensors")
            write_meta(partial, meta)
            move_folder(partial, target, last=META)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints(out)[:-CHECKPOINTS_KEPT]:
        (old / META).unlink(missing_ok=True)  # first: what is left by a kill, or cannot be removed, is no checkpoint
        shutil.rmtree(old, ignore_errors=True)
    return target


def weights_file(checkpoint: Path, meta: CheckpointMeta) -> Path:
    """The dictionary's weights."""
    return checkpoint / f"{meta.recipe.kind}.safetensors"


def write_meta(checkpoint: Path, meta: CheckpointMeta) -> None:
    """Write checkpoint.json, replacing it atomically."""
    write_text(checkpoint / META, meta.model_dump_json(indent=2))


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob("step-*") if (path / META).is_file())


def latest(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest under it. Raises `CheckpointError` if there is none."""
    check_name(path)
    if (path / META).is_file():
        return path
    if saved := checkpoints(path):
        return saved[-1]
    raise CheckpointError(f"no checkpoint in {path}: it has no step-*/checkpoint.json; give the folder of a run")


def read_meta(checkpoint: Path) -> CheckpointMeta:
    """Read and validate checkpoint.json; the format is checked first, as other formats have other fields."""
    text = (checkpoint / META).read_bytes()
    try:
        version = _Format.model_validate_json(text).format
        if version != FORMAT:
            raise CheckpointError(f"{checkpoint} has format {version}; this version reads {FORMAT}")
        return CheckpointMeta.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint}/checkpoint.json was not written by Vitrine: {first_problem(error)}"
        ) from error


def first_problem(error: ValidationError) -> str:
    """Where a file is wrong, and how; there may be thousands more."""
    first = error.errors(include_url=False)[0]
    location = ".".join(map(str, first["loc"]))
    return printable(f"{location + ': ' if location else ''}{first['msg']}")


def load_clip_of(recipe: AnyRecipe, data_root: Path) -> Clip:
    """The recipe's CLIP; its weights are a file under the data root if one of that name exists, else a tag."""
    clip = recipe.clip
    config = data_root / clip.config if clip.config else None
    weights = clip.weights
    if weights and (data_root / weights).is_file():
        weights = str(data_root / weights)
    return load_clip(clip.name, weights, config, clip.quick_gelu)


def check_clip(checkpoint: Path, meta: CheckpointMeta, clip: Clip) -> None:
    """Raise `CheckpointError` unless the checkpoint was trained on this CLIP."""
    if clip.sha256 != meta.clip_sha256:
        raise CheckpointError(
            f"{checkpoint} was trained on a CLIP whose weights differ from {clip.name} {clip.weights}"
        )


class _Format(BaseModel):
    format: int


def clt_recipe(checkpoint: Path, meta: CheckpointMeta) -> CltRecipe:
    """The recipe of a CLT's checkpoint. Raises `CheckpointError` if it is of residual SAEs."""
    if isinstance(meta.recipe, CltRecipe):
        return meta.recipe
    raise CheckpointError(
        f"{checkpoint} has residual SAEs, but a Cross-Layer Transcoder is needed here: give a checkpoint of a recipe "
        f'of kind = "clt"'
    )


def load_clt(checkpoint: Path) -> tuple[CrossLayerTranscoder, Tensor, CheckpointMeta]:
    """(CLT on raw activations, mean [CLS] output [L, d], metadata). Raises `CheckpointError` if it is of another
    kind."""
    meta = read_meta(checkpoint)
    recipe = clt_recipe(checkpoint, meta)
    tensors = load_tensors(weights_file(checkpoint, meta))
    out_mean_cls = tensors.pop("out_mean_cls")
    clt = CrossLayerTranscoder(recipe.clt.architecture(meta.layers, meta.width))
    clt.load_state_dict(tensors)
    return clt.eval().requires_grad_(False), out_mean_cls, meta


def load_residual_saes(checkpoint: Path) -> tuple[ResidualSaes, CheckpointMeta]:
    """(the SAEs, metadata). Raises `CheckpointError` if it is of another kind."""
    meta = read_meta(checkpoint)
    if not isinstance(meta.recipe, ResidualSaeRecipe):
        raise CheckpointError(
            f"{checkpoint} has a Cross-Layer Transcoder, but residual SAEs are needed here: give a checkpoint of a "
            f'recipe of kind = "residual_sae"'
        )
    saes = ResidualSaes(meta.recipe.residual_sae.architecture(meta.layers, meta.width))
    saes.load_state_dict(load_tensors(weights_file(checkpoint, meta)))
    return saes.eval().requires_grad_(False), meta


def section(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with `name.`, with that prefix removed."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises `CheckpointError` if that fails."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
