"""Load a CLIP by open_clip name and tag, from a hub, or from your own files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.clip.tower import Tower, UnsupportedTower
from vitrine.models.errors import VitrineError
from vitrine.models.images.colour import to_rgb
from vitrine.models.images.decode import TRUSTED
from vitrine.models.images.frame import to_pixels

PREFIXES_WITH_WEIGHTS = ("hf-hub:", "local-dir:")  # open_clip's prefixes for models that include their weights


class ClipError(VitrineError, ValueError):
    """A CLIP cannot be loaded; the message lists the valid choices."""


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


def load_clip(name: str | None, weights: str | None, config: Path | None = None) -> Clip:
    """Load a CLIP with open_clip.

    Args:
        name: open_clip's model name ("ViT-B-32"), or a model that includes its weights ("hf-hub:org/model",
            "local-dir:path"), or None with `config`.
        weights: one of open_clip's tags for that name ("openai", "laion2b_s34b_b79k"), or a checkpoint file; None
            for a model that includes its weights.
        config: a model configuration in open_clip's JSON format, for a CLIP that is not built into open_clip.

    Raises:
        ClipError: an unknown name, tag or file; the message lists the known ones.
        UnsupportedTower: the tower has no exact account.
    """
    if config is not None:
        name = _add_config(config)
    if name is None:
        raise ClipError("name a CLIP: an open_clip model name, or a configuration file")
    if name.startswith(PREFIXES_WITH_WEIGHTS):
        if weights is not None:
            raise ClipError(f"{name} brings its own weights; leave `weights` out")
        model = _create(name)
    else:
        _check_weights(name, weights)
        # OpenAI's weights (and some others) were trained with QuickGELU, which plain model names do not imply.
        quick_gelu = bool((open_clip.get_pretrained_cfg(name, weights) or {}).get("quick_gelu"))
        model = _create(name, pretrained=weights, force_quick_gelu=quick_gelu)
    model.eval().requires_grad_(False)
    if getattr(model, "logit_bias", None) is not None:
        raise UnsupportedTower(f"{name} has a logit bias (sigmoid loss, as SigLIP): no zero-shot softmax")
    return Clip(
        model=model,
        tower=Tower(model.visual),
        tokenizer=open_clip.get_tokenizer(name),
        name=f"local-dir:{Path(name).name}" if name.startswith("local-dir:") else name,  # omit the local path
        weights=Path(weights).name if weights else "its own",
        sha256=model_sha256(model),
        preprocess=open_clip.get_model_preprocess_cfg(model),
    )


def _create(name: str, **options: Any) -> Any:
    """open_clip's `create_model`; its errors (a failed download, weights that do not fit) become `ClipError`."""
    try:
        return open_clip.create_model(name, precision="fp32", **options)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, SafetensorError) as error:
        reason = str(error) or "its parts do not fit together"
        raise ClipError(f"open_clip cannot load {name}: {reason}") from error


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
        raise ClipError(f"CLIP configuration {config} lacks {', '.join(sorted(missing))}")
    open_clip.add_model_config(config)
    return config.stem


def _check_weights(name: str, weights: str | None) -> None:
    """Raise `ClipError` unless `name` is an open_clip model and `weights` a file or one of its tags."""
    if name not in open_clip.list_models():
        raise ClipError(f"open_clip knows no model {name!r}; see `open_clip.list_models()`")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None or not (Path(weights).is_file() or weights in tags):
        choices = f"tags for {name}: {', '.join(tags)}" if tags else f"{name} has no published weights"
        raise ClipError(f"weights {weights!r} are neither a file nor a tag of open_clip's; {choices}")


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
