"""Optional cache of activations on disk (`[training] cache`): one safetensors file per chunk and process.

<folder>/cache.json                               fingerprint of the activations; a cache of another run is refused
         chunk-00007-process-0-of-1.safetensors   the tensors of a batch, [L, N, d] each, is_cls left out: mlp_in and
                                                  mlp_out, or stream; the broken images in its header

The files are not compressed: MLP inputs and outputs of L = 12 layers of T = 50 tokens of width 768 (ViT-B/32) take
3.7 MB per image in float32, the streams of residual SAEs 1.7 MB.
bfloat16 halves that, and rounds; already the first visit returns rounded values, so that a run does not depend on where
it was resumed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitrine.models.clip.loading import Clip
from vitrine.models.clip.tower import Tower
from vitrine.models.errors import VitrineError
from vitrine.models.files.errors import FileError
from vitrine.models.files.writing import written
from vitrine.training.data.activations import Activations, Residuals, table_names, tables
from vitrine.training.data.images import Plan
from vitrine.training.recipes.image_sources import FolderSource, Source

FORMAT = 2  # 1: other pixels of transparent, 16-bit and very large images
DType = Literal["float32", "bfloat16"]
Kind = type[Activations] | type[Residuals]


class CacheError(VitrineError):
    """The cache cannot be used; the message names the folder and says what to do."""


def cache_bytes(kind: Kind, plan: Plan, tower: Tower, dtype: DType) -> int:
    """Size on disk of all activations of a plan, over all processes, without headers."""
    images = plan.steps_per_epoch * plan.images_per_step
    return tables(kind, tower) * images * tower.tokens * tower.width * getattr(torch, dtype).itemsize


@dataclass(frozen=True)
class ActivationCache:
    """The activations of one process's share of every chunk. Create it with `open_cache`."""

    kind: Kind
    folder: Path
    plan: Plan
    tower: Tower
    dtype: DType
    rank: int
    world: int
    log: Callable[[str], object]

    def readable_chunks(self) -> set[int]:
        """The chunks that can be read. Damaged files are reported through `log` and not included."""
        return {chunk for chunk in range(self.plan.chunks) if self._path(chunk).exists() and self._check(chunk)}

    def read(self, chunk: int) -> tuple[list[Tensor], dict[str, str]] | None:
        """(the tables of `kind`, [L, N, d] each; broken images), float32 on the CPU; None if the file is damaged."""
        if not self._check(chunk):
            return None
        with safe_open(self._path(chunk), "pt") as file:
            broken = json.loads(file.metadata()["broken"])
            return [file.get_tensor(name).float() for name in table_names(self.kind)], broken

    def write(self, chunk: int, tensors: Sequence[Tensor], broken: Mapping[str, str]) -> list[Tensor]:
        """Store a chunk's tables atomically. Returns them as `read` will: rounded if bfloat16."""
        rounded = [x.to(getattr(torch, self.dtype)) for x in tensors]
        named = dict(zip(table_names(self.kind), rounded, strict=True))
        try:
            with written(self._path(chunk)) as partial:
                save_file(named, partial, {"broken": json.dumps(dict(broken))})
        except FileError as error:
            raise CacheError(f"{error}, or remove `cache` from [training]") from error
        return [x.float() for x in rounded]

    def _path(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:05}-process-{self.rank}-of-{self.world}.safetensors"

    def _check(self, chunk: int) -> bool:
        """Whether a file's header and length are right; this detects a truncated file, but not a flipped bit."""
        images = sum(map(len, self.plan.share(chunk, self.rank, self.world)))
        shape = [self.kind.layers(self.tower), images * self.tower.tokens, self.tower.width]
        expected = (shape, {"float32": "F32", "bfloat16": "BF16"}[self.dtype])
        try:
            with safe_open(self._path(chunk), "pt") as file:
                slices = [file.get_slice(name) for name in table_names(self.kind)]
                json.loads(file.metadata()["broken"])
                problem = "" if all((x.get_shape(), x.get_dtype()) == expected for x in slices) else "a different shape"
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            problem = str(error)
        if problem:
            self.log(f"{self._path(chunk)} is damaged ({problem}); its activations are computed again")
        return not problem


def open_cache(
    kind: Kind,
    folder: Path,
    dtype: DType,
    *,
    clip: Clip,
    source: Source,
    plan: Plan,
    precision: str = "32-true",
    rank: int = 0,
    world: int = 1,
    log: Callable[[str], object] = print,
) -> ActivationCache:
    """The cache in `folder`, created if it does not exist.

    Args:
        precision: the tower's, one of the values of `[training] precision`.
        log: called with a message for each damaged file.

    Raises:
        CacheError: the folder holds activations of other arguments, or the disk has too little space.
    """
    fingerprint = _fingerprint(kind, dtype, clip, source, plan, precision, world)
    file = folder / "cache.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Chunks are listed before cache.json is checked: it is written first, so a second process sees both or neither.
        used = sum(path.stat().st_size for path in folder.glob("chunk-*.safetensors"))
        if file.exists():
            _check_fingerprint(folder, json.loads(file.read_text()), fingerprint)
        elif used:
            raise CacheError(f"{folder} holds activations without their cache.json; delete it or choose another --out")
        free = shutil.disk_usage(folder).free
        needed = cache_bytes(kind, plan, clip.tower, dtype) - used
        if needed > free:
            raise CacheError(
                f"{folder} needs {needed / 1e9:,.1f} GB more for the activations, but the disk has {free / 1e9:,.1f} "
                f"GB free; free some space, use bfloat16, or remove `cache` from [training]"
            )
        with written(file, shared=True) as partial:
            partial.write_text(json.dumps(fingerprint, indent=2), encoding="utf-8")
    except (FileError, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CacheError(f"{folder} cannot be used as a cache: {error}; delete it or choose another --out") from error
    return ActivationCache(kind, folder, plan, clip.tower, dtype, rank, world, log)


def _fingerprint(
    kind: Kind, dtype: DType, clip: Clip, source: Source, plan: Plan, precision: str, world: int
) -> dict[str, Any]:
    """Everything that a chunk's activations depend on, as read back from JSON. No epochs: they share the chunks."""
    fingerprint = {
        "format": FORMAT,
        **({} if kind is Activations else {"tensors": table_names(kind)}),  # caches of old have no such key
        "CLIP": clip.sha256,
        "preprocessing": clip.preprocess,
        "source": _listed(source),
        "plan": {key: value for key, value in asdict(plan).items() if key != "epochs"},
        "precision": precision,
        "dtype": dtype,
        "processes": world,
    }
    return dict(json.loads(json.dumps(fingerprint)))


def _listed(source: Source) -> dict[str, Any]:
    """What decides which images a source has, and in which order; a key that came later counts only where it is set."""
    has_default = isinstance(source, FolderSource) and source.classes
    return source.model_dump(exclude={"classes"} if has_default else None)


def _check_fingerprint(folder: Path, stored: Any, expected: dict[str, Any]) -> None:
    fields = stored if isinstance(stored, dict) else {}
    if other := [key for key in {**expected, **fields} if fields.get(key) != expected.get(key)]:
        raise CacheError(
            f"{folder} holds activations made with a different {', '.join(other)}; delete it or choose another --out"
        )
