"""Weights put into the CLIP that they are said to be of: its activation, and every tensor in its place, or a refusal.

A file of weights does not say which activation they were trained with: computed with the other one, a CLIP answers
something near, and wrong. So that is known, or said, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from vitrine.models.bundle.sealing import file_sha256
from vitrine.models.clip.errors import ClipError
from vitrine.models.clip.weights import NAMED, Weights, listed
from vitrine.models.files.names import display

TWIN = "-quickgelu"  # what open_clip adds to the name of a configuration to say that it has QuickGELU
_NOT_LEARNT = ("attn_mask", "text.attn_mask", "text.transformer.embeddings.position_ids")  # some files have them
_PUBLISHED = re.compile(
    r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pth?$"
)  # the sha256 that an address has in it, or its beginning


def decide_quick_gelu(name: str, file: Path, weights: Weights, said: bool | None, is_built_in: bool) -> bool:
    """Whether weights from a file are computed with QuickGELU, rather than GELU.

    Args:
        name: open_clip's, of the configuration.
        said: by the user.
        is_built_in: into open_clip, so that the configuration may be of either, rather than the user's own, which has
            GELU where it does not say QuickGELU.

    Raises `ClipError` if nothing tells, or if two tell different things.
    """
    has_twin = is_built_in and name + TWIN in open_clip.list_models()
    in_file = weights.quick_gelu
    if in_file is None and (has_twin or name.endswith(TWIN)):
        in_file = _published(file)
    configured = open_clip.get_model_config(name).get("quick_gelu")
    told = {
        f"{display(file)} has": in_file,
        f"{name} has": configured,
        "`quick_gelu` says": said,
    }
    told = {source: quick_gelu for source, quick_gelu in told.items() if quick_gelu is not None}
    if len(set(told.values())) > 1:
        facts = ", ".join(f"{source} {'QuickGELU' if quick_gelu else 'GELU'}" for source, quick_gelu in told.items())
        raise ClipError(f"{facts}: remove or correct what is wrong")
    if told:
        return next(iter(told.values()))
    if has_twin:
        raise ClipError(
            f"nothing in {display(file)} says whether it was trained with GELU or, like OpenAI's weights, with "
            f"QuickGELU: for QuickGELU give the name {name}{TWIN}, for GELU set quick_gelu = false (--no-quick-gelu)"
        )
    return False


def _published(file: Path) -> bool | None:
    """Whether a published file was trained with QuickGELU; None if it is none that open_clip knows by its sha256."""
    found = file_sha256(file)
    for name, tag in open_clip.list_pretrained():
        published = open_clip.get_pretrained_cfg(name, tag)
        match = _PUBLISHED.search(published.get("url", ""))
        if match and found.startswith(match[1] or match[2]):
            return bool(published.get("quick_gelu"))
    return None


def fit(model: nn.Module, name: str, file: Path, state: dict[str, Tensor]) -> None:
    """Load a state dict. Raises `ClipError`, which names what does not fit.

    open_clip would make position embeddings of other sizes fit by interpolation: that is another CLIP, and is refused.
    """
    own = model.state_dict()
    is_old = "positional_embedding" in state and "positional_embedding" not in own  # before text towers were apart
    state = convert_to_custom_text_state_dict(dict(state)) if is_old else dict(state)
    for key in _NOT_LEARNT:
        if key not in own:
            state.pop(key, None)
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    problems = []
    if missing := [key for key in own if key not in state]:
        problems.append(f"it does not have {listed(missing)}")
    if extra := [key for key in state if key not in own]:
        problems.append(f"{name} does not have {listed(extra)}")
    other = [key for key in state if key in own and state[key].shape != own[key].shape]
    if other:
        shapes = [f"{key} is {_shape(state[key])} in the file and {_shape(own[key])} in {name}" for key in other]
        problems.append(listed(shapes))
    if problems:
        raise ClipError(f"{display(file)} does not fit {name}: {'; '.join(problems)}: {_remedy(state)}")
    model.load_state_dict(state)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _remedy(state: Mapping[str, Any]) -> str:
    """Whose shapes these are."""
    fitting = [name for name in open_clip.list_models() if not name.endswith(TWIN) and _has_shapes(name, state)]
    if fitting:
        return f"the shapes are those of {' or '.join(fitting[:NAMED])}"
    return "give the name of the CLIP that was saved, or its configuration (`config`)"


def _has_shapes(name: str, state: Mapping[str, Any]) -> bool:
    """Whether both towers of a configuration have the sizes of a state dict, as far as a few tensors tell."""
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    try:
        rows = vision["image_size"] // vision["patch_size"]
        expected = {
            "visual.conv1.weight": (vision["width"], 3, vision["patch_size"], vision["patch_size"]),
            "visual.positional_embedding": (rows * rows + 1, vision["width"]),
            "visual.proj": (vision["width"], config["embed_dim"]),
            "positional_embedding": (text["context_length"], text["width"]),
            "token_embedding.weight": (text["vocab_size"], text["width"]),
        }
        last, after = (f"visual.transformer.resblocks.{vision['layers'] + i}.ln_1.weight" for i in (-1, 0))
    except (KeyError, TypeError):  # not a plain tower
        return False
    found = {key: tuple(state[key].shape) if key in state else None for key in expected}
    return found == expected and last in state and after not in state
