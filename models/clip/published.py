"""Published weights, in the hub's cache: whole, or one sentence that says why not.

open_clip would ask the hub itself, but what it then says is a page, or nothing: a model whose weights are not to be had
it leaves random. The hub's own variables hold, as for bundles: HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

from vitrine.models.bundle.sealing import file_sha256
from vitrine.models.clip.errors import ClipError
from vitrine.models.clip.weights import AGAIN, check_readable
from vitrine.models.errors import VitrineError
from vitrine.models.files.errors import FileError
from vitrine.models.files.names import display
from vitrine.models.hub.address import Address, HubError, parse_address
from vitrine.models.hub.download import download

CONFIG = "open_clip_config.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FOLDER_FILES = ("*.safetensors", "*.bin", "*.pth")  # that open_clip takes weights from


def fetch_tag(what: str, published: dict[str, Any]) -> Path:
    """The weights of a tag, in the cache.

    Args:
        what: the name and the tag, for messages.
        published: open_clip's `get_pretrained_cfg` of them.

    Raises `ClipError`.
    """
    repository, _, file = published["hf_hub"].rpartition("/")  # org/model/ or org/model/file
    file = file or HF_WEIGHTS_NAME
    safe = HF_SAFE_WEIGHTS_NAME if file == HF_WEIGHTS_NAME else str(Path(file).with_suffix(".safetensors"))
    return _fetch(f"{what}: ", Address(repository), (safe, file))


def fetch_model(name: str) -> Path:
    """The folder of a model of the hub, hf-hub:org/model, in the cache, with its weights. Raises `ClipError`."""
    try:
        address = parse_address(name)
    except HubError as error:
        raise ClipError(str(error)) from error
    if address.revision is not None:
        raise ClipError(f"{name}: open_clip reads only the main branch; omit @{address.revision}")
    config = _fetch("", address, (CONFIG,))
    weights = _fetch("", address, (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME))
    if weights.parent != config.parent:
        raise ClipError(f"{name} was changed on the hub in the meantime; start again")
    return config.parent


def check_folder(folder: Path) -> None:
    """Raise `ClipError` if a folder has no weights that open_clip would take, or one of its files is not readable."""
    files = [file for pattern in _FOLDER_FILES for file in sorted(folder.glob(pattern))]
    if (folder / CONFIG).is_file() and not files:
        raise ClipError(f"{display(folder)} has no weights: put {HF_SAFE_WEIGHTS_NAME} there")
    for file in files:
        check_readable(file)


def _fetch(of: str, address: Address, names: tuple[str, ...]) -> Path:
    """Download the first of these files that the repository has, unless it is in the cache. Raises `ClipError`."""
    try:
        file = _download(address, names)
    except (HubError, FileError) as error:
        place = " (HF_HUB_CACHE sets where the cache is)" if isinstance(error, FileError) else ""
        raise ClipError(f"{of}{error}{place}") from error
    if file is None:
        raise ClipError(f"{of}{address} is not a CLIP for open_clip: it has no {' and no '.join(names)}")
    _check_whole(of, file)
    return file


def _download(address: Address, names: tuple[str, ...]) -> Path | None:
    """The file in the cache; None if the repository has none of these. Raises `HubError`, `FileError`."""
    for name in names:
        try:
            return download(address, name)
        except RemoteEntryNotFoundError:
            continue
        except HubError as error:
            cached = (try_to_load_from_cache(address.repository, other) for other in names)
            file = next((path for path in cached if isinstance(path, str)), None)
            if file is None or not isinstance(error.__cause__, LocalEntryNotFoundError):
                raise
            return Path(file)
    return None


def _check_whole(of: str, file: Path) -> None:
    """Raise `ClipError` for a file in the cache that is not what the hub has."""
    data = file.resolve()  # of large files named by their sha256
    try:
        if _SHA256.fullmatch(data.name) and file_sha256(data) != data.name:
            raise ClipError(f"{display(file)} is damaged, its sha256 is wrong: {AGAIN}")
        if file.name != CONFIG:
            check_readable(file)
    except VitrineError as error:
        problem = str(error).removesuffix(f": {AGAIN}")
        raise ClipError(f"{of}{problem}; delete {display(data)}, and start again") from error
