"""Load a CLIP by open_clip name and tag, from a hub, or from your own files."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.clip.errors import ClipError
from vitrine.models.clip.fitting import TWIN, decide_quick_gelu, fit
from vitrine.models.clip.published import check_folder, fetch_model, fetch_tag
from vitrine.models.clip.tower import Tower, UnsupportedTower
from vitrine.models.clip.weights import read_weights
from vitrine.models.images.colour import to_rgb
from vitrine.models.images.decode import TRUSTED
from vitrine.models.images.frame import to_pixels

PREFIXES_WITH_WEIGHTS = ("hf-hub:", "local-dir:")  # open_clip's prefixes for models that include their weights


_FAILURES = (  # of open_clip, where a configuration or weights are not what it expects, and of what it reads them with
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    ImportError,
    EOFError,
    SafetensorError,
    UnpicklingError,
)


@dataclass(frozen=True)
class Transform:
    """PIL image -> normalised pixels [3, H, W], as the service makes them and open_clip's evaluation transform does."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image) -> Tensor:
        """Raises `ImageError` for an image that is no picture, or too elongated to be resized."""
        rgb = image if image.mode == "RGB" else to_rgb(image)[0]
        return torch.from_numpy(to_pixels(rgb, self.preprocessing, TRUSTED))


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP in evaluation mode, float32, with its identity, tokenizer and preprocessing."""

    model: Any  # open_clip's CLIP, a torch module
    tower: Tower
    tokenizer: Any  # open_clip's tokenizer; texts -> tokens [N, context]
    name: str  # open_clip's model name
    weights: str  # open_clip's tag, or the file name
    sha256: str  # `model_sha256`, so that a CLT is only ever used with its own CLIP
    preprocess: dict[str, Any]  # open_clip's PreprocessCfg as a dict: size, mean, std, interpolation, resize_mode

    @property
    def logit_scale(self) -> float:
        """s in logit = s * <image, text>."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def context(self) -> int:
        """Tokens per text."""
        return int(self.tokenizer.context_length)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared, as a bundle's manifest says it. Raises `ClipError` if the service cannot do that."""
        size = self.preprocess["size"]
        try:
            return Preprocessing(
                size=(size, size) if isinstance(size, int) else tuple(size),
                mean=tuple(self.preprocess["mean"]),
                std=tuple(self.preprocess["std"]),
                interpolation=self.preprocess["interpolation"],
                resize_mode=self.preprocess["resize_mode"],
            )
        except ValidationError as error:
            problems = "; ".join(problem["msg"] for problem in error.errors())
            raise ClipError(f"the service cannot prepare images as {self.name} needs them: {problems}") from error

    def transform(self) -> Transform:
        """Raises `ClipError` as `preprocessing` does."""
        return Transform(self.preprocessing)

    @torch.no_grad()
    def encode_labels(
        self, labels: list[str], templates: list[str], track: Callable[[list[str]], Iterable[str]] = iter
    ) -> Tensor:
        """Unit label embeddings [labels, D]: templates encoded, averaged and renormalised as CLIP does.

        track: yields the labels, and may show progress.
        """
        rows = []
        for label in track(labels):
            tokens = self.tokenizer([template.replace("{}", label) for template in templates])
            tokens = tokens.to(self.model.logit_scale.device)
            mean = self.model.encode_text(tokens, normalize=True).mean(dim=0)
            rows.append(mean / mean.norm())
        return torch.stack(rows)


def load_clip(
    name: str | None, weights: str | None, config: Path | None = None, quick_gelu: bool | None = None
) -> Clip:
    """Load a CLIP with open_clip.

    Args:
        name: open_clip's model name ("ViT-B-32"), or a model that includes its weights ("hf-hub:org/model",
            "local-dir:path"), or None with `config`.
        weights: one of open_clip's tags for that name ("openai", "laion2b_s34b_b79k"), or a file, of any kind that
            `read_weights` reads; None for a model that includes its weights.
        config: a model configuration in open_clip's JSON format, for a CLIP that is not built into open_clip.
        quick_gelu: whether weights from a file were trained with QuickGELU, where neither they nor the name say it.

    Raises:
        ClipError: an unknown name, tag or file (the message lists the known ones), weights that cannot be had or do
            not fit, or of which nothing says whether they need GELU or QuickGELU.
        UnsupportedTower: the tower has no exact account.
    """
    if config is not None:
        name = _add_config(config)
    if name is None:
        raise ClipError("no CLIP is given: set the name of an open_clip model, or a configuration file")
    if name.startswith(PREFIXES_WITH_WEIGHTS):
        if weights is not None or quick_gelu is not None:
            raise ClipError(f"{name} has its own weights; omit `weights` and `quick_gelu`")
        model = _own_weights(name)
    elif weights in _tags(name):
        model = _published(name, str(weights), quick_gelu)
    else:
        model, name = _from_file(name, _check_file(name, weights), quick_gelu, config is None)
    model.eval().requires_grad_(False)
    if getattr(model, "logit_bias", None) is not None:
        raise UnsupportedTower(
            f"{name} has a logit bias (sigmoid loss, like SigLIP), so it has no zero-shot softmax; choose another CLIP"
        )
    return Clip(
        model=model,
        tower=Tower(model.visual),
        tokenizer=_tokenizer(name),
        name=f"local-dir:{Path(name).name}" if name.startswith("local-dir:") else name,  # omit the local path
        weights=Path(weights).name if weights else "its own",
        sha256=model_sha256(model),
        preprocess=open_clip.get_model_preprocess_cfg(model),
    )


