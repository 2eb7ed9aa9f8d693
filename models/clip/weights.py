"""The weights of a CLIP in a file of the user's: what the file is, and the tensors in it, whoever saved them.

Read are safetensors, `torch.save`'s files (state dicts, and checkpoints of training that have one inside) and
TorchScript archives, which is how OpenAI publishes its CLIPs. They are told by their content, not by their name. Of
`torch.save`'s files nothing but tensors and plain data is unpickled, so that they cannot run code. TorchScript archives
are programs: torch runs what is in them, so give those alone that you trust.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vitrine.models.clip.errors import ClipError
from vitrine.models.files.names import display, printable

AGAIN = "copy or download it again"
_UNPACK = "unpack it, and give the file of weights in it"
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_FOREIGN = (  # how a file begins, what it is, and what to do
    (rb"version https://git-lfs", f"is a pointer of git-lfs, not the weights: run `git lfs pull` there, or {AGAIN}"),
    (rb"\s*[{\[]", "is JSON, not weights: give the file of weights (for a CLIP's configuration use `config`)"),
    (rb".{257}ustar", f"is a tar archive: {_UNPACK}"),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|\xfd7zXZ|BZh|7z\xbc\xaf", f"is compressed: {_UNPACK}"),
    (rb"\x93NUMPY", "is a numpy array, not named weights: save the model's state_dict with torch.save"),
)
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how `torch.save` began its files before it wrote zip archives
_LONGEST_HEADER = 100_000_000  # bytes, of safetensors
_KINDS = "safetensors, torch.save and TorchScript"
_INSIDE = ("state_dict", "model_state_dict", "model", "module")  # where checkpoints of training keep the weights
_WRAPPERS = (
    "module.",
    "model.",
    "clip.",
    "clip_model.",
    "net.",
)  # before every key: DistributedDataParallel's, Lightning's
_OPENAI = ("input_resolution", "context_length", "vocab_size")  # what only OpenAI's archives keep among their weights
_GLOBAL = re.compile(r"GLOBAL (\S+)")
NAMED = 3  # keys that a message names


@dataclass(frozen=True)
class Weights:
    """Named tensors of a file, with open_clip's names."""

    state: dict[str, Tensor]
    quick_gelu: bool | None  # True: QuickGELU, False: GELU, None: the file does not say


def read_weights(file: Path) -> Weights:
    """The weights in a file. Raises `ClipError`, which names the file, for any that has none of a CLIP."""
    kind = _kind(file)
    if kind == "TorchScript":
        state, quick_gelu = _script(file)
    else:
        state, quick_gelu = _state_dict(file, _load(file, kind)), None
    state = _unwrapped(state)
    if not state.keys().isdisjoint(_OPENAI):
        state, quick_gelu = {key: value for key, value in state.items() if key not in _OPENAI}, True
    if not any(key.startswith("visual.") for key in state):
        raise ClipError(f"{display(file)} {_of_something_else(state)}")
    return Weights(state, quick_gelu)


def check_readable(file: Path) -> None:
    """Raise `ClipError` if a file is none of weights, or is not all there; its end is looked at, not all of it."""
    kind = _kind(file)
    if kind == "safetensors":
        _load(file, kind)


def _kind(file: Path) -> str:
    """safetensors, torch.save, legacy (torch.save's of old) or TorchScript."""
    with file.open("rb") as opened:
        head = opened.read(512)
    where = display(file)
    if not head:
        raise ClipError(f"{where} is empty: {AGAIN}")
    if (
        head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER
    ):  # first: the length may be any bytes
        return "safetensors"
    if _WEB_PAGE.match(head):
        raise ClipError(
            f"{where} is a web page, not weights (most likely a server's answer instead of the file): download them "
            f"again, logged in if necessary"
        )
    for pattern, what in _FOREIGN:
        if re.match(pattern, head, re.DOTALL):
            raise ClipError(f"{where} {what}")
    if head.startswith(b"PK\x03\x04"):
        return _archive(file)
    if head.startswith(_LEGACY):
        return "legacy"
    if head.startswith(b"\x80"):
        raise ClipError(
            f"{where} is a pickle, which could run code when it is read: save the model's state_dict with torch.save"
        )
    raise ClipError(f"{where} is not a file of weights ({_KINDS}), or it is damaged: {AGAIN}")


