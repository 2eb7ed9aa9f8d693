"""`vitrine.load`: opens a bundle, or the checkpoint of a run, for use from Python."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.layout import MANIFEST
from vitrine.models.bundle.manifest import FORMAT
from vitrine.models.errors import VitrineError
from vitrine.service.library.explainer import Explainer
from vitrine.service.operations.settings import load_settings


def load(source: str | os.PathLike[str] | None = None, **settings: Any) -> Explainer:
    """Open a bundle and explain images with it: `vitrine.load("bundles/b32").explain("photo.jpg").ledger`.

    Args:
        source: the folder of a bundle, the folder of a run (`runs/b32`), or one checkpoint of a run (see below).
            Default: VITRINE_BUNDLE, or else the small bundle that comes with Vitrine.
        settings: settings of the service, by their names in lower case (`precision="auto"`, `threads=4`). They
            override the VITRINE_ variables of the environment. Settings that concern HTTP have no effect.

    A checkpoint is exported first. This takes as long as `vitrine export`; progress and warnings go to standard error.
    The export needs vitrine[training], and the run's CLIP and images; the run's paths are relative to VITRINE_DATA
    (default: `data`). The bundle is kept under ~/.cache/vitrine (XDG_CACHE_HOME), and the next call with the same
    checkpoint loads it from there; delete it there when you no longer need it. Its features have no labels:
    `vitrine cards` makes them.

    Raises `VitrineError`, whose message says what is wrong and what to do.
    """
    made = load_settings(**settings)
    path = made.bundle if source is None else Path(source)
    if not (path / MANIFEST).exists():
        path = _exported(path)
    return Explainer(open_bundle(path), made)


def _exported(path: Path) -> Path:
    """The bundle of a run's newest checkpoint, or of a checkpoint; exported unless that was done before."""
    if not (path / "checkpoint.json").is_file() and not any(path.glob("step-*/checkpoint.json")):
        raise BundleError(
            f"{path} is neither a bundle (it has no {MANIFEST}) nor a run (no step-*/checkpoint.json): give the folder "
            "of a bundle or of a run; `vitrine pull` fetches a bundle from a hub"
        )
    try:
        from vitrine.models.progress import Progress
        from vitrine.models.tables import new_console
        from vitrine.training.checkpoint import latest
        from vitrine.training.export import export_checkpoint
    except ModuleNotFoundError as error:
        raise BundleError(
            f"cannot export the checkpoint {path}: {error.name} is not installed; pip install 'vitrine[cpu,training]', "
            "or export it on another machine and load the bundle"
        ) from error
    checkpoint = latest(path)
    out = _cache() / _digest(checkpoint)
    if (out / MANIFEST).exists():
        return out
    console = new_console(stderr=True)
    console.print(f"exporting {checkpoint} to {out}; the next call loads it from there", soft_wrap=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    data_root = Path(os.environ.get("VITRINE_DATA") or "data")
    try:
        with Progress(console) as progress:
            export_checkpoint(checkpoint, data_root, out, log=lambda said: console.print(said), progress=progress)
    except VitrineError:
        if not (out / MANIFEST).exists():  # else another process was first
            raise
    return out


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrine"


def _digest(checkpoint: Path) -> str:
    """Of all that a bundle is made of but the CLIP, whose own digest is in checkpoint.json, and of the layout."""
    digest = hashlib.sha256(f"{FORMAT}\n".encode())
    for file in sorted(checkpoint.iterdir()):
        if file.name != "state.safetensors":  # for resuming: as large again twice, and no part of the bundle
            with file.open("rb") as stream:
                digest.update(f"{file.name}\n{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]
