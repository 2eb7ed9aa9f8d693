"""The size of a CLIP, from open_clip's model configuration: neither weights nor torch are loaded.

The counts are valid for the towers that `models.clip.tower.Tower` accepts, with a plain text transformer.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vitrine.models.errors import VitrineError
from vitrine.training.recipes.recipe import ClipSection


class UnknownShape(VitrineError, ValueError):
    """The CLIP's configuration cannot be read; the message says why."""


@dataclass(frozen=True)
class ClipShape:
    """Dimensions of the vision tower, and parameter counts."""

    layers: int
    width: int  # d
    hidden: int  # width of an MLP's hidden layer
    tokens: int  # T per image, [CLS] included
    embedding: int  # D
    patch_inputs: int  # numbers in one patch
    parameters: int  # both towers
    vision_parameters: int

    @property
    def attention_projections(self) -> int:
        """FLOPs per image in the four linear maps of all attention layers."""
        return self.layers * 2 * self.tokens * 4 * self.width**2

    @property
    def attention_products(self) -> int:
        """FLOPs per image in queries times keys and attention weights times values."""
        return self.layers * 4 * self.tokens**2 * self.width

    @property
    def forward(self) -> int:
        """FLOPs per image of the vision tower; a multiplication and an addition count as two."""
        mlps = self.layers * 2 * self.tokens * 2 * self.width * self.hidden
        ends = 2 * (self.tokens - 1) * self.patch_inputs * self.width + 2 * self.width * self.embedding
        return ends + self.attention_projections + self.attention_products + mlps


def clip_shape(clip: ClipSection, data_root: Path) -> ClipShape:
    """The shape of a recipe's CLIP. Raises `UnknownShape`: a hub model, no such name or file, not a plain ViT."""
    if clip.config is not None:
        return _shape(_read(data_root / clip.config), clip.config)
    name = str(clip.name)
    if ":" in name:
        raise UnknownShape(f"{name} has its own configuration, which is read only when the CLIP is loaded")
    configurations = {path.stem: path for path in _open_clip_configurations()}
    if name not in configurations:
        near = difflib.get_close_matches(name, configurations, n=1)
        raise UnknownShape(f"open_clip has no model named {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return _shape(_read(configurations[name]), name)


def _open_clip_configurations() -> list[Path]:
    """open_clip's configuration files, located without importing it (which would load torch)."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    return sorted((Path(spec.origin).parent / "model_configs").glob("*.json"))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UnknownShape(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UnknownShape(f"{path} cannot be read: {error}") from error


def _shape(configuration: Any, name: str) -> ClipShape:
    try:
        return _count(configuration["embed_dim"], configuration["vision_cfg"], configuration["text_cfg"])
    except (KeyError, TypeError) as error:
        raise UnknownShape(f"{name} is not a plain Vision Transformer with a plain text tower ({error})") from error


def _count(embedding: int, vision: dict[str, Any], text: dict[str, Any]) -> ClipShape:
    image, patch = _pair(vision["image_size"]), _pair(vision["patch_size"])
    width, layers, tokens = vision["width"], vision["layers"], 1 + (image[0] // patch[0]) * (image[1] // patch[1])
    hidden, patch_inputs = int(width * vision.get("mlp_ratio", 4.0)), 3 * patch[0] * patch[1]
    ends = patch_inputs * width + width + tokens * width + 4 * width + width * embedding
    vision_parameters = ends + layers * _block(width, hidden)
    words, text_hidden = text["width"], int(text["width"] * text.get("mlp_ratio", 4.0))
    text_ends = (text["vocab_size"] + text["context_length"]) * words + 2 * words + words * embedding
    parameters = vision_parameters + text_ends + text["layers"] * _block(words, text_hidden) + 1  # the logit scale
    return ClipShape(layers, width, hidden, tokens, embedding, patch_inputs, parameters, vision_parameters)


def _block(width: int, hidden: int) -> int:
    """Parameters of one residual block: two LayerNorms, four attention maps and the MLP, all with biases."""
    return 4 * width + 4 * (width**2 + width) + 2 * width * hidden + hidden + width


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list) else (size, size)
    return int(height), int(width)