def _archive(file: Path) -> str:
    """What a zip archive is, by the names in it."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = {PurePosixPath(name).name for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise ClipError(f"{display(file)} is damaged or incomplete: {AGAIN}") from error
    if "constants.pkl" in names:
        return "TorchScript"
    if "data.pkl" in names:
        return "torch.save"
    raise ClipError(f"{display(file)} is a zip archive, not a file of torch: {_UNPACK}")


def _load(file: Path, kind: str) -> Any:
    """What was saved: tensors in memory that is mapped, where that can be, so that only what is used is read."""
    try:
        if kind == "safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=kind == "torch.save" or None)
    except UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        if named is None:
            raise ClipError(f"{display(file)} is damaged: {AGAIN}") from error
        raise ClipError(
            f"{display(file)} has Python objects ({printable(named[1])}), which could run code when they are read: "
            f"save only the model's state_dict, torch.save(model.state_dict(), …)"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, IndexError, KeyError, ValueError) as error:
        raise ClipError(f"{display(file)} is damaged or incomplete ({_line(error)}): {AGAIN}") from error


def _script(file: Path) -> tuple[dict[str, Any], bool | None]:
    """The weights of a TorchScript archive, and its activation, of which it has the code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch would have us use a format that OpenAI does not
            module = torch.jit.load(file, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise ClipError(f"{display(file)} is damaged or incomplete ({_line(error)}): {AGAIN}") from error
    types = {part.original_name for part in module.modules()}
    quick_gelu = True if "QuickGELU" in types else False if "GELU" in types else None
    return dict(module.state_dict()), quick_gelu


def _state_dict(file: Path, content: Any) -> dict[str, Tensor]:
    """The named tensors in what was saved."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _INSIDE if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    where = display(file)
    if not isinstance(content, Mapping):
        raise ClipError(f"{where} has {_kind_of(content)}, not named weights: save the model's state_dict")
    if not content:
        raise ClipError(f"{where} has no weights in it: save the model's state_dict")
    if "param_groups" in content:
        raise ClipError(f"{where} is the state of an optimizer, not weights: give the file with the model's state_dict")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ClipError(
            f"{where} has {listed(others)} in addition to weights or instead of them, and no state_dict: save only "
            f"the model's state_dict"
        )
    return {str(key): value for key, value in content.items()}


def _kind_of(content: Any) -> str:
    return "one tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """Without what wrappers put before (DistributedDataParallel) or between (torch.compile) the names."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while wrapper := next((w for w in _WRAPPERS if all(key.startswith(w) for key in state)), None):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def _of_something_else(state: Mapping[str, Any]) -> str:
    """What weights are that are not a CLIP's."""
    parts = {key.split(".")[0] for key in state}
    if {"encoders", "decoders"} <= parts:
        return "has the weights of a dictionary (a CLT or residual SAEs), not of a CLIP: give the CLIP's weights"
    if "vision_model" in parts:
        return (
            "is a CLIP in the format of transformers, not of open_clip: use the same model in open_clip's format "
            "(hf-hub:org/model), or convert the names of its weights"
        )
    return f"has no vision tower of open_clip (visual.…), but {listed(state)}: give the weights of a CLIP"


def listed(keys: Iterable[str]) -> str:
    """The first few, and how many there are besides."""
    keys = list(keys)
    rest = f" and {len(keys) - NAMED:,} more" if len(keys) > NAMED else ""
    return printable(", ".join(keys[:NAMED])) + rest


def _line(error: Exception) -> str:
    """The first line of a message, which may be a page, without the full stop."""
    return printable(next(iter(str(error).splitlines()), "")[:200].rstrip(". ") or type(error).__name__)