def _own_weights(name: str) -> Any:
    """The model of a hub, or of a folder."""
    if name.startswith("hf-hub:"):
        return _create(f"local-dir:{fetch_model(name)}", name, require_pretrained=True)
    try:
        return _create(name, name, require_pretrained=True)
    except ClipError:
        check_folder(Path(name.removeprefix("local-dir:")))  # which may know better why
        raise


def _published(name: str, tag: str, quick_gelu: bool | None) -> Any:
    """The model with weights of a tag, and with the activation that they were trained with."""
    published = open_clip.get_pretrained_cfg(name, tag)
    # OpenAI's weights (and some others) were trained with QuickGELU, which plain model names do not imply.
    trained = bool(published.get("quick_gelu"))
    if quick_gelu not in (None, trained):
        raise ClipError(f"{name} {tag} was trained with {'QuickGELU' if trained else 'GELU'}; omit `quick_gelu`")
    of = f"{name} {tag}"
    weights = str(fetch_tag(of, published)) if published.get("hf_hub") else tag
    preprocess = {key: value for key, value in published.items() if key != "size"}  # which is the model's
    return _create(name, of, pretrained=weights, force_quick_gelu=trained, force_preprocess_cfg=preprocess)


def _from_file(name: str, file: Path, quick_gelu: bool | None, is_built_in: bool) -> tuple[Any, str]:
    """(the model with a file's weights, the name of the configuration that it has with their activation)."""
    weights = read_weights(file)
    quick = decide_quick_gelu(name, file, weights, quick_gelu, is_built_in)
    with _without_warnings():  # that it is random, until the next line but one
        model = _create(name, name, quick_gelu=quick, load_weights=False, pretrained_text=False)
    fit(model, name, file, weights.state)
    has_twin = is_built_in and quick and name + TWIN in open_clip.list_models()
    return model, name + TWIN if has_twin else name


@contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _create(name: str, shown: str, **options: Any) -> Any:
    """open_clip's `create_model`; its errors (a configuration that is none, weights that do not fit) become
    `ClipError`, with the name as it is shown."""
    try:
        return open_clip.create_model(name, precision="fp32", **options)
    except _FAILURES as error:
        raise ClipError(f"open_clip cannot load {shown}: {_short(error)}") from error


def _tokenizer(name: str) -> Any:
    """open_clip's tokenizer. Raises `ClipError`, as for one that needs a package or a hub."""
    try:
        return open_clip.get_tokenizer(name)
    except _FAILURES as error:
        raise ClipError(f"open_clip cannot load the tokenizer of {name}: {_short(error)}") from error


def _short(error: Exception) -> str:
    """A message in one line: torch's names thousands of weights, a line each."""
    if isinstance(error, ModuleNotFoundError):
        return f"it needs {error.name}, which is not installed: `pip install {error.name}`"
    lines = [line for line in map(str.strip, str(error).splitlines()) if line]
    rest = f"; and {len(lines) - 3:,} more lines" if len(lines) > 3 else ""
    return "; ".join(lines[:3]).replace(":;", ":") + rest if lines else "its parts do not fit together"


def _add_config(config: Path) -> str:
    """Register a configuration file with open_clip; return the model's name."""
    if not config.is_file():
        raise ClipError(f"CLIP configuration {config} does not exist")
    try:
        fields = json.loads(config.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ClipError(f"CLIP configuration {config} is not JSON: {error}") from error
    keys = set(fields) if isinstance(fields, dict) else set()
    if missing := {"embed_dim", "vision_cfg", "text_cfg"} - keys:
        raise ClipError(f"CLIP configuration {config} does not have {', '.join(sorted(missing))}")
    open_clip.add_model_config(config)
    return config.stem


def _tags(name: str) -> list[str]:
    """open_clip's tags for a model. Raises `ClipError` for an unknown one."""
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), 1)
        hint = f"did you mean {near[0]}?" if near else "see `open_clip.list_models()`"
        raise ClipError(f"open_clip has no model named {name!r}; {hint}")
    return list(open_clip.list_pretrained_tags_by_model(name))


def _check_file(name: str, weights: str | None) -> Path:
    """The file of weights that are no tag. Raises `ClipError` if there is none."""
    if weights is not None and Path(weights).is_file():
        return Path(weights)
    tags = _tags(name)
    choices = f"tags for {name}: {', '.join(tags)}" if tags else f"{name} has no published weights, so give a file"
    if weights is None:
        raise ClipError(f"{name} needs `weights`: one of open_clip's tags, or a file; {choices}")
    raise ClipError(f"weights {weights!r} are neither a file nor one of open_clip's tags; {choices}")


def model_sha256(model: nn.Module) -> str:
    """Digest of what a model computes: the type, heads and eps of every module, the name and bytes of every weight."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        options = [getattr(module, option, None) for option in ("num_heads", "eps")]
        digest.update(f"{name} {type(module).__name__} {options}\n".encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
